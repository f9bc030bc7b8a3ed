"""Documents out of files: a file, a folder or a glob, read as a stream by Hugging Face `datasets`.

A text file is one document, its line ends made plain newlines; a row of jsonl or parquet is one as
it stands. Nothing is copied, nothing is fetched, and whatever can't be read is named.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from glob import escape, glob
from pathlib import Path

import datasets

from data.config import ROOT, resolve_path

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or each opening of a local file calls the hub

TEXT = """.txt .text .md .rst .tex .org .adoc .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh
.rs .go .java .kt .scala .swift .cs .js .mjs .jsx .ts .tsx .rb .pl .pm .php .lua .r .jl .hs .ml .ex
.erl .clj .lisp .el .f90 .sql .sh .bash .zig .nim .asm .s .cmake .proto .tcl .vim""".split()
FORMATS = dict.fromkeys(TEXT, "text") | {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
READABLE = ".txt, .md, source code, .jsonl and .parquet (the first four also as .gz or .zst)"


def file_format(path: Path) -> str | None:
    """ "text", "jsonl", "parquet", or None for a file that isn't read."""
    compressed = path.suffix.lower() in COMPRESSED
    found = FORMATS.get((Path(path.stem) if compressed else path).suffix.lower())
    return None if compressed and found == "parquet" else found


def find_files(path: str, where: str) -> tuple[list[Path], Counter[str]]:
    """The readable files at a file, folder or glob, in a fixed order, and what else lay there.

    A folder is searched to its depths; hidden files and folders in it are left alone. Files of
    other kinds are counted by suffix. `where` is the key the path came from, for messages.
    """
    place = resolve_path(path)
    if place.is_file():
        if not file_format(place):
            raise ValueError(
                f"{where}: {place} is of a kind that isn't read; these are: {READABLE}"
            )
        return [place], Counter()
    if place.is_dir():
        inside = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
        files = [
            p for p in inside if not any(x.startswith(".") for x in p.relative_to(place).parts)
        ]
    else:
        files = [Path(p) for p in glob(str(place), recursive=True) if os.path.isfile(p)]
        if not files:
            raise FileNotFoundError(
                f"{where}: nothing at {place} (a file, folder or glob is needed; a relative path "
                f"starts at {ROOT}, and ~ is your home)"
            )
    found = sorted(file for file in files if file_format(file))
    if not found:
        raise ValueError(f"{where}: {place} holds no file of a kind that is read: {READABLE}")
    return found, Counter(file.suffix or file.name for file in files if not file_format(file))


def read_documents(files: list[Path], text_field: str, cache_dir: Path) -> Iterator[str]:
    """The documents of the files: texts first, then jsonl, then parquet, each in the given order.

    Args:
        text_field: the key (jsonl) or column (parquet) with the text; null there is an empty text.
        cache_dir: where `datasets` puts its lock files.

    Raises:
        ValueError: a file can't be read, isn't UTF-8 or lacks the field; the message names it.
    """
    readers = {"text": _read_texts, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for kind, reader in readers.items():
        if group := [file for file in files if file_format(file) == kind]:
            try:
                yield from reader(group, text_field, cache_dir)
            except Exception as error:
                if len(group) > 1:  # a stream over many files doesn't tell which: read one by one
                    for file in group:
                        deque(read_documents([file], text_field, cache_dir), maxlen=0)
                raise ValueError(f"{group[0]}: {_explain(error)}") from error


def _read_texts(files: list[Path], text_field: str, cache_dir: Path) -> Iterator[str]:
    for (text,) in _stream("text", files, cache_dir, 1, "text", sample_by="document"):
        yield text


def _read_jsonl(files: list[Path], text_field: str, cache_dir: Path) -> Iterator[str]:
    # As lines of text: rows may then differ in their other keys, which a table's columns may not.
    number = 0
    for lines in _stream("text", files, cache_dir, 64, "text", sample_by="line"):
        for line in lines:
            number += 1
            if line and not line.isspace():
                try:
                    yield _text_of(json.loads(line), text_field)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"line {number}: {_explain(error)}") from None


def _read_parquet(files: list[Path], text_field: str, cache_dir: Path) -> Iterator[str]:
    for texts in _stream("parquet", files, cache_dir, 64, text_field):
        for text in texts:
            yield _text_of({text_field: text}, text_field)


def _stream(
    builder: str, files: list[Path], cache_dir: Path, batch_size: int, column: str, **options
) -> Iterator[list]:
    if builder == "text":
        options["encoding"] = "utf-8-sig"  # drops the mark that Windows editors put in front
    rows = datasets.load_dataset(
        builder,
        data_files={"train": [escape(str(file)) for file in files]},
        split="train",
        streaming=True,
        cache_dir=str(cache_dir),
        **options,
    )
    for table in rows.with_format("arrow").iter(batch_size):
        if column not in table.column_names:
            raise ValueError(
                f"has no column {column!r}, only {', '.join(table.column_names)}; "
                "name the right one with data.text_field"
            )
        yield table[column].to_pylist()


def _text_of(row: object, text_field: str) -> str:
    if not isinstance(row, dict):
        raise TypeError(f"isn't an object with a {text_field!r} key")
    if text_field not in row:
        raise TypeError(
            f"has no key {text_field!r}, only {', '.join(row)}; "
            "name the right one with data.text_field"
        )
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"{text_field!r} holds {type(text).__name__} instead of text")
    text.encode()  # half a surrogate pair, which JSON can spell, is no text
    return text


def _explain(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"isn't UTF-8 (byte 0x{byte:02x}); convert it, as in `iconv -f latin1 -t utf-8`"
    if isinstance(error, UnicodeEncodeError):
        return "holds half a surrogate pair, which isn't text"
    if isinstance(error, json.JSONDecodeError):
        return f"isn't JSON ({error})"
    return " ".join(str(error).split()) or type(error).__name__
