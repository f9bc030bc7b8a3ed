"""Which text trains and which validates: never the same, and decided by content, not by chance."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.sources import find_files, read_documents


@dataclass(frozen=True)
class Split:
    """A corpus parted in two; both sides can be read as often as needed, as streams.

    Attributes:
        train, validation: their documents; an empty or blank one is passed over.
        description: a sentence for the summary.
    """

    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]
    description: str


class Corpus:
    """The files behind a data config.

    A file that data.validation.path names never trains, whatever data.path says.
    """

    def __init__(self, config: DataConfig):
        self._config = config
        self.files, self.ignored = find_files(config.path, "data.path")
        self.validation_files = []
        if config.validation.path is not None:
            self.validation_files, _ = find_files(config.validation.path, "data.validation.path")
            held_out = {file.resolve() for file in self.validation_files}
            self.files = [file for file in self.files if file.resolve() not in held_out]
            if not self.files:
                raise ValueError(
                    f"data.validation.path={config.validation.path} holds out every file of "
                    f"data.path={config.path}: nothing is left to train on"
                )

    @property
    def stamp(self) -> list:
        """Changes when a file does: names, sizes and times of change of all files."""
        stats = [(file, file.stat()) for file in self.files + self.validation_files]
        return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    def split(self, cache_dir: Path) -> Split:
        def read(files: list[Path]) -> Iterator[str]:
            texts = read_documents(files, self._config.text_field, cache_dir)
            return (text for text in texts if text and not text.isspace())

        fraction = self._config.validation.fraction
        if fraction is None:
            return Split(
                lambda: read(self.files),
                lambda: read(self.validation_files),
                f"validation is {_count(self.validation_files)} of its own, "
                f"{self._config.validation.path}; training is {_count(self.files)}",
            )
        below = cutoff((content_hash(text) for text in read(self.files)), fraction)
        if below is None:
            return Split(
                lambda: (text[: _last_part(text, fraction)] for text in read(self.files)),
                lambda: (text[_last_part(text, fraction) :] for text in read(self.files)),
                f"there is one document: its last {fraction:.2%}, from a line's start, validates",
            )
        return Split(
            lambda: (text for text in read(self.files) if content_hash(text) >= below),
            lambda: (text for text in read(self.files) if content_hash(text) < below),
            f"validation is whole documents drawn by a hash of their text, about {fraction:.2%} of "
            "them and at least one",
        )


def content_hash(text: str) -> int:
    """64 bits; equal texts have equal hashes, so a repeated document is never on both sides."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def cutoff(hashes: Iterator[int], fraction: float) -> int | None:
    """The hash below which a document validates, or None when all documents are the same one.

    It is fraction * 2^64, moved as little as leaves something on both sides: only in a corpus of a
    few documents does the side of one hang on the others.
    """
    distinct = np.unique(np.fromiter(hashes, np.uint64))
    if len(distinct) < 2:
        return None
    lowest, highest = int(distinct[0]), int(distinct[-1])
    return min(max(int(fraction * 2**64), lowest + 1), highest)


def _last_part(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins: after a line break, if there is one before."""
    middle = int(len(text) * (1 - fraction))
    return text.rfind("\n", 0, middle) + 1 or middle


def _count(files: list) -> str:
    return f"{len(files)} file" + "s" * (len(files) != 1)
