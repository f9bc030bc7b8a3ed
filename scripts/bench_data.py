"""How fast data comes: raw text to tokens, and token shards to batches.

    python scripts/bench_data.py

Raw text is the repository's novels and Python's standard library, tokenised by one process with a
vocabulary of 32,768; shards hold 30M tokens in documents of all lengths and are read as a run reads
them, with batches made ahead by a thread.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import os
import tempfile
import time

import numpy as np

from data.config import ROOT
from data.loader import PackedLoader
from data.mixture import MixedLoader
from data.prefetch import prefetch
from data.shards import ShardWriter
from data.tokenizer import Encoder, train_tokenizer

VOCAB = 32_768


def texts() -> dict[str, list[str]]:
    novels = [path.read_text() for path in sorted((ROOT / "data/austen").glob("*.txt"))]
    library = Path(os.__file__).parent
    modules = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts]
    return {"prose": novels, "code": [path.read_text(errors="replace") for path in modules]}


def bench_text() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as each worker has
    for kind, documents in texts().items():
        encode = Encoder(train_tokenizer(documents, VOCAB))
        num_bytes = sum(len(document.encode()) for document in documents)
        started, busy = time.perf_counter(), time.process_time()
        tokens = sum(len(encode(document)) for document in documents)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        print(
            f"text to tokens, {kind}: {num_bytes / busy / 1e6:.1f} MB/s a core, "
            f"{tokens / busy / 1e6:.2f} M tokens/s ({num_bytes / 1e6:.1f} MB in {seconds:.1f} s)"
        )


def bench_shards() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        shards = []
        for name in ("a", "b"):
            writer = ShardWriter(Path(folder) / name, VOCAB, 0, "none")
            while writer.num_tokens < 30e6:
                length = int(rng.lognormal(7, 1.5)) + 2
                writer.add(np.concatenate([[0], rng.integers(1, VOCAB, length)]), 4 * length)
            shards.append(writer.close())
        for seq_len in (2048, 8192, 65536):
            loaders = {i: PackedLoader(s, seq_len, 0, 0) for i, s in zip("ab", shards, strict=True)}
            for kind, loader in (
                ("one source", loaders["a"]),
                ("a mixture", MixedLoader(loaders, {"a": 2, "b": 1})),
            ):
                count, steps = max(1, 65536 // seq_len), 200
                batches = prefetch(loader.batch(i * count, count) for i in range(steps + 1))
                next(batches)
                started = time.perf_counter()
                tokens = sum(len(batch.tokens) for batch in batches)
                rate = tokens / (time.perf_counter() - started)
                print(f"shards to batches, {kind}, {seq_len:,}: {rate / 1e6:.0f} M tokens/s")


if __name__ == "__main__":
    bench_text()
    bench_shards()
