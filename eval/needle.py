"""Needle in a haystack: can the model find one sentence, or several, in a long text?

    python eval/needle.py checkpoint=outputs/quickstart lengths=[512,1024,2048] depths=5 samples=8

A sentence that gives a magic number (or word) to a key is put into held-out text between two
sentences, and the prompt ends by asking for it (Kamradt 2023; RULER, arXiv 2404.06654); the tasks
multi_key, multi_value and multi_query hide several. Scored twice: by greedy generation, where the
value must occur in the answer, and by ranking the value among others of its kind by
log-probability, where a model too small to answer freely still shows what it knows. Of several
values asked for, the share that is found counts. Prompt and answer together are exactly as long as
stated.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import csv
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import hydra
import torch
import yaml
from omegaconf import DictConfig
from tokenizers import Tokenizer

from data.config import ROOT, command_line, from_config
from data.tokenizer import end_of_text_id
from eval.accuracy import SCORES, best_layer, show, summarize
from eval.entry import open_checkpoint, stoppable
from eval.haystack import Haystack
from eval.heatmap import save_heatmap
from eval.lm import BATCH_TOKENS, DecoderLM, LanguageModel
from eval.needle_samples import NeedleSettings, Sample, check_lengths, make_sample
from eval.publish import publish
from eval.records import Records, run_folder, weights_digest
from model.checkpoint import Checkpoint
from model.probe import BlockRecall

VERSION = 3  # raise it when the same settings give other samples or other scores
KEYS = ("task", "length", "depth", "index")


def score_samples(
    lm: LanguageModel, tokenizer: Tokenizer, samples: list[Sample], max_new_tokens: int
) -> Iterator[dict]:
    """Each sample's record: found by generation, ranked by log-probability.

    With NSA also, by layer, the share of key/value heads that select the blocks where the values
    stand for the prompt's last token, and what drawing blocks would give. The prompts are one batch.
    """
    prompts = [sample.prompt for sample in samples]
    continuations = [
        [tokenizer.encode(" " + c, add_special_tokens=False).ids for c in sample.candidates]
        for sample in samples
    ]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0)
    places = [value_places(tokenizer, sample) for sample in samples]
    pairs = [
        (end - 1, end - len(prompt) + place)
        for end, prompt, own in zip(ends.tolist(), prompts, places, strict=True)
        for place in own
    ]
    with BlockRecall(*torch.tensor(pairs).T) as probe:
        scores = lm.score(prompts, continuations)
    counts = [len(own) for own in places]
    selected = {name: share.cpu().split(counts) for name, share in probe.shares().items()}
    generated = lm.generate(prompts, max_new_tokens)
    for i, (sample, logprobs, tokens) in enumerate(zip(samples, scores, generated, strict=True)):
        if not all(map(math.isfinite, logprobs)):
            raise ValueError(f"The model's log-probabilities are not finite: {logprobs}.")
        text = tokenizer.decode(tokens)
        values = [sample.candidates[place] for place in sample.answers]
        best = sorted(range(len(logprobs)), key=logprobs.__getitem__, reverse=True)[: len(values)]
        yield {
            "generation": sum(v.lower() in text.lower() for v in values) / len(values),
            "ranking": len(set(best) & set(sample.answers)) / len(values),
            "values": values,
            "generated": text,
            "candidates": sample.candidates,
            "logprobs": [round(x, 4) for x in logprobs],
            "needles": sample.needles,
            "question": sample.question,
            "positions": sample.positions,
            "prompt_tokens": len(sample.prompt),
            **{name: round(float(shares[i].mean()), 4) for name, shares in selected.items()},
        }


def value_places(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """Where in the prompt the values that are asked for begin."""
    places = []
    for needle, start in zip(sample.needles, sample.positions, strict=True):
        offsets = tokenizer.encode(" " + needle, add_special_tokens=False).offsets
        for value in (sample.candidates[i] for i in sample.answers):
            if found := re.search(rf"\b{re.escape(value)}\b", " " + needle):
                at = found.start()
                places.append(start + next(i for i, (_, end) in enumerate(offsets) if end > at))
    return places


def measure(
    lm: LanguageModel, tokenizer: Tokenizer, haystack: Haystack, settings: NeedleSettings,
    task: str, length: int, records: Records,
) -> list[dict]:  # fmt: skip
    """The records of one task and length, all depths and samples."""

    def score(part: list[dict]) -> Iterator[dict]:
        samples = [make_sample(haystack, tokenizer, settings, **key) for key in part]
        return score_samples(lm, tokenizer, samples, settings.answer_tokens(task))

    wanted = [
        {"task": task, "length": length, "depth": depth, "index": index}
        for depth in settings.depth_percents
        for index in range(settings.samples)
    ]
    return records.fill(wanted, max(1, BATCH_TOKENS // length), score)


# ---------------------------------------------------------------------------------------------------
# The grid, on files


def open_haystack(checkpoint: Checkpoint, settings: NeedleSettings) -> Haystack:
    """The text of the grid. Raises ValueError or FileNotFoundError, with one sentence, if there is
    none or a length has no room in it for needles and question."""
    haystack = Haystack.find(checkpoint, settings.haystack, max(settings.lengths))
    check_lengths(haystack, checkpoint.tokenizer, settings)
    return haystack


def run_needle(
    checkpoint: Checkpoint, settings: NeedleSettings, folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Measure a checkpoint and write <folder>/<checkpoint name>.json, .csv and .png.

    Samples that the JSON holds already are not measured again if weights, text and settings are the
    same; more tasks, lengths, depths or samples extend it. folder defaults to eval/needle in the
    run's folder. Returns what the JSON holds. Raises ValueError or FileNotFoundError with one
    sentence, for what can be known beforehand before anything is written.
    """
    tokenizer, longest = checkpoint.tokenizer, max(settings.lengths)
    haystack = open_haystack(checkpoint, settings)
    if haystack.size < longest:
        say(f"The haystack has {haystack.size:,} tokens and is repeated to fill {longest:,}.")
    grid = ("tasks", "lengths", "depths", "samples", "during")
    identity = {k: v for k, v in asdict(settings).items() if k not in grid} | {
        "version": VERSION,
        "weights": weights_digest(checkpoint),
        "haystack_fingerprint": haystack.fingerprint,
    }
    folder = folder or run_folder(checkpoint) / "eval" / "needle"
    stem = folder / checkpoint.path.name
    on_disk = Records(stem.with_suffix(".json"), KEYS, identity)
    longest_answer = max(map(settings.answer_tokens, settings.tasks))
    lm = DecoderLM(checkpoint.model, {end_of_text_id(tokenizer)}, reserve=max(64, longest_answer))
    records: list[dict] = []
    started = time.perf_counter()
    for task in settings.tasks:
        for length in settings.lengths:
            records += measure(lm, tokenizer, haystack, settings, task, length, on_disk)
            row = summarize(records, "task", "length")[-1]
            say(
                f"{task}, length {length:,}: generation {row['generation']:.0%}, ranking "
                f"{row['ranking']:.0%}, {time.perf_counter() - started:.0f} s"
            )
    results = on_disk.write({
        "step": checkpoint.step,
        "settings": asdict(settings),
        "chance": {task: settings.chance(task) for task in settings.tasks},
        "by_length": summarize(records, "task", "length"),
        "by_depth": summarize(records, "task", "depth"),
        "cells": summarize(records, "task", "length", "depth"),
    })  # fmt: skip
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, results["cells"][0])
        writer.writeheader()
        writer.writerows(results["cells"])
    save_heatmap(results, stem.with_suffix(".png"))
    return results


def table(results: dict) -> str:
    """Accuracy by length and by depth, for a terminal."""
    lines = []
    for task, chance in results["chance"].items():
        ranking = f"ranking (chance {100 * chance:.3g} %)"
        by_length, by_depth = (
            [row for row in results[by] if row["task"] == task] for by in ("by_length", "by_depth")
        )
        lines += [
            f"{task:<11} {'samples':>5}  {'generation':<21}{ranking}",
            "  length",
            *show(by_length, "length"),
            "   depth",
            *show(by_depth, "depth", "{:g} %"),
        ]
        if "selected/chance" in by_length[0]:
            shares = (
                f"{row['length']:,}: {best_layer(row):.0%} ({row['selected/chance']:.0%})"
                for row in by_length
            )
            lines.append(
                f"   value's block selected in the best layer (chance)  {', '.join(shares)}"
            )
    return "\n".join(lines)


def metrics(results: dict) -> dict[str, float]:
    """Accuracy by task and length under flat names, as curves are kept; `selected` is the share of
    heads that select the value's block in the layer where most do."""
    found = {}
    for row in results["by_length"]:
        scores = {score: row[score] for score in SCORES}
        if "selected/chance" in row:
            scores["selected"] = best_layer(row)
        found |= {f"needle/{row['task']}/{row['length']}/{s}": x for s, x in scores.items()}
    return found


@hydra.main(version_base=None, config_path="../conf", config_name="needle")
def main(config: DictConfig) -> None:
    try:
        checkpoint, config = open_checkpoint(config)
        asked = {key: value for key, value in config.items() if value is not None}
        recipe = yaml.safe_load((ROOT / "conf" / "eval" / "needle.yaml").read_text())
        recipe |= checkpoint.config.get("eval", {})  # an imported model has none
        settings = from_config(NeedleSettings, recipe | asked)
        print(f"needle      {checkpoint.path}")
        trained = checkpoint.config.get("train", {}).get("seq_len")  # unknown of an imported model
        if trained and trained < max(settings.lengths):
            print(
                f"Trained on sequences of {trained:,} tokens, asked at {max(settings.lengths):,}."
            )
        results = run_needle(checkpoint, settings)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(table(results))
    stem = run_folder(checkpoint) / "eval" / "needle" / checkpoint.path.name
    publish(checkpoint, "needle", metrics(results), stem.with_suffix(".png"))
    print(f"files       {stem}.json, .csv, .png")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    with stoppable("the same command goes on from here"):
        main()
