"""Associative recall by distance (MQAR, arXiv 2312.04927): a key seen again, what followed it before?

    python eval/recall.py checkpoint=outputs/quickstart length=2048 pairs=32 samples=16

Each sample is a sequence of random tokens in which `pairs` key tokens, each followed by a value token
of its own, occur twice; at the second occurrence the value must be the likeliest next token. Keys,
values and the tokens between are disjoint, so nothing but the first occurrence tells the value. The
distance between the two is drawn log-uniformly from 2 to half the length.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import csv
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import hydra
import torch
from omegaconf import DictConfig

from data.config import command_line, from_config
from data.tokenizer import end_of_text_id, vocab_size
from eval.accuracy import best_layer, summarize
from eval.entry import open_checkpoint, stoppable
from eval.lm import BATCH_TOKENS, DecoderLM, LanguageModel
from eval.publish import publish
from eval.records import Records, run_folder, weights_digest
from model.checkpoint import Checkpoint
from model.probe import BlockRecall

VERSION = 2  # raise it when the same settings give other samples or other scores


@dataclass(frozen=True)
class RecallSettings:
    """conf/recall.yaml"""

    length: int
    pairs: int
    samples: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("pairs", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1.")
        if self.length < 16 * self.pairs:
            raise ValueError(
                f"pairs={self.pairs} need length={16 * self.pairs} or more, not {self.length}."
            )


def make_sequence(
    settings: RecallSettings, vocabulary: int, end: int, index: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens, end-of-text first, and for each pair (place of the second key, distance to the first).

    Raises ValueError if the vocabulary is too small to keep keys, values and the rest apart.
    """
    rng = random.Random(f"{settings.seed}/{settings.length}/{settings.pairs}/{index}")
    tokens = [t for t in range(vocabulary) if t != end]
    if len(tokens) < 4 * settings.pairs:
        raise ValueError(
            f"pairs={settings.pairs} need a vocabulary of {4 * settings.pairs} tokens; this "
            f"tokenizer has {vocabulary}."
        )
    rng.shuffle(tokens)
    keys, values = tokens[: settings.pairs], tokens[settings.pairs : 2 * settings.pairs]
    rest = tokens[2 * settings.pairs :]
    sequence = [end] + [-1] * (settings.length - 1)
    queries = []
    for key, value in zip(keys, values, strict=True):
        while True:
            distance = round(2 * (settings.length / 4) ** rng.random())
            first = rng.randrange(1, settings.length - 1 - distance)
            second = first + distance
            if all(sequence[i] == -1 for i in (first, first + 1, second, second + 1)):
                break
        sequence[first : first + 2] = sequence[second : second + 2] = [key, value]
        queries.append((second, distance))
    return [rng.choice(rest) if t == -1 else t for t in sequence], queries


def measure(
    lm: LanguageModel, settings: RecallSettings, vocabulary: int, end: int, records: Records
) -> list[dict]:
    """A row for each bucket of distances, [distance, 2 distance): pairs, accuracy with interval,
    and the value's mean log-probability in nats.

    With NSA also, by layer, the share of key/value heads whose selection holds the block with the
    value's first occurrence (selected/layer_00, …), and what drawing blocks would give.
    """

    def score(part: list[dict]) -> Iterator[dict]:
        made = [make_sequence(settings, vocabulary, end, key["index"]) for key in part]
        pairs = torch.tensor([
            (i * settings.length + place, i * settings.length + place - distance + 1)
            for i, (_, queries) in enumerate(made) for place, distance in queries
        ])  # fmt: skip
        with BlockRecall(*pairs.T) as probe:  # of one forward pass: a part is one batch
            found = lm.logprobs([sequence for sequence, _ in made])
        for i, ((_, queries), (logprobs, greedy)) in enumerate(zip(made, found, strict=True)):
            places = [place for place, _ in queries]  # log-probability i is of token i + 1
            own = slice(i * settings.pairs, (i + 1) * settings.pairs)
            yield {
                "distances": [distance for _, distance in queries],
                "right": greedy[places].tolist(),
                "logprobs": [round(float(x), 4) for x in logprobs[places]],
                "selected": {name: share[own].tolist() for name, share in probe.shares().items()},
            }

    wanted = [{"index": index} for index in range(settings.samples)]
    samples = records.fill(wanted, max(1, BATCH_TOKENS // settings.length), score)
    pairs = [
        {"distance": 1 << (distance.bit_length() - 1), "accuracy": right, "logprob": logprob}
        | {name: shares[i] for name, shares in sample["selected"].items()}
        for sample in samples
        for i, (distance, right, logprob) in enumerate(
            zip(sample["distances"], sample["right"], sample["logprobs"], strict=True)
        )
    ]
    pairs.sort(key=lambda pair: pair["distance"])
    rows = summarize(pairs, "distance", scores=("accuracy",))
    for row in rows:
        own = [pair["logprob"] for pair in pairs if pair["distance"] == row["distance"]]
        row["logprob"] = round(statistics.fmean(own), 4)
    return rows


def run_recall(checkpoint: Checkpoint, settings: RecallSettings) -> dict:
    """Measure a checkpoint; writes eval/recall/<checkpoint name>.json and .csv in its run's folder."""
    end, vocabulary = end_of_text_id(checkpoint.tokenizer), vocab_size(checkpoint.tokenizer)
    stem = run_folder(checkpoint) / "eval" / "recall" / checkpoint.path.name
    identity = asdict(settings) | {"version": VERSION, "weights": weights_digest(checkpoint)}
    del identity["samples"]
    records = Records(stem.with_suffix(".json"), ("index",), identity)
    rows = measure(DecoderLM(checkpoint.model, {end}), settings, vocabulary, end, records)
    head = {"step": checkpoint.step, "settings": asdict(settings)}
    results = records.write(head | {"by_distance": rows})
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return results


def table(results: dict) -> str:
    """For a terminal. Of the layers, the one whose selection holds the true block most often."""
    rows = results["by_distance"]
    sparse = "selected/chance" in rows[0]
    lines = [f"{'distance from':>14}{'pairs':>8}{'accuracy':>10}   {'95 % interval':<16}nats"]
    lines[0] += "   block selected (chance)" if sparse else ""
    for row in rows:
        lines.append(
            f"{row['distance']:>14,}{row['samples']:>8}{row['accuracy']:>10.0%}   "
            f"[{row['accuracy_low']:>4.0%} –{row['accuracy_high']:>5.0%}]  {row['logprob']:>7.2f}"
        )
        if sparse:
            lines[-1] += f"{best_layer(row):>18.0%} ({row['selected/chance']:.0%})"
    return "\n".join(lines)


@hydra.main(version_base=None, config_path="../conf", config_name="recall")
def main(config: DictConfig) -> None:
    try:
        checkpoint, config = open_checkpoint(config)
        settings = from_config(RecallSettings, config)
        print(f"recall      {checkpoint.path}")
        results = run_recall(checkpoint, settings)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(table(results))
    rows = results["by_distance"]
    metrics = {f"recall/{row['distance']}": row["accuracy"] for row in rows}
    if "selected/chance" in rows[0]:
        metrics |= {f"recall/{row['distance']}/selected": best_layer(row) for row in rows}
    publish(checkpoint, "recall", metrics)
    print(
        f"files       {run_folder(checkpoint) / 'eval' / 'recall' / checkpoint.path.name}.json, .csv"
    )


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    with stoppable("the same command goes on from here"):
        main()
