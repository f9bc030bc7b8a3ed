import gzip
import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources import find_files, read_file, unread_members


@pytest.fixture
def read(tmp_path):
    def read(*files, text_field="text"):
        return [text for file in files for text in read_file(file, text_field)]

    return read


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_a_text_file_is_one_document(tmp_path, read):
    files = [
        write(tmp_path / "a.txt", "one\n\ntwo — é 🎉\u2028three\x0c"),
        write(tmp_path / "b.md", "\ufeff# windows\r\nlines\r\n"),
        write(tmp_path / "c.py", "def f():\n\treturn 1"),
        write(tmp_path / "d.txt", ""),
    ]
    assert read(*files) == [
        "one\n\ntwo — é 🎉\u2028three\x0c",
        "# windows\nlines\n",
        "def f():\n\treturn 1",
        "",
    ]


def test_a_row_is_one_document(tmp_path, read):
    texts = ["first\nline", "", "été 🎉 \u2028 \r\n", "x" * 3_000_000]
    jsonl = write(tmp_path / "a.jsonl", rows(*texts))
    datasets.Dataset.from_dict({"text": texts, "n": [1, 2, 3, 4]}).to_parquet(
        tmp_path / "a.parquet"
    )
    assert read(jsonl) == texts
    assert read(tmp_path / "a.parquet") == texts
    assert read(tmp_path / "a.parquet", jsonl) == texts + texts


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_an_archive_stands_for_its_files(tmp_path, read, suffix):
    inside = io.BytesIO()
    datasets.Dataset.from_dict({"text": ["in parquet"]}).to_parquet(inside)
    files = {
        "books/a.txt": b"a\r\n",
        "books/b.jsonl.gz": gzip.compress(rows("b", "c").encode()),
        "books/.hidden.txt": b"never",
        "cover.png": b"\xff",
        "d.parquet": inside.getvalue(),
        "e.md": b"e",
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = archive.getvalue()
    if suffix in (".tar.gz", ".tgz"):
        content = gzip.compress(content)
    elif suffix == ".tar.zst":
        content = zstandard.compress(content)
    path = write(tmp_path / f"books{suffix}", content)
    assert find_files(str(tmp_path), "data.path")[0] == [path]
    assert read(path) == ["a\n", "b", "c", "in parquet", "e"]
    assert unread_members(path) == {".png": 1}
    write(path, content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"^{path}: "):
        read(path)


def test_a_long_window_is_no_obstacle(tmp_path, read):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    content = zstandard.ZstdCompressor(compression_params=parameters).compress(b"text")
    assert read(write(tmp_path / "a.txt.zst", content + content)) == ["texttext"]


def test_rows_may_differ_in_their_other_keys(tmp_path, read):
    content = (
        '{"text": "a", "id": 1}\n\n{"id": "two", "meta": {"x": []}, "text": "b"}\n{"text": null}'
    )
    assert read(write(tmp_path / "a.jsonl", content)) == ["a", "b", ""]


def test_another_field_may_hold_the_text(tmp_path, read):
    file = write(tmp_path / "a.jsonl", '{"content": "a", "text": 1}\n')
    assert read(file, text_field="content") == ["a"]


@pytest.mark.parametrize(
    "suffix, compress", [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_compressed_files(tmp_path, read, suffix, compress):
    text = "one\ntwo — é\n" * 20_000
    assert read(write(tmp_path / f"a.txt{suffix}", compress(text.encode()))) == [text]
    jsonl = write(tmp_path / f"a.jsonl{suffix}", compress(rows(text, "b").encode()))
    assert read(jsonl) == [text, "b"]


@pytest.mark.parametrize("name", ["a[1].txt", "b*.txt", "c (d), é.txt", "e#?.txt", "__f/g.txt"])
def test_names_are_names_and_not_patterns(tmp_path, read, name):
    write(tmp_path / "a1.txt", "another")
    write(tmp_path / "bb.txt", "another")
    file = write(tmp_path / name, name)
    assert find_files(str(file), "data.path")[0] == [file]
    assert read(file) == [name]


def test_a_folder_is_searched_to_its_depths(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.JSONL", "a.parquet", "x.zip", "p.png", "q.png"):
        write(tmp_path / name, "x")
    for hidden in (".git/config.txt", "a/.x.txt"):
        write(tmp_path / hidden, "x")
    found, others = find_files(str(tmp_path), "data.path")
    names = [str(file.relative_to(tmp_path)) for file in found]
    assert names == ["a/b/c.JSONL", "a/z.md", "a.parquet", "b.txt"]
    assert others == {".png": 2, ".zip": 1}
    assert find_files(f"{tmp_path}/**/*.md", "data.path")[0] == [tmp_path / "a/z.md"]


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="^data.path: nothing at .*nowhere"):
        find_files(str(tmp_path / "nowhere"), "data.path")
    with pytest.raises(FileNotFoundError, match=r"^data.path: nothing at .*\*.txt"):
        find_files(str(tmp_path / "*.txt"), "data.path")
    with pytest.raises(ValueError, match="holds no file of a kind that is read: .txt"):
        find_files(str(tmp_path), "data.path")
    with pytest.raises(ValueError, match="a.pdf is of a kind that isn't read"):
        find_files(str(write(tmp_path / "a.pdf", "x")), "data.path")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bad.txt", "caf\u00e9".encode("latin-1"), r"isn't UTF-8 \(byte 0xe9\)"),
        ("bad.jsonl", rows("a").encode() + b'{"text": "caf\xe9"}', r"isn't UTF-8 \(byte 0xe9\)"),
        ("bad.jsonl", rows("a") + "{oops}\n", "line 2: isn't JSON"),
        (
            "bad.jsonl",
            rows("a") + '{"txt": "b"}\n',
            "line 2: has no key 'text', only txt; .*text_field",
        ),
        ("bad.jsonl", '{"text": 5}', "line 1: 'text' holds int instead of text"),
        ("bad.jsonl", '["text"]', "line 1: isn't an object with a 'text' key"),
        ("bad.jsonl", '{"text": "\\ud800"}', "line 1: holds half a surrogate pair"),
        ("bad.parquet", "PAR1 and nothing more", "."),
        ("bad.txt.gz", "not compressed", "."),
        ("bad.tar", "no archive", "."),
        ("bad.jsonl.zst", "not compressed", "."),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, read, name, content, message):
    kind = name.removeprefix("bad")
    good = write(tmp_path / f"good{kind.removesuffix('.gz').removesuffix('.zst')}", rows("a"))
    if kind == ".tar":
        tarfile.open(good, "w").close()
    if kind == ".parquet":
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(good)
    bad = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"^{bad}: .*{message}") as caught:
        read(good, bad, good)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named(tmp_path, read):
    datasets.Dataset.from_dict({"content": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: has no column 'text', only content; name"):
        read(tmp_path / "a.parquet")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([".txt.gz", ".jsonl.zst", ".tar.gz", ".parquet"]), st.data())
def test_a_damaged_file_is_named_or_harmless(suffix, data):
    """Cut anywhere, or a bit flipped: no document comes out that wasn't there, or an error names it."""
    texts = ["one\nline", "two", "three"]
    with TemporaryDirectory() as root:
        path = Path(root) / f"a{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(
                pyarrow.table({"text": texts}), path, write_page_checksum=True
            )
        elif suffix == ".tar.gz":
            texts = texts[:1]
            with tarfile.open(path, "w:gz") as archive:
                member = tarfile.TarInfo("a.txt")
                member.size = len(texts[0])
                archive.addfile(member, io.BytesIO(texts[0].encode()))
        elif suffix == ".txt.gz":
            texts = texts[:1]
            path.write_bytes(gzip.compress(texts[0].encode()))
        else:
            parameters = zstandard.ZstdCompressionParameters(write_checksum=True)
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
            path.write_bytes(compressor.compress(rows(*texts).encode()))
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
        path.write_bytes(content)
        try:
            assert list(read_file(path, "text")) == texts
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
