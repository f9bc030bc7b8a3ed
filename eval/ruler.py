"""RULER: 13 tasks of retrieval, tracing, aggregation and question answering at any length.

    python eval/ruler.py checkpoint=outputs/quickstart lengths=[4096,8192] samples=20

The rules are in eval/ruler_tasks.py. A model continues the prompt greedily, for as many tokens as the
task allows; the score is the share of the expected strings that occur in what it says. The two QA
tasks need a file of questions: qa_1_path=dev-v2.0.json (SQuAD), qa_2_path=hotpot_dev_distractor_v1.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import csv
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import hydra
from omegaconf import DictConfig
from tokenizers import Tokenizer

from data.config import command_line, from_config, resolve_path
from data.tokenizer import end_of_text_id
from eval.accuracy import summarize
from eval.entry import open_checkpoint, stoppable
from eval.haystack import Haystack
from eval.lm import BATCH_TOKENS, DecoderLM, LanguageModel
from eval.publish import publish
from eval.records import Records, file_digest, run_folder, weights_digest
from eval.ruler_tasks import TASKS, Generator, Sources, read_questions, string_match
from model.checkpoint import Checkpoint

VERSION = 1  # raise it when the same settings give other samples or other scores
KEYS = ("task", "length", "index")


@dataclass(frozen=True)
class RulerSettings:
    """conf/ruler.yaml"""

    lengths: list[int]
    samples: int
    tasks: list[str] | None
    seed: int
    haystack: str | None
    qa_1_path: str | None
    qa_2_path: str | None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; it must be at least 1.")
        if not self.lengths or not all(isinstance(n, int) for n in self.lengths):
            raise ValueError(f"lengths={self.lengths}; give token counts, such as [4096,8192].")
        for task in self.tasks or ():
            if task not in TASKS:
                raise ValueError(f"tasks: there is no {task}; choose among {', '.join(TASKS)}.")
            if task in ("qa_1", "qa_2") and getattr(self, f"{task}_path") is None:
                raise ValueError(
                    f"tasks: {task} needs a file of questions, {task}_path=questions.json."
                )

    @property
    def chosen(self) -> list[str]:
        """The tasks asked for; by default all whose questions are at hand."""
        missing = [task for task in ("qa_1", "qa_2") if getattr(self, f"{task}_path") is None]
        return self.tasks or [task for task in TASKS if task not in missing]


def measure(
    lm: LanguageModel, tokenizer: Tokenizer, generator: Generator, task: str, length: int,
    samples: int, records: Records,
) -> list[dict]:  # fmt: skip
    """The records of one task at one length."""

    def score(part: list[dict]) -> Iterator[dict]:
        examples = [generator.example(**key) for key in part]
        start = [end_of_text_id(tokenizer)]
        prompts = [
            start + tokenizer.encode(e.prompt, add_special_tokens=False).ids for e in examples
        ]
        generated = lm.generate(prompts, TASKS[task].budget)
        for example, prompt, tokens in zip(examples, prompts, generated, strict=True):
            text = tokenizer.decode(tokens)
            yield {
                "score": string_match(text, example.answers, TASKS[task].part),
                "answers": example.answers,
                "generated": text,
                "prompt_tokens": len(prompt),
            }

    wanted = [{"task": task, "length": length, "index": index} for index in range(samples)]
    return records.fill(wanted, max(1, BATCH_TOKENS // length), score)


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Length of a prompt in tokens, the end-of-text token before it included."""
    return lambda text: 1 + len(tokenizer.encode(text, add_special_tokens=False).ids)


def run_ruler(
    checkpoint: Checkpoint, settings: RulerSettings, say: Callable[[str], None] = print
) -> dict:
    """Measure a checkpoint and write eval/ruler/<checkpoint name>.json and .csv in the run's folder.

    Samples that the JSON holds already are not measured again if weights, text and settings are the
    same. Returns what the JSON holds. Raises ValueError or FileNotFoundError with one sentence, for
    what can be known beforehand before anything is written.
    """
    tokenizer = checkpoint.tokenizer
    haystack = Haystack.find(checkpoint, settings.haystack, longest=1)
    essay = tokenizer.decode(haystack.tokens[: haystack.size].tolist()).split()
    files = {
        task: resolve_path(getattr(settings, f"{task}_path"))
        for task in settings.chosen
        if task.startswith("qa")
    }
    qa = {task: read_questions(path) for task, path in files.items()}
    generator = Generator(token_counter(tokenizer), Sources(essay, qa), settings.seed)
    generator.check(settings.chosen, settings.lengths, settings.samples)
    identity = {
        "version": VERSION,
        "weights": weights_digest(checkpoint),
        "seed": settings.seed,
        "haystack_fingerprint": haystack.fingerprint,
        "questions": {task: file_digest(path) for task, path in files.items()},
    }
    stem = run_folder(checkpoint) / "eval" / "ruler" / checkpoint.path.name
    on_disk = Records(stem.with_suffix(".json"), KEYS, identity)
    budget = max(TASKS[task].budget for task in settings.chosen)
    lm = DecoderLM(checkpoint.model, {end_of_text_id(tokenizer)}, reserve=budget)
    records: list[dict] = []
    started = time.perf_counter()
    for length in settings.lengths:
        for task in settings.chosen:
            new = measure(lm, tokenizer, generator, task, length, settings.samples, on_disk)
            records += new
            score = statistics.fmean(r["score"] for r in new)
            seconds = time.perf_counter() - started
            note = ""
            if min(r["prompt_tokens"] for r in new) < 0.8 * (length - TASKS[task].budget):
                note = "; not all prompts fill the length, for want of text"
            say(f"{task}, length {length:,}: {score:.0%}, {seconds:.0f} s{note}")
    results = on_disk.write({
        "step": checkpoint.step,
        "settings": asdict(settings),
        "cells": summarize(records, "task", "length", scores=("score",)),
    })  # fmt: skip
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows(results))
    return results


def rows(results: dict) -> list[list]:
    """The paper's table: a row for each task and their mean, a column for each length, in %."""
    at = {(cell["task"], cell["length"]): 100 * cell["score"] for cell in results["cells"]}
    tasks, lengths = ({key[i]: None for key in at} for i in (0, 1))
    head = ["task", *lengths]
    body = [[task, *(round(at[task, n], 1) for n in lengths)] for task in tasks]
    mean = [round(statistics.fmean(at[task, n] for task in tasks), 1) for n in lengths]
    return [head, *body, [f"mean of {len(tasks)}", *mean]]


def table(results: dict) -> str:
    """The same for a terminal."""
    head, *body = rows(results)
    lines = [f"{head[0]:<16}" + "".join(f"{n:>9,}" for n in head[1:])]
    lines += [f"{row[0]:<16}" + "".join(f"{x:>9.1f}" for x in row[1:]) for row in body]
    return "\n".join(lines)


@hydra.main(version_base=None, config_path="../conf", config_name="ruler")
def main(config: DictConfig) -> None:
    try:
        checkpoint, config = open_checkpoint(config)
        settings = from_config(RulerSettings, config)
        print(f"ruler       {checkpoint.path}")
        results = run_ruler(checkpoint, settings)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(table(results))
    numbers = {f"ruler/{c['task']}/{c['length']}": c["score"] for c in results["cells"]}
    publish(checkpoint, "ruler", numbers)
    print(
        f"files       {run_folder(checkpoint) / 'eval' / 'ruler' / checkpoint.path.name}.json, .csv"
    )


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    with stoppable("the same command goes on from here"):
        main()
