"""Needles and the questions that ask for them: prompts of an exact length, with their answers.

A needle gives a value to a key. Four tasks (after RULER, arXiv 2404.06654):
    single       one needle
    multi_key    several, each with a key of its own; one is asked for
    multi_value  several values of one key; all are asked for
    multi_query  several keys; all are asked for
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from tokenizers import Tokenizer

from data.tokenizer import end_of_text_id
from eval.haystack import Haystack
from eval.words import NOUNS

TASKS = ("single", "multi_key", "multi_value", "multi_query")
ROOMY = 256  # tokens of text in one sample: then all others of its length have room for some
# What is hidden; the end of the prompt, which the value completes; the same for several values.
TEMPLATES = (
    (
        "One of the special magic {kind}s for {key} is: {value}.",
        "What is the special magic {kind} for {key} mentioned in the text above? "
        "One of the special magic {kind}s for {key} is:",
        "What are all the special magic {kind}s for {key} mentioned in the text above? "
        "The special magic {kind}s for {key} are:",
    ),
    (
        "The secret {kind} of the {key} is {value}.",
        "The text above gives a secret {kind} of the {key}. The secret {kind} of the {key} is",
        "The text above gives secret {kind}s of the {key}. The secret {kind}s of the {key} are",
    ),
    (
        "Remember that the {key} was given the {kind} {value}.",
        "What does the text above say about the {key}? "
        "Remember that the {key} was given the {kind}",
        "What does the text above say about the {key}? "
        "Remember that the {key} had been given the {kind}s",
    ),
)


@dataclass(frozen=True)
class DuringTraining:
    """A smaller grid, measured every so many tokens; null takes what the whole grid has."""

    every_tokens: int | None
    lengths: list[int] | None
    depths: int | None
    samples: int | None

    def __post_init__(self) -> None:
        for name in ("every_tokens", "depths", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"eval.during.{name}={getattr(self, name)}; at least 1, or null.")

    def due(self, before: int, now: int) -> bool:
        """Whether a multiple of every_tokens was passed between two counts of tokens."""
        return bool(self.every_tokens) and now // self.every_tokens > before // self.every_tokens


@dataclass(frozen=True)
class NeedleSettings:
    """conf/eval/needle.yaml"""

    tasks: list[str]
    lengths: list[int]
    depths: int
    samples: int
    needles: int
    values: Literal["numbers", "words"]
    candidates: int
    max_new_tokens: int
    seed: int
    haystack: str | None
    during: DuringTraining

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1.")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks={self.tasks}; choose among {', '.join(TASKS)}.")
        if not self.lengths or not all(isinstance(n, int) for n in self.lengths):
            raise ValueError(f"lengths={self.lengths}; give token counts, such as [512,1024].")
        if not 2 <= self.needles <= 8:
            raise ValueError(f"needles={self.needles}; several are 2 to 8.")
        fewest = 2 if self.tasks == ["single"] else self.needles + 1
        if not fewest <= self.candidates <= len(NOUNS) // 2:
            raise ValueError(
                f"candidates={self.candidates}; ranking needs {fewest} to {len(NOUNS) // 2} values "
                f"for tasks={self.tasks}."
            )

    @property
    def in_training(self) -> NeedleSettings:
        """The grid that is measured while training goes on."""
        smaller = {name: getattr(self.during, name) for name in ("lengths", "depths", "samples")}
        return replace(self, **{k: v for k, v in smaller.items() if v is not None})

    @property
    def depth_percents(self) -> list[float]:
        """Evenly from the start to the end of the haystack; a single depth is the middle."""
        if self.depths == 1:
            return [50.0]
        return [round(100 * i / (self.depths - 1), 2) for i in range(self.depths)]

    def answers(self, task: str) -> int:
        """Values that the task asks for."""
        return self.needles if task in ("multi_value", "multi_query") else 1

    def answer_tokens(self, task: str) -> int:
        """Tokens that the model may answer with."""
        return self.max_new_tokens * self.answers(task)

    def chance(self, task: str) -> float:
        """Ranking accuracy of a model that guesses."""
        return self.answers(task) / self.candidates


@dataclass(frozen=True)
class Sample:
    """One prompt and what would answer it. Prompt and answer tokens are exactly the length."""

    prompt: list[int]
    needles: list[str]
    positions: list[int]  # of each needle's first token in the prompt
    question: str
    candidates: list[str]
    answers: list[int]  # the right ones' places among the candidates
    room: int  # tokens of text around needles and question


def make_sample(
    haystack: Haystack, tokenizer: Tokenizer, settings: NeedleSettings, task: str, length: int,
    depth: float, index: int,
) -> Sample:  # fmt: skip
    """The sample of these numbers, the same whatever else is in the grid.

    depth in percent is the first needle's, the one that multi_key asks for; others lie anywhere.
    Raises ValueError when the length has no room for needles and question.
    """
    rng = random.Random(f"{settings.seed}/{task}/{length}/{depth}/{index}")
    start = int(rng.choice(haystack.starts))
    text = haystack.tokens[start : start + length].tolist()
    drawn_keys, values = _draw(rng, settings, tokenizer.decode(text).lower())
    count = 1 if task == "single" else settings.needles
    keys = drawn_keys[:1] * count if task == "multi_value" else drawn_keys[:count]
    answers = settings.answers(task)

    statement, one, several = TEMPLATES[index % len(TEMPLATES)]
    kind = settings.values.removesuffix("s")
    needles = [
        statement.format(kind=kind, key=key, value=value)
        for key, value in zip(keys, values[:count], strict=True)
    ]
    asked = list(dict.fromkeys(keys[:answers]))
    asked = rng.sample(asked, len(asked))  # the order of the text is no hint
    question = (one if answers == 1 else several).format(kind=kind, key=listing(asked))
    ids = [tokenizer.encode(" " + n, add_special_tokens=False).ids for n in needles]
    question_ids = tokenizer.encode("\n\n" + question, add_special_tokens=False).ids

    room = length - settings.answer_tokens(task) - sum(map(len, ids)) - len(question_ids) - 1
    if room < 1:
        raise ValueError(
            f"lengths: {length} tokens leave no room for text beside {count} needles, the question "
            f"and {settings.answer_tokens(task)} tokens of answer; {length - room + 64} would be a "
            "start."
        )
    depths = [depth / 100, *(rng.random() for _ in range(count - 1))]
    cuts = [haystack.cut(start, room, share) for share in depths]
    prompt, done, positions = [end_of_text_id(tokenizer)], 0, [0] * count
    for i in sorted(range(count), key=cuts.__getitem__):
        prompt += text[done : cuts[i]]
        done, positions[i] = cuts[i], len(prompt)
        prompt += ids[i]
    prompt += text[done:room] + question_ids

    order = rng.sample(range(settings.candidates), settings.candidates)
    candidates = [values[i] for i in order]
    right = [order.index(i) for i in range(answers)]
    return Sample(prompt, needles, positions, question, candidates, right, room)


def check_lengths(haystack: Haystack, tokenizer: Tokenizer, settings: NeedleSettings) -> None:
    """Raises ValueError, as make_sample does, if a sample of the grid would have no room for text."""
    for task, length in itertools.product(settings.tasks, settings.lengths):
        for depth, index in itertools.product(settings.depth_percents, range(settings.samples)):
            sample = make_sample(haystack, tokenizer, settings, task, length, depth, index)
            if sample.room >= ROOMY:
                break


def listing(words: list[str]) -> str:
    """a; a and b; a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _draw(rng: random.Random, settings: NeedleSettings, text: str) -> tuple[list[str], list[str]]:
    """Keys, and values all drawn alike: without the needles, none is likelier than another.

    None of them occurs in the text, which is in lower case.
    """
    words = iter(rng.sample(NOUNS, len(NOUNS)))
    numbers = (str(rng.randrange(10**6, 10**7)) for _ in itertools.count())
    keys = _absent(words, text, settings.needles)
    values = numbers if settings.values == "numbers" else words
    values = _absent(values, text, settings.candidates)
    if len(keys) < settings.needles or len(values) < settings.candidates:
        raise ValueError(
            "The haystack holds nearly all of the words that needles are made of; take fewer "
            "candidates, another text or values=numbers."
        )
    return keys, values


def _absent(source: Iterable[str], text: str, count: int) -> list[str]:
    """The first `count` different strings that the text does not hold."""
    found: dict[str, None] = {}
    for value in source:
        if value not in text:
            found[value] = None
        if len(found) == count:
            break
    return list(found)
