"""The documents behind a data config, and which of them validate: by content, not by chance.

A document never is on both sides, nor a copy of it; nor in a mixture, whose sources may share
documents, if they hold out the same fraction.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import numpy as np

from data.config import TextConfig
from data.hub import pinned, read_rows
from data.sources import find_files, read_file, unread_members
from data.unwrap import unwrap


class Document(NamedTuple):
    """A text with the place behind it, where reading can go on (lists and dicts for JSON)."""

    text: str
    hash: int
    held_out: bool
    position: list | dict


class Corpus:
    """The text of one config, read as a stream, as often as needed. Blank documents are left out.

    Attributes:
        files: what is read; empty for the hub.
        num_bytes: UTF-8 bytes of all documents, where they were counted, or None.
    """

    def __init__(self, config: TextConfig, where: str):
        self._config, self._where = config, where
        self.files, self._ignored, self.num_bytes = [], Counter(), None
        self._num_held_out = 0
        validation = config.validation.path
        if config.path is not None:
            self.files, self._ignored = find_files(config.path, f"{where}.path")
        if validation is not None:
            held_out_files, _ = find_files(validation, f"{where}.validation.path")
            held_out = {file.resolve() for file in held_out_files}
            train = [file for file in self.files if file.resolve() not in held_out]
            if config.path is not None and not train:
                raise ValueError(
                    f"{where}.validation.path={validation} holds out every file of "
                    f"{where}.path={config.path}: nothing is left to train on"
                )
            # First, so that of equal documents the held out one is kept.
            self.files, self._num_held_out = held_out_files + train, len(held_out_files)

    def ignored(self) -> dict[str, int]:
        """How many files of which kinds are not read, those inside archives too."""
        return dict(sum(map(unread_members, self.files), self._ignored.copy()))

    @property
    def stamp(self) -> list:
        """Changes when a file does: names, sizes and times of change of all files."""
        stats = [(file, file.stat()) for file in self.files]
        return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    @cached_property
    def commit(self) -> str | None:
        """The commit of the hub's dataset that is read: the newest now, unless set before."""
        return None if self._config.path is not None else pinned(self._config.hub, self._where)

    @property
    def split(self) -> str:
        """How documents are parted, in a sentence."""
        fraction = self._config.validation.fraction
        if fraction is None:
            count = len(self.files) - self._num_held_out
            training = f"{count} file" + "s" * (count != 1) if count else "the dataset"
            return f"validation is {self._config.validation.path}; training is {training}"
        if self._below is None:
            return f"there is one document: its last {fraction:.2%}, from a line's start, validates"
        return (
            f"validation is whole documents drawn by a hash of their text, about {fraction:.2%} of "
            "them and at least one"
        )

    @cached_property
    def _below(self) -> int | None:
        """Documents whose hash is below it validate; None when there is only one document.

        Files are read once to find it, so that of a few documents, too, some train and some
        validate.
        """
        fraction = self._config.validation.fraction
        if self._config.path is None:
            return int(fraction * 2**64)
        self.num_bytes, hashes = 0, []
        for text, _ in self._texts(None):
            self.num_bytes += len(text.encode())
            hashes.append(content_hash(text))
        return cutoff(hashes, fraction)

    def documents(self, position=None) -> Iterator[Document]:
        """The documents behind `position` (None: all), each with its side.

        Raises:
            ValueError, ConnectionError: something can't be read; the message says what.
        """
        fraction = self._config.validation.fraction
        if fraction is not None and self._below is None:
            for text, _ in islice(self._texts(None), 1):
                end = _last_part(text, fraction)
                for number, (part, held_out) in enumerate(
                    [(text[:end], False), (text[end:], True)]
                ):
                    if position is None or position[0] <= number:
                        yield Document(part, content_hash(part), held_out, [number + 1])
            return
        for text, behind in self._texts(position):
            hash = content_hash(text)
            if fraction is not None:
                held_out = hash < self._below
            else:
                held_out = isinstance(behind, list) and behind[0] < self._num_held_out
            yield Document(text, hash, held_out, behind)

    def _texts(self, position) -> Iterator[tuple[str, list | dict]]:
        """Texts that aren't blank, as they train."""
        for text, behind in self._raw_texts(position):
            if text and not text.isspace():
                yield unwrap(text) if self._config.unwrap else text, behind

    def _raw_texts(self, position) -> Iterator[tuple[str, list | dict]]:
        """Those of the files, then those of the hub."""
        if position is None or isinstance(position, list):
            first, number = position or (0, 0)
            for file in range(first, len(self.files)):
                texts = read_file(self.files[file], self._config.text_field)
                skipped = number if file == first else 0
                for count, text in enumerate(islice(texts, skipped, None), skipped + 1):
                    yield text, [file, count]
            position = None
        if self._config.path is None:
            hub, field = self._config.hub, self._config.text_field
            yield from read_rows(hub, self.commit, field, self._where, position)


def content_hash(text: str) -> int:
    """64 bits; equal texts have equal hashes, so a repeated document is never on both sides."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def cutoff(hashes: list[int], fraction: float) -> int | None:
    """The hash below which a document validates, or None when all documents are the same one.

    It is fraction * 2^64, moved as little as leaves something on both sides: only in a corpus of a
    few documents does the side of one hang on the others.
    """
    distinct = np.unique(np.array(hashes, np.uint64))
    if len(distinct) < 2:
        return None
    lowest, highest = int(distinct[0]), int(distinct[-1])
    return min(max(int(fraction * 2**64), lowest + 1), highest)


def _last_part(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins: after a line break, if there is one before."""
    middle = int(len(text) * (1 - fraction))
    return text.rfind("\n", 0, middle) + 1 or middle
