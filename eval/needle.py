"""Needle in a haystack: can the model find one sentence in a long text?

    python eval/needle.py checkpoint=outputs/quickstart lengths=[512,1024,2048] depths=5 samples=8

A sentence that gives a magic number (or word) to a key is put into held-out text between two
sentences, and the prompt ends by asking for it (Kamradt 2023; RULER, arXiv 2404.06654). Scored twice:
by greedy generation, where the value must occur in the answer, and by ranking the value among
others of its kind by log-probability, where a model too small to answer freely still shows what it
knows. Prompt and answer together are exactly as long as stated.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import csv
import hashlib
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer

from data.config import command_line, from_config, resolve_path
from data.tokenizer import end_of_text_id
from eval.accuracy import show, summarize
from eval.haystack import Haystack
from eval.heatmap import save_heatmap
from eval.lm import DecoderLM, LanguageModel
from model.checkpoint import WEIGHTS, Checkpoint, load_checkpoint

VERSION = 1  # raise it when the same settings give other samples or other scores
# What is hidden, and the end of the prompt, which the value completes.
TEMPLATES = (
    (
        "One of the special magic {kind}s for {key} is: {value}.",
        "What is the special magic {kind} for {key} mentioned in the text above? "
        "One of the special magic {kind}s for {key} is:",
    ),
    (
        "The secret {kind} of the {key} is {value}.",
        "The text above gives a secret {kind} of the {key}. The secret {kind} of the {key} is",
    ),
    (
        "Remember that the {key} was given the {kind} {value}.",
        "What does the text above say about the {key}? "
        "Remember that the {key} was given the {kind}",
    ),
)
WORDS = (
    "anchor apricot badger barley basket beacon blanket button cabbage camel candle canyon carpet "
    "castle cedar cherry cobbler copper cotton crystal dagger daisy dolphin donkey dragon engine "
    "falcon feather fiddle flannel forest fossil furnace garlic ginger glacier goblet granite hammer "
    "harbour hazel helmet honey island ivory jacket jungle kettle kitten ladder lantern lemon lizard "
    "magnet marble meadow mirror monkey mustard needle nettle nutmeg oyster paddle panther parsley "
    "pebble pepper pigeon pillow planet pumpkin rabbit raven ribbon saddle salmon scarlet shovel "
    "silver sparrow spider squirrel tiger timber tulip turnip tunnel turtle velvet violin walnut "
    "weasel willow wizard zebra"
).split()  # fmt: skip


@dataclass(frozen=True)
class NeedleSettings:
    """conf/eval/needle.yaml"""

    lengths: list[int]
    depths: int
    samples: int
    values: Literal["numbers", "words"]
    candidates: int
    max_new_tokens: int
    seed: int
    haystack: str | None

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1.")
        if not self.lengths or not all(isinstance(n, int) for n in self.lengths):
            raise ValueError(f"lengths={self.lengths}; give token counts, such as [512,1024].")
        if not 2 <= self.candidates <= len(WORDS) // 2:
            raise ValueError(
                f"candidates={self.candidates}; ranking needs 2 to {len(WORDS) // 2} values."
            )

    @property
    def depth_percents(self) -> list[float]:
        """Evenly from the start to the end of the haystack; a single depth is the middle."""
        if self.depths == 1:
            return [50.0]
        return [round(100 * i / (self.depths - 1), 2) for i in range(self.depths)]


# ---------------------------------------------------------------------------------------------------
# One sample: made, asked, scored


@dataclass(frozen=True)
class Sample:
    """One prompt and what would answer it. prompt + max_new_tokens is exactly the length."""

    prompt: list[int]
    position: int  # of the needle's first token in the prompt
    needle: str
    question: str
    candidates: list[str]
    answer: int  # the right one's place among the candidates


def make_sample(
    haystack: Haystack, tokenizer: Tokenizer, settings: NeedleSettings, length: int,
    depth: float, index: int,
) -> Sample:  # fmt: skip
    """The sample of these numbers, the same whatever else is in the grid.

    depth in percent. Raises ValueError when the length has no room for needle and question.
    """
    rng = random.Random(f"{settings.seed}/{length}/{depth}/{index}")
    start = int(rng.choice(haystack.starts))
    text = haystack.tokens[start : start + length].tolist()
    key, *candidates = _draw(rng, settings, tokenizer.decode(text).lower())
    answer = rng.randrange(len(candidates))
    statement, question = TEMPLATES[index % len(TEMPLATES)]
    names = {"key": key, "kind": settings.values.removesuffix("s")}
    needle = statement.format(value=candidates[answer], **names)
    question = question.format(**names)
    needle_ids = tokenizer.encode(" " + needle, add_special_tokens=False).ids
    question_ids = tokenizer.encode("\n\n" + question, add_special_tokens=False).ids
    room = length - settings.max_new_tokens - len(needle_ids) - len(question_ids) - 1
    if room < 1:
        raise ValueError(
            f"lengths: {length} tokens leave no room for text beside the needle, the question and "
            f"max_new_tokens={settings.max_new_tokens}; {length - room + 64} would be a start."
        )
    cut = haystack.cut(start, room, depth / 100)
    prompt = [end_of_text_id(tokenizer), *text[:cut], *needle_ids, *text[cut:room], *question_ids]
    return Sample(prompt, 1 + cut, needle, question, candidates, answer)


def _draw(rng: random.Random, settings: NeedleSettings, text: str) -> list[str]:
    """A key, and values all drawn alike: without the needle, none is likelier than another.

    None of them occurs in the text, which is in lower case.
    """
    words = iter(rng.sample(WORDS, len(WORDS)))
    numbers = (str(rng.randrange(10**6, 10**7)) for _ in itertools.count())
    values = numbers if settings.values == "numbers" else words
    drawn = [*_absent(words, text, 1), *_absent(values, text, settings.candidates)]
    if len(drawn) <= settings.candidates:
        raise ValueError(
            "The haystack holds nearly all of the words that needles are made of; take fewer "
            "candidates, another text or values=numbers."
        )
    return drawn


def _absent(source: Iterable[str], text: str, count: int) -> list[str]:
    """The first `count` different strings that the text does not hold."""
    found: dict[str, None] = {}
    for value in source:
        if value not in text:
            found[value] = None
        if len(found) == count:
            break
    return list(found)


def score_sample(lm: LanguageModel, tokenizer: Tokenizer, sample: Sample, max_new_tokens: int):
    """The sample's record: found by generation, ranked by log-probability."""
    value = sample.candidates[sample.answer]
    continuations = [
        tokenizer.encode(" " + c, add_special_tokens=False).ids for c in sample.candidates
    ]
    logprobs = lm.score(sample.prompt, continuations)
    if not all(map(math.isfinite, logprobs)):
        raise ValueError(f"The model's log-probabilities are not finite: {logprobs}.")
    [generated] = lm.generate([sample.prompt], max_new_tokens)
    text = tokenizer.decode(generated)
    return {
        "generation": value.lower() in text.lower(),
        "ranking": max(range(len(logprobs)), key=logprobs.__getitem__) == sample.answer,
        "value": value,
        "generated": text,
        "candidates": sample.candidates,
        "logprobs": [round(x, 4) for x in logprobs],
        "needle": sample.needle,
        "question": sample.question,
        "position": sample.position,
        "prompt_tokens": len(sample.prompt),
    }


def measure(
    lm: LanguageModel, tokenizer: Tokenizer, haystack: Haystack, settings: NeedleSettings,
    length: int, known: dict[tuple, dict] | None = None,
) -> Iterator[dict]:  # fmt: skip
    """The records of one length, all depths and samples; those known (by record_key) are kept."""
    for depth in settings.depth_percents:
        for index in range(settings.samples):
            record = {"length": length, "depth": depth, "index": index}
            before = (known or {}).get(record_key(record))
            if before is None:
                sample = make_sample(haystack, tokenizer, settings, length, depth, index)
                record |= score_sample(lm, tokenizer, sample, settings.max_new_tokens)
            yield before or record


def record_key(record: dict) -> tuple:
    return record["length"], record["depth"], record["index"]


# ---------------------------------------------------------------------------------------------------
# The grid, on files


def run_needle(
    checkpoint: Checkpoint, settings: NeedleSettings, folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Measure a checkpoint and write <folder>/<checkpoint name>.json, .csv and .png.

    Samples that the JSON holds already are not measured again if weights, text and settings are the
    same; more lengths, depths or samples extend it. folder defaults to eval/needle in the run's
    folder. Returns what the JSON holds. Raises ValueError or FileNotFoundError with one sentence.
    """
    tokenizer, longest = checkpoint.tokenizer, max(settings.lengths)
    if settings.haystack:
        haystack = Haystack.from_file(resolve_path(settings.haystack), tokenizer, longest)
    else:
        haystack = Haystack.held_out(checkpoint, longest)
    if haystack.size < longest:
        say(f"The haystack has {haystack.size:,} tokens and is repeated to fill {longest:,}.")
    grid = ("lengths", "depths", "samples")
    identity = {k: v for k, v in asdict(settings).items() if k not in grid} | {
        "version": VERSION,
        "weights": _weights_digest(checkpoint),
        "haystack_fingerprint": haystack.fingerprint,
    }
    folder = folder or run_folder(checkpoint) / "eval" / "needle"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{checkpoint.path.name}.json"
    known = _known(path, identity)
    end = end_of_text_id(tokenizer)
    lm = DecoderLM(checkpoint.model, {end}, reserve=max(64, settings.max_new_tokens))
    records: list[dict] = []
    started = written = time.perf_counter()
    for length in settings.lengths:
        for record in measure(lm, tokenizer, haystack, settings, length, known):
            records.append(record)
            known[record_key(record)] = record
            if time.perf_counter() - written > 10:
                _write(path, _results(checkpoint, settings, identity, records, known))
                written = time.perf_counter()
        row = summarize(records, "length")[-1]
        say(
            f"length {length:,}: generation {row['generation']:.0%}, ranking {row['ranking']:.0%}, "
            f"{time.perf_counter() - started:.0f} s"
        )
    results = _results(checkpoint, settings, identity, records, known)
    _write(path, results)
    with open(folder / f"{checkpoint.path.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, results["cells"][0])
        writer.writeheader()
        writer.writerows(results["cells"])
    save_heatmap(results, folder / f"{checkpoint.path.name}.png")
    return results


def _results(
    checkpoint: Checkpoint, settings: NeedleSettings, identity: dict, records: list[dict],
    known: dict[tuple, dict],
) -> dict:  # fmt: skip
    """Accuracies are of this grid's records; samples are all there are, also of earlier grids."""
    return {
        "step": checkpoint.step,
        "settings": asdict(settings),
        "identity": identity,
        "chance": 1 / settings.candidates,
        "by_length": summarize(records, "length"),
        "by_depth": summarize(records, "depth"),
        "cells": summarize(records, "length", "depth"),
        "samples": list(known.values()),
    }


def table(results: dict) -> str:
    """Accuracy by length and by depth, for a terminal."""
    ranking = f"ranking (chance {100 * results['chance']:.3g} %)"
    return "\n".join([
        f"{'':>8}  {'samples':>7}  {'generation':<21}{ranking}",
        "  length",
        *show(results["by_length"], "length"),
        "   depth",
        *show(results["by_depth"], "depth", "{:g} %"),
    ])  # fmt: skip


def run_folder(checkpoint: Checkpoint) -> Path:
    """The run that a checkpoint belongs to; a checkpoint on its own is its own run."""
    parent = checkpoint.path.parent
    return parent.parent if parent.name == "checkpoints" else checkpoint.path


def _weights_digest(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / WEIGHTS
    if not path.exists():  # a model still in training
        return f"unsaved {time.time_ns()}"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _known(path: Path, identity: dict) -> dict[tuple, dict]:
    """Samples measured before under the same conditions."""
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    samples = before["samples"] if before.get("identity") == identity else []
    return {record_key(record): record for record in samples}


def _write(path: Path, results: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, path)


@hydra.main(version_base=None, config_path="../conf", config_name="needle")
def main(config: DictConfig) -> None:
    try:
        config = OmegaConf.to_container(config, resolve=True)
        path, device = config.pop("checkpoint"), config.pop("device")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = load_checkpoint(resolve_path(path), device)
        asked = {key: value for key, value in config.items() if value is not None}
        settings = from_config(NeedleSettings, checkpoint.config["eval"] | asked, "eval")
        print(f"needle      {checkpoint.path}")
        results = run_needle(checkpoint, settings)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(table(results))
    stem = run_folder(checkpoint) / "eval" / "needle" / checkpoint.path.name
    print(f"files       {stem}.json, .csv, .png")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
