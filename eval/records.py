"""What an evaluation leaves on disk: every sample with its score, in a file that can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from model.checkpoint import WEIGHTS, Checkpoint


class Records:
    """The samples of <path>, a JSON file, by the values of `keys`.

    Those that the file holds already are taken over if they were measured under the same
    `identity`: weights, text, settings, version of the evaluator.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], identity: dict):
        self.path, self.keys, self.identity = path, keys, json.loads(json.dumps(identity))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            before = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            before = {}
        same = before.get("identity") == self.identity
        self.known = {self.key(r): r for r in before["samples"]} if same else {}
        self._written = time.perf_counter()

    def key(self, record: dict) -> tuple:
        return tuple(record[k] for k in self.keys)

    def fill(
        self, wanted: list[dict], at_once: int, measure: Callable[[list[dict]], Iterable[dict]]
    ) -> list[dict]:
        """A record for each of `wanted` (which hold the keys alone), in order.

        measure(part) gives what is to be added to each of at most `at_once` that are not known yet.
        They are on disk ten seconds later at most, as soon as the part is done, and whatever ends
        the measurement.
        """
        new = [w for w in wanted if self.key(w) not in self.known]
        try:
            for start in range(0, len(new), at_once):
                part = new[start : start + at_once]
                for record, result in zip(part, measure(part), strict=True):
                    self.known[self.key(record)] = record | result
                if time.perf_counter() - self._written > 10:
                    self.write({})
        except BaseException:  # an interrupt too
            self.write({})
            raise
        return [self.known[self.key(w)] for w in wanted]

    def write(self, results: dict) -> dict:
        """Write results beside the samples, all there are; returns what the file holds."""
        results = results | {"identity": self.identity, "samples": list(self.known.values())}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        os.replace(partial, self.path)
        self._written = time.perf_counter()
        return results


def run_folder(checkpoint: Checkpoint) -> Path:
    """The run that a checkpoint belongs to; a checkpoint on its own is its own run."""
    parent = checkpoint.path.parent
    return parent.parent if parent.name == "checkpoints" else checkpoint.path


def weights_digest(checkpoint: Checkpoint) -> str:
    """16 hex digits over the weights; a model that is still in training has no equal."""
    path = checkpoint.path / WEIGHTS
    if not path.exists():
        return f"unsaved {time.time_ns()}"
    return file_digest(path)


def file_digest(path: Path) -> str:
    """16 hex digits over a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
