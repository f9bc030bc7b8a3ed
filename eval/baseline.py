"""The yardstick under a small model: bits per byte of an order-2 context model of bytes.

Each byte is predicted from the two before it. Counts come from the training split; the orders 2, 1, 0
and the uniform distribution are interpolated with Witten-Bell weights (Witten and Bell 1991, method
C of PPM): after a context seen n times with t different successors, a byte seen c times gets
(c + t p) / (n + t), p being its probability one order lower. A model that has learnt no more than
which letters follow which does not beat it.

    python eval/baseline.py run=outputs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import hydra
import numpy as np
import yaml
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path
from data.shards import TokenShards
from data.stages import MIXTURE
from data.tokenizer import load_tokenizer

ENOUGH = 1 << 26  # bytes of training text; 64 MiB fill the counts of two bytes' contexts
END = b"\0"  # closes a document and is predicted like any byte, as a model predicts end-of-text


class ContextModel:
    """Order-2 counts of training documents, and code lengths under them."""

    def __init__(self, training: Iterable[bytes]):
        counts = np.zeros(1 << 24, np.int64)
        for document in training:
            np.add.at(counts, _contexts(document), 1)
        abc = counts.reshape(256, 256, 256)  # [a, b, c]: how often c follows a, b
        self.orders = [
            # counts, and for each context its occurrences n and different successors t
            (table, table.sum(-1), np.count_nonzero(table, axis=-1))
            for table in (abc.sum((0, 1)), abc.sum(0), abc)
        ]

    def bits(self, document: bytes) -> float:
        """Length of the document's code, its end included."""
        contexts = _contexts(document)
        a, b, c = contexts >> 16, contexts >> 8 & 255, contexts & 255
        p = np.full(len(contexts), 1 / 256)
        for (counts, n, t), context in zip(self.orders, ((), (b,), (a, b)), strict=True):
            seen, different = n[context], t[context]
            mixed = (counts[*context, c] + different * p) / np.maximum(seen + different, 1)
            p = np.where(seen > 0, mixed, p)
        return float(-np.log2(p).sum())


@dataclass(frozen=True)
class RunSettings:
    """conf/baseline.yaml"""

    run: str


def bits_per_byte(training: Iterable[bytes], validation: Iterable[bytes]) -> float:
    """Bits per byte of the validation documents' text, after the training documents."""
    model, total, size = ContextModel(training), 0.0, 0
    for document in validation:
        total += model.bits(document)
        size += len(document)
    return total / size


def run_config(folder: Path) -> dict:
    """The config of a run. Raises FileNotFoundError with one sentence if the folder is none."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has no config.yaml; runs are in outputs/."
        )
    return yaml.safe_load(file.read_text()) or {}


def run_baseline(folder: Path) -> dict:
    """The yardstick on a run's data, from <folder>/eval/baseline.json or else measured into it.

    Raises FileNotFoundError or ValueError with one sentence if there is no such run or data.
    """
    data_path = Path(run_config(folder).get("data_path") or "nowhere")
    file = folder / "eval" / "baseline.json"
    if file.is_file():
        known = json.loads(file.read_text())
        if known["data_path"] == str(data_path):
            return known
    if not data_path.is_dir():
        raise FileNotFoundError(
            f"{folder}: the run's prepared data is not at {data_path} any more."
        )
    result = {
        "order": 2,
        "bits_per_byte": bits_per_byte(
            _training_texts(data_path), _texts(data_path / "validation", data_path)
        ),
        "data_path": str(data_path),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1))
    return result


def _contexts(document: bytes) -> np.ndarray:
    """(a, b, c) as a 24-bit number for every byte c and the two before it; int64 [n + 1]."""
    x = np.frombuffer(END + END + document + END, np.uint8).astype(np.int64)
    return x[:-2] << 16 | x[1:-1] << 8 | x[2:]


def _training_texts(data_path: Path) -> Iterator[bytes]:
    """ENOUGH bytes of the training documents; of a mixture, as much of each source with text."""
    if not (data_path / MIXTURE).exists():
        yield from _texts(data_path / "train", data_path, ENOUGH)
        return
    sources = json.loads((data_path / MIXTURE).read_text())["sources"].values()
    folders = [data_path.parent / s["folder"] / "train" for s in sources if "folder" in s]
    for folder in folders:
        yield from _texts(folder, data_path, ENOUGH / len(folders))


def _texts(folder: Path, data_path: Path, limit: float = float("inf")) -> Iterator[bytes]:
    """The documents of a split as bytes, until `limit` bytes have come."""
    shards = TokenShards.open(folder)
    tokenizer = load_tokenizer(data_path / "tokenizer.json")
    for i in range(shards.num_documents):
        text = tokenizer.decode(shards.document(i)[1:].tolist(), skip_special_tokens=False).encode()
        yield text
        limit -= len(text)
        if limit <= 0:
            return


@hydra.main(version_base=None, config_path="../conf", config_name="baseline")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(RunSettings, config)
        result = run_baseline(resolve_path(settings.run))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"baseline    order-2 model of bytes: {result['bits_per_byte']:.3f} bits per byte")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
