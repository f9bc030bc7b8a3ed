"""Tokenising by parallel workers, in parts that are kept: killed at any moment, nothing is lost.

The documents are dealt out in chunks of about CHUNK characters. A worker turns a chunk into a part, a
file that gets its name when it is whole. Where chunks end follows from the documents alone, so that
a later call makes the very parts that are missing; it reads on where the last of them ends.
"""

import json
import os
import signal
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.corpus import Document
from data.duplicates import bands
from data.tokenizer import Encoder

CHUNK = 1 << 22  # characters, and the longest document more
_worker: dict = {}


class Part(NamedTuple):
    """Documents of a stretch of the corpus, tokenised.

    tokens     uint32, one document after another, end-of-text first in each
    lengths    int64 [N], in tokens
    num_bytes  int64 [N], in UTF-8
    hashes     uint64 [N]
    held_out   bool [N]
    bands      uint64 [N, BANDS], or [N, 0] when near duplicates stay
    position   where reading goes on behind it
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    held_out: np.ndarray
    bands: np.ndarray
    position: list | dict


def make_parts(
    read: Callable[..., Iterator[Document]], encoder: Encoder, with_bands: bool, folder: Path
) -> Iterator[Part]:
    """The parts of a corpus in order: those in `folder` first, then those yet to be made.

    Args:
        read: the documents behind a position (data.corpus.Corpus.documents).
        folder: is created; belongs to one caller at a time.
    """
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob("*.partial"):
        unfinished.unlink()
    number, position = 0, None
    while (part := _open(_path(folder, number))) is not None:
        yield part
        number, position = number + 1, part.position

    # Forked, for a spawned worker would import the caller's main module, torch and all.
    workers = ProcessPoolExecutor(
        num_workers(), get_context("fork"), _start_worker, (encoder, with_bands, os.getpid())
    )
    waiting: deque = deque()
    try:
        for chunk in _chunks(read(position)):
            path, number = _path(folder, number), number + 1
            task = None if _open(path) else workers.submit(_make_part, chunk, path)
            waiting.append((path, task))
            if len(waiting) > 2 * num_workers():
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool:
        raise OSError(
            "a worker was killed, most likely for want of memory; the same command goes on from "
            "here, with fewer workers under `taskset -c 0-3`, say"
        ) from None
    finally:
        workers.shutdown(cancel_futures=True)


def num_workers() -> int:
    """One for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _open(path: Path) -> Part | None:
    """A finished part; None for one that isn't there, or (a disk may do that) isn't as written."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # checks a CRC of each
            position = json.loads(arrays["position"].tobytes())
            return Part(*(arrays[name] for name in Part._fields[:-1]), position)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        path.unlink()
        return None


def _finished(path: Path, task) -> Part:
    if task is not None:
        task.result()
    return _open(path)


def _start_worker(encoder: Encoder, with_bands: bool, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(encode=encoder, with_bands=with_bands)

    def follow_parent() -> None:
        while os.getppid() == parent:  # one that is killed can't tell its workers
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _make_part(chunk: list[Document], path: Path) -> None:
    tokens = [_worker["encode"](document.text) for document in chunk]
    part = Part(
        np.concatenate(tokens),
        np.array([len(document) for document in tokens]),
        np.array([len(document.text.encode()) for document in chunk]),
        np.array([document.hash for document in chunk], np.uint64),
        np.array([document.held_out for document in chunk]),
        np.array(
            [bands(document.text) if _worker["with_bands"] else [] for document in chunk], np.uint64
        ),
        np.frombuffer(json.dumps(chunk[-1].position).encode(), np.uint8),
    )
    partial = path.with_suffix(f".{os.getpid()}.partial")  # a worker whose parent died may linger
    with open(partial, "wb") as file:
        np.savez(file, **part._asdict())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
