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

    The file holds finished results and changes only when the next ones are finished; until then new
    samples lie beside it, in a file that ends in .unfinished. Those that either holds already are
    taken over if they were measured under the same `identity`: weights, text, settings, version of
    the evaluator. Nothing is written before something was measured.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], identity: dict):
        self.path, self.keys, self.identity = path, keys, json.loads(json.dumps(identity))
        self.unfinished = path.with_suffix(".unfinished")
        self.known = self._samples(path) | self._samples(self.unfinished)
        self._written, self._on_disk = time.perf_counter(), len(self.known)

    def key(self, record: dict) -> tuple:
        return tuple(record[k] for k in self.keys)

    def _samples(self, path: Path) -> dict[tuple, dict]:
        """What a file holds of this identity."""
        try:
            held = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        same = held.get("identity") == self.identity
        return {self.key(record): record for record in held["samples"]} if same else {}

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
                    self._keep()
        except BaseException:  # an interrupt too
            self._keep()
            raise
        return [self.known[self.key(w)] for w in wanted]

    def write(self, results: dict) -> dict:
        """Write finished results beside the samples, all there are; returns what the file holds."""
        written = self._replace(self.path, results)
        if self._samples(self.unfinished):  # and not those of other settings, to be gone on with
            self.unfinished.unlink()
        return written

    def _keep(self) -> None:
        """Write the samples, if there are new ones."""
        if len(self.known) > self._on_disk:
            self._replace(self.unfinished, {})

    def _replace(self, path: Path, results: dict) -> dict:
        results = results | {"identity": self.identity, "samples": list(self.known.values())}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        os.replace(partial, path)
        self._written, self._on_disk = time.perf_counter(), len(self.known)
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
