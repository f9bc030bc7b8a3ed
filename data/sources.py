"""Documents out of files: a file, a folder, a glob or archives of them, as a stream.

A text file is one document, its line ends made plain newlines; a row of jsonl or parquet is one as
it stands; a tar archive stands for the files in it. Nothing is copied, and whatever can't be read is
named.
"""

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from glob import glob
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow.parquet
import zstandard

from data.config import ROOT, resolve_path

TEXT = """.txt .text .md .rst .tex .org .adoc .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh
.rs .go .java .kt .scala .swift .cs .js .mjs .jsx .ts .tsx .rb .pl .pm .php .lua .r .jl .hs .ml .ex
.erl .clj .lisp .el .f90 .sql .sh .bash .zig .nim .asm .s .cmake .proto .tcl .vim""".split()
FORMATS = dict.fromkeys(TEXT, "text") | {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tgz": "tar",
}
COMPRESSED = (".gz", ".zst")
READABLE = ".txt, .md, source code, .jsonl, .tar (each also as .gz or .zst) and .parquet"
BATCH = 64  # rows of parquet read at once: a book may be one


def file_format(path: PurePosixPath) -> str | None:
    """ "text", "jsonl", "parquet", "tar", or None for a file that isn't read."""
    compressed = path.suffix.lower() in COMPRESSED
    found = FORMATS.get(PurePosixPath(path.stem if compressed else path.name).suffix.lower())
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
        files = [p for p in inside if not _is_hidden(p.relative_to(place))]
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


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file, in its order.

    Args:
        text_field: the key (jsonl) or column (parquet) with the text; null there is an empty text.

    Raises:
        ValueError: it can't be read, isn't UTF-8 or lacks the field; the message names the file.
    """
    try:
        with open(path, "rb") as file:
            yield from _read(file, path, text_field)
    except Exception as error:
        raise ValueError(f"{path}: {_explain(error)}") from error


def unread_members(path: Path) -> Counter[str]:
    """The files of an archive that `read_file` passes over, by suffix; none for other files."""
    if file_format(path) != "tar":
        return Counter()
    with open(path, "rb") as file, tarfile.open(fileobj=_plain(file, path), mode="r|") as archive:
        members = [PurePosixPath(member.name) for member in archive if member.isfile()]
    return Counter(
        member.suffix or member.name
        for member in members
        if not _is_hidden(member) and not file_format(member)
    )


def _plain(file: BinaryIO, path: PurePosixPath) -> BinaryIO:
    """The file without its compression, which its name tells."""
    compressed = path.suffix.lower() in (".gz", ".tgz", ".zst")
    if compressed and not file.read(1):
        raise ValueError("is empty, which no compressed file is")
    file.seek(0)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFile(file))
    return gzip.open(file) if compressed else file


def _read(file: BinaryIO, path: PurePosixPath, text_field: str) -> Iterator[str]:
    kind = file_format(path)
    if kind == "parquet":
        yield from _read_parquet(file, text_field)
        return
    file = _plain(file, path)
    if kind == "tar":
        yield from _read_tar(file, text_field)
        while file.read(1 << 20):  # behind its end is the checksum of what came before
            pass
        return
    # utf-8-sig drops the mark that Windows editors put in front.
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")
    yield from [lines.read()] if kind == "text" else _read_jsonl(lines, text_field)


class _ZstdFile(io.RawIOBase):
    """Decompresses, also with a window that `zstd` wants a flag for, and one frame after another.

    Unlike the library's own reader it notices a file that was cut short.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._frame = file, None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("ends in the middle of its compressed text")
                return 0
            if self._frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                self._frame = decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _read_jsonl(lines: io.TextIOWrapper, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            try:
                yield _text_of(json.loads(line), text_field)
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number}: {_explain(error)}") from None


def _read_parquet(file: BinaryIO, text_field: str) -> Iterator[str]:
    table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    check_column(text_field, table.schema_arrow.names)
    for rows in table.iter_batches(BATCH, columns=[text_field]):
        for text in rows[text_field].to_pylist():
            yield _text_of({text_field: text}, text_field)


def _read_tar(file: BinaryIO, text_field: str) -> Iterator[str]:
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isfile() or _is_hidden(path) or not file_format(path):
                continue
            content = io.BytesIO(archive.extractfile(member).read())  # a stream can't go back
            try:
                yield from _read(content, path, text_field)
            except Exception as error:
                raise ValueError(f"{member.name}: {_explain(error)}") from None


def check_column(text_field: str, names: list[str]) -> None:
    """Raises ValueError when none of the columns' names is that of the text."""
    if text_field not in names:
        raise ValueError(
            f"has no column {text_field!r}, only {', '.join(names)}; "
            "name the right one with data.text_field"
        )


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


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.parts)


def _explain(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"isn't UTF-8 (byte 0x{byte:02x}); convert it, as in `iconv -f latin1 -t utf-8`"
    if isinstance(error, UnicodeEncodeError):
        return "holds half a surrogate pair, which isn't text"
    if isinstance(error, json.JSONDecodeError):
        return f"isn't JSON ({error})"
    return " ".join(str(error).split()) or type(error).__name__
