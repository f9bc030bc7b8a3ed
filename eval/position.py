"""Perplexity by position: what does a long context do for the next token?

    python eval/position.py checkpoint=outputs/quickstart length=2048

Reads whole windows of long held-out documents and reports the loss of tokens by their position, and
the loss of each window's last tokens when only so many tokens before them are shown. A model that
uses its context falls in both; the second compares the very same tokens, so it falls for no other
reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import csv
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import hydra
import numpy as np
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path
from data.tokenizer import encode_documents, end_of_text_id, token_bytes
from eval.entry import open_checkpoint, stoppable
from eval.haystack import held_out_documents, read_text
from eval.lm import DecoderLM, LanguageModel
from eval.publish import publish
from eval.records import run_folder
from model.checkpoint import Checkpoint

SHORTEST = 16  # tokens of context, the first point of the second curve


@dataclass(frozen=True)
class PositionSettings:
    """conf/position.yaml"""

    length: int
    windows: int
    targets: int
    haystack: str | None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows={self.windows}; it must be at least 1.")
        if not 1 <= self.targets <= self.length - SHORTEST:
            raise ValueError(
                f"targets={self.targets}: of a window of length={self.length} tokens, 1 to "
                f"{self.length - SHORTEST} can be targets."
            )


def cut_windows(
    documents: Iterator[np.ndarray], length: int, count: int, end: int
) -> list[list[int]]:
    """The first `count` windows of `length` tokens, end-of-text in front, of documents that long.

    documents: token numbers without end-of-text. Raises ValueError if there is no window.
    """
    found, longest = [], 0
    for document in documents:
        longest = max(longest, len(document))
        for start in range(0, len(document) - length + 2, length - 1):
            found.append([end, *document[start : start + length - 1].tolist()])
            if len(found) == count:
                return found
    if not found:
        raise ValueError(
            f"No held-out document has length={length} tokens; the longest has {longest + 1}: take a "
            "shorter length, or a long text of your own with haystack=file.txt"
        )
    return found


def measure(lm: LanguageModel, windows: list[list[int]], targets: int, sizes: np.ndarray) -> dict:
    """Losses in nats per token of equally long windows.

    sizes int64 [vocab] counts each token's bytes. Returns by_position (rows of position, the
    bucket's first, tokens, loss, perplexity), by_context (context, tokens, loss, perplexity: of the
    last `targets` tokens with `context` tokens before the first of them) and bits_per_byte.
    """
    length = len(windows[0])
    losses = np.stack([-logprobs for logprobs, _ in lm.logprobs(windows)]).astype(np.float64)
    num_bytes = sum(int(sizes[window[1:]].sum()) for window in windows)
    by_position = []
    for low in powers(1, length):
        # Position p has p tokens before it; the first token of a window is no target.
        part = losses[:, low - 1 : 2 * low - 1]
        by_position.append(_row("position", low, part))
    by_context = []
    for context in [*powers(SHORTEST, length - targets), length - targets]:
        shown = [[window[0], *window[length - targets - context + 1 :]] for window in windows]
        parts = [-logprobs[-targets:] for logprobs, _ in lm.logprobs(shown)]
        by_context.append(_row("context", context, np.stack(parts).astype(np.float64)))
    return {
        "by_position": by_position,
        "by_context": by_context,
        "loss": float(losses.mean()),
        "bits_per_byte": float(losses.sum() / math.log(2) / num_bytes),
    }


def powers(low: int, below: int) -> Iterator[int]:
    """low, 2 low, 4 low, … below a limit."""
    return itertools.takewhile(lambda n: n < below, (low << i for i in itertools.count()))


def _row(key: str, value: int, losses: np.ndarray) -> dict:
    loss = float(losses.mean())
    return {key: value, "tokens": losses.size, "loss": round(loss, 5),
            "perplexity": round(math.exp(min(loss, 700)), 3)}  # fmt: skip


def run_position(checkpoint: Checkpoint, settings: PositionSettings) -> dict:
    """Measure a checkpoint; writes eval/position/<checkpoint name>.json and .csv in its run's folder.

    Raises ValueError or FileNotFoundError with one sentence.
    """
    tokenizer = checkpoint.tokenizer
    end = end_of_text_id(tokenizer)
    if settings.haystack:
        texts = encode_documents(tokenizer, [read_text(resolve_path(settings.haystack))])
        documents = (tokens[1:] for tokens, _ in texts)
    else:
        documents = held_out_documents(checkpoint)
    windows = cut_windows(documents, settings.length, settings.windows, end)
    lm = DecoderLM(checkpoint.model, {end})
    results = {"step": checkpoint.step, "settings": asdict(settings), "windows": len(windows)}
    results |= measure(lm, windows, settings.targets, token_bytes(tokenizer))
    stem = run_folder(checkpoint) / "eval" / "position" / checkpoint.path.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1))
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        for curve in ("by_position", "by_context"):
            rows = results[curve]
            writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return results


def table(results: dict) -> str:
    """Both curves, for a terminal."""
    lines = [f"{'position from':>14}{'tokens':>12}{'loss':>9}{'perplexity':>12}"]
    for key in ("position", "context"):
        if key == "context":
            lines.append(
                f"{'context':>14}  of the last {results['settings']['targets']} tokens alone"
            )
        lines += [
            f"{row[key]:>14,}{row['tokens']:>12,}{row['loss']:>9.3f}{row['perplexity']:>12,.1f}"
            for row in results[f"by_{key}"]
        ]
    return "\n".join([*lines, f"{results['bits_per_byte']:.4f} bits per byte"])


@hydra.main(version_base=None, config_path="../conf", config_name="position")
def main(config: DictConfig) -> None:
    try:
        checkpoint, config = open_checkpoint(config)
        settings = from_config(PositionSettings, config)
        print(f"position    {checkpoint.path}")
        results = run_position(checkpoint, settings)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(table(results))
    numbers = {
        f"loss/{k}/{r[k]}": r["loss"] for k in ("position", "context") for r in results[f"by_{k}"]
    }
    publish(checkpoint, "position", numbers | {"long/bpb": results["bits_per_byte"]})
    print(
        f"files       {run_folder(checkpoint) / 'eval' / 'position' / checkpoint.path.name}.json, .csv"
    )


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    with stoppable("the same command begins again"):
        main()
