"""Held-out text to hide things in: exact lengths in tokens, cuts between sentences."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.config import resolve_path
from data.shards import TokenShards
from model.checkpoint import Checkpoint

# A full stop, with closing quotes, before white space; not the one of a title.
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"'”’)_]*(?=\s)")
ENOUGH = 1 << 21  # tokens; more held-out text than this is not read


class Haystack:
    """A long run of tokens and the places between its sentences.

    A text shorter than the longest slice asked for is repeated; of one past ENOUGH the rest is left.

    Args:
        documents: token numbers of each document, without end-of-text.
        longest: greatest slice, in tokens.

    Attributes:
        tokens: int64 [N + longest or more]; the first N are the text, once.
        size: N.
        starts: int64, where a slice may begin: the text's start and its sentence ends.
        fingerprint: 16 hex digits over the N tokens.
    """

    def __init__(self, documents: Iterable[np.ndarray], tokenizer: Tokenizer, longest: int):
        parts, self.size = [], 0
        for document in documents:
            parts.append(np.asarray(document, np.int64))
            self.size += len(document)
            if self.size >= ENOUGH:
                break
        if not self.size:
            raise ValueError("The haystack holds no text.")
        tokens = np.concatenate(parts)
        self.fingerprint = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
        self.tokens = np.resize(tokens, self.size + longest)  # repeats the text
        self._ends = _sentence_ends(self.tokens, tokenizer)
        self.starts = np.concatenate([[0], self._ends[self._ends < self.size]])

    @classmethod
    def find(cls, checkpoint: Checkpoint, path: str | None, longest: int) -> Haystack:
        """The text at `path`, from the repository's root, or the checkpoint's held-out text."""
        if path:
            return cls.from_file(resolve_path(path), checkpoint.tokenizer, longest)
        return cls.held_out(checkpoint, longest)

    @classmethod
    def held_out(cls, checkpoint: Checkpoint, longest: int) -> Haystack:
        """The validation split of the data that the checkpoint was trained on."""
        return cls(held_out_documents(checkpoint), checkpoint.tokenizer, longest)

    @classmethod
    def from_file(cls, path: Path, tokenizer: Tokenizer, longest: int) -> Haystack:
        """A text file of the user's own."""
        text = read_text(path)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return cls([np.array(ids)], tokenizer, longest)

    def cut(self, start: int, length: int, depth: float) -> int:
        """The sentence end nearest to `depth` of tokens[start : start + length], from its start.

        The slice's start counts as one; in a text without sentences any place will do.
        """
        low, high = np.searchsorted(self._ends, [start, start + length], side="right")
        places = np.concatenate([[0], self._ends[low:high] - start])
        if len(places) == 1:
            return round(depth * length)
        return int(places[np.abs(places - depth * length).argmin()])


def read_text(path: Path) -> str:
    """Raises FileNotFoundError or ValueError with one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"haystack={path}: there is no such file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"haystack={path} is not a UTF-8 text file.") from None


def held_out_documents(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    """The validation split of the checkpoint's data: tokens of each document, without end-of-text.

    Raises FileNotFoundError with one sentence if the data has moved.
    """
    path = checkpoint.config.get("data_path")
    if not path or not (Path(path) / "validation").is_dir():
        where = f"The run's held-out text is not at data_path={path}"
        if not path:
            where = "An imported model has no held-out text"
        raise FileNotFoundError(f"{where}; give a text of your own: haystack=file.txt")
    shards = TokenShards.open(Path(path) / "validation")
    return (shards.document(i)[1:] for i in range(shards.num_documents))


def _sentence_ends(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Indices of tokens that follow a finished sentence, ascending int64."""
    vocabulary, index = np.unique(tokens, return_inverse=True)
    pieces = [tokenizer.decode([t], skip_special_tokens=False) for t in vocabulary.tolist()]
    lengths = np.array([len(piece) for piece in pieces])[index]
    starts = np.cumsum(lengths) - lengths  # of each token, in characters
    text = "".join(pieces[i] for i in index.tolist())
    ends = np.array([match.end() for match in SENTENCE_END.finditer(text)], np.int64)
    return np.flatnonzero(np.isin(starts, ends) & (lengths > 0))
