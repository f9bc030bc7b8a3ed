"""The 13 tasks of RULER (arXiv 2404.06654, section 3 and appendix B) as generators.

Prompts are worded as published, also where the publication errs in spelling. Each generator builds
a prompt from a number of haystack units (sentences, words, documents), and `Generator` finds how
many fit a length. What differs from the published code: essays are any text, begun at a random word;
words come from eval/words.py and that text; the one-shot examples of variable tracking and common
words are drawn anew for each sample.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from eval.haystack import SENTENCE_END
from eval.words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent, where needles go in essays


@dataclass(frozen=True)
class Question:
    query: str
    answers: list[str]
    gold: list[int]  # numbers of the documents that hold the answer
    near: list[int]  # and of distractors from the same article


@dataclass(frozen=True)
class Sources:
    """What prompts are made of: words of a text, and (questions, documents) of the QA tasks."""

    essay: list[str]
    qa: dict[str, tuple[list[Question], list[str]]] = field(default_factory=dict)

    @cached_property
    def plain_words(self) -> list[str]:
        return sorted({word for word in self.essay if re.fullmatch("[a-z]{3,}", word)})


@dataclass(frozen=True)
class Example:
    prompt: str
    answers: list[str]


# ---------------------------------------------------------------------------------------------------
# Needles


def niah(
    rng: random.Random, size: int, length: int, sources: Sources, haystack: str,
    keys: str = "words", values: str = "numbers", num_keys: int = 1, num_values: int = 1,
    num_queries: int = 1,
) -> Example:  # fmt: skip
    """size counts noise sentences, distractor needles or words of an essay."""
    drawn: dict[str, list[str]] = {}
    while len(drawn) < num_keys:
        drawn[_draw(rng, keys)] = [_draw(rng, values) for _ in range(num_values)]
    pairs = [(key, value) for key, own in drawn.items() for value in own]
    rng.shuffle(pairs)
    needles = [NEEDLE.format(kind=values, key=key, value=value) for key, value in pairs]
    if haystack == "essay":
        context = _in_essay(rng, needles, _essay(rng, sources, size))
    else:
        units = [NOISE] * size
        if haystack == "needles":
            others = (key for _ in itertools.count() if (key := _draw(rng, keys)) not in drawn)
            units = [
                NEEDLE.format(kind=values, key=key, value=_draw(rng, values))
                for key in itertools.islice(others, size)
            ]
        for place, needle in zip(
            sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True
        ):
            units.insert(place, needle)
        context = "\n".join(units)

    asked = rng.sample(list(drawn), num_queries)
    query = asked[0] if num_queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    answers = [value for key in asked for value in drawn[key]]
    if len(answers) == 1:
        kind, some, what, verb = values.removesuffix("s"), "A", "What is", "is"
    else:
        kind, some, what, verb = values, "Some", "What are all", "are"
    return Example(
        f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize "
        f"it. I will quiz you about the {kind} afterwards.\n{context}\n"
        f"{what} the special magic {kind} for {query} mentioned in the provided text? "
        f"The special magic {kind} for {query} mentioned in the provided text {verb}",
        answers,
    )


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _essay(rng: random.Random, sources: Sources, size: int) -> str:
    words, start = sources.essay, rng.randrange(len(sources.essay))
    rounds = (start + size) // len(words) + 1
    return " ".join((words * rounds)[start : start + size])


def _in_essay(rng: random.Random, needles: list[str], text: str) -> str:
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    places = [ends[(len(ends) - 1) * depth // 100] for depth in depths]
    pieces, done = [], 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [text[done:place].strip(), needle]
        done = place
    return " ".join(filter(None, [*pieces, text[done:].strip()]))


# ---------------------------------------------------------------------------------------------------
# Tracing, aggregation, questions


def variable_tracking(
    rng: random.Random, size: int, length: int, sources: Sources, hops: int = 4
) -> Example:
    """One chain of assignments among `size` lines of noise; one example with short names first."""
    # The published code shows what fits 500 tokens, 5 to 15 lines by the tokenizer.
    shown = _chain(rng, 12, hops, letters=3)
    asked = _chain(rng, size, hops, letters=5)
    return Example(f"{shown.prompt} {' '.join(shown.answers)}\n\n\n\n{asked.prompt}", asked.answers)


def _chain(rng: random.Random, size: int, hops: int, letters: int) -> Example:
    names: dict[str, None] = {}
    while len(names) <= hops:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    names, value = list(names), rng.randrange(10_000, 100_000)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False)]
    units = [NOISE + "\n"] * size
    for done, place in enumerate(sorted(rng.sample(range(size), hops + 1))):
        units.insert(place + done, lines[done])
    return Example(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{' '.join(units)}\nQuestion: Find all variables that are assigned the value {value} in the "
        "text above. Answer: According to the chain(s) of variable assignment in the text above, "
        f"{hops + 1} variables are assgined the value {value}, they are: ",
        names,
    )


def common_words(rng: random.Random, size: int, length: int, sources: Sources) -> Example:
    """`size` different words, ten of them more often; one example first."""
    short = length < 4096  # as published: fewer repetitions, so that something fits
    shown = _common(rng, sources, 20 if short else 40, *((3, 1) if short else (10, 3)))
    asked = _common(rng, sources, size, *((6, 1) if short else (30, 3)))
    return Example(f"{shown.prompt} {_numbered(shown.answers)}\n{asked.prompt}", asked.answers)


def _common(rng: random.Random, sources: Sources, size: int, often: int, seldom: int) -> Example:
    missing = max(0, size - len(sources.plain_words))
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), missing)
    words = sources.plain_words + [
        f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in pairs
    ]
    words = rng.sample(words, size)
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    return Example(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(listed)}\nQuestion: What are the 10 "
        "most common words in the above list? Answer: The top 10 words that appear most often in "
        "the list are:",
        words[:10],
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(rng: random.Random, size: int, length: int, sources: Sources) -> Example:
    """`size` coded words by the zeta distribution with exponent 2; rank 1 is noise, 2 to 4 asked."""
    coded: dict[str, None] = {"...": None}
    while len(coded) < max(length // 50, 8):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    coded, zeta = list(coded), math.pi**2 / 6
    listed = [w for rank, w in enumerate(coded, 1) for _ in range(int(size / rank**2 / zeta))]
    rng.shuffle(listed)
    return Example(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(listed)}\nQuestion: Do not provide any "
        "explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text? Answer: According to the coded text above, the three most "
        "frequently appeared words are:",
        coded[1:4],
    )


def question_answering(
    rng: random.Random, size: int, length: int, sources: Sources, name: str
) -> Example:
    """`size` documents, those with the answer among them, then the question."""
    questions, documents = sources.qa[name]
    question = rng.choice(questions)
    taken, missing = list(question.gold), size - len(question.gold)
    if missing > 0:
        taken += rng.sample(question.near, min(missing, len(question.near)))
        others = sorted(set(range(len(documents))) - set(question.gold) - set(question.near))
        taken += rng.sample(others, min(size - len(taken), len(others)))
    rng.shuffle(taken)
    context = "\n\n".join(f"Document {i}:\n{documents[d]}" for i, d in enumerate(taken, 1))
    ask = (
        "Answer the question based on the given documents. Only give me the answer and do not output "
        "any other words."
    )
    return Example(
        f"{ask}\n\nThe following are given documents.\n\n{context}\n\n{ask}\n\n"
        f"Question: {question.query} Answer:",
        question.answers,
    )


def read_questions(path: Path) -> tuple[list[Question], list[str]]:
    """Questions and documents of a file in SQuAD's or HotpotQA's own JSON form.

    Raises FileNotFoundError or ValueError with one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of questions.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        read = _read_squad if isinstance(data, dict) else _read_hotpot
        questions, documents = read(data)
    except (KeyError, TypeError, IndexError, ValueError):
        questions = []
    if not questions:
        raise ValueError(
            f"{path} holds no questions in the form of SQuAD (data, paragraphs, qas) or HotpotQA "
            "(a list of question, answer, context)."
        )
    return questions, documents


def _read_squad(data: dict) -> tuple[list[Question], list[str]]:
    numbers: dict[str, int] = {}
    questions = []
    for article in data["data"]:
        own = [numbers.setdefault(p["context"], len(numbers)) for p in article["paragraphs"]]
        for number, paragraph in zip(own, article["paragraphs"], strict=True):
            near = sorted(set(own) - {number})
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible"):
                    answers = [answer["text"] for answer in qa["answers"]]
                    questions.append(Question(qa["question"], answers, [number], near))
    return questions, list(numbers)


def _read_hotpot(data: list) -> tuple[list[Question], list[str]]:
    numbers: dict[str, int] = {}
    questions = []
    for item in data:
        texts = [f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]]
        gold = [numbers.setdefault(text, len(numbers)) for text in texts]
        questions.append(Question(item["question"], [item["answer"]], gold, []))
    return questions, list(numbers)


# ---------------------------------------------------------------------------------------------------
# All of them, at a length


@dataclass(frozen=True)
class Task:
    """smallest: of the sizes to try; budget: tokens to answer with; part: any one answer does."""

    build: Callable[..., Example]
    smallest: int
    budget: int
    part: bool = False


def _niah(haystack: str, **settings) -> Task:
    return Task(partial(niah, haystack=haystack, **settings), 4, 128)


TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", values="uuids"),
    "niah_multikey_1": _niah("essay", num_keys=4),
    "niah_multikey_2": _niah("needles"),
    "niah_multikey_3": _niah("needles", keys="uuids", values="uuids"),
    "niah_multivalue": _niah("essay", num_values=4),
    "niah_multiquery": _niah("essay", num_keys=4, num_queries=4),
    "vt": Task(variable_tracking, 6, 30),
    "cwe": Task(common_words, 20, 120),
    "fwe": Task(frequent_words, 100, 50),
    "qa_1": Task(partial(question_answering, name="qa_1"), 1, 32, part=True),
    "qa_2": Task(partial(question_answering, name="qa_2"), 1, 32, part=True),
}


class Generator:
    """Prompts of at most a length in tokens, by any tokenizer: count(text) is its length.

    The size that fits is found once for each task and length; a sample that is too long all the
    same is made smaller.
    """

    def __init__(self, count: Callable[[str], int], sources: Sources, seed: int = 0):
        self.count, self.sources, self.seed = count, sources, seed
        self._sizes: dict[tuple[str, int], int] = {}

    def check(self, tasks: list[str], lengths: list[int], samples: int) -> None:
        """Raises ValueError, before any is asked for, if an example would not fit."""
        for length in lengths:
            needed = {
                task: max(
                    self._tokens(task, self._build(task, length, index, TASKS[task].smallest))
                    for index in range(samples)
                )
                for task in tasks
            }
            if misfits := [task for task in tasks if needed[task] > length]:
                raise ValueError(
                    f"lengths: {length} tokens are too few for the smallest prompt and answer of "
                    f"{', '.join(misfits)}; {max(needed.values()) + 64} would be a start, or leave "
                    "them out of tasks."
                )

    def example(self, task: str, length: int, index: int) -> Example:
        """Prompt and answer budget are at most `length` tokens.

        Raises ValueError when not even the smallest prompt fits.
        """
        if (task, length) not in self._sizes:
            self._sizes[task, length] = self._largest(task, length)
        size, smallest = self._sizes[task, length], TASKS[task].smallest
        while True:
            example = self._build(task, length, index, size)
            if self._fits(task, length, example):
                return example
            if size == smallest:
                raise ValueError(
                    f"{task} needs more than length={length} tokens for its smallest prompt and "
                    f"{TASKS[task].budget} tokens of answer; take longer lengths or fewer tasks."
                )
            size = max(smallest, size - max(1, size // 64))

    def _build(self, task: str, length: int, index: int, size: int) -> Example:
        rng = random.Random(f"{self.seed}/{task}/{length}/{index}")
        return TASKS[task].build(rng, size, length, self.sources)

    def _tokens(self, task: str, example: Example) -> int:
        return self.count(example.prompt) + TASKS[task].budget

    def _fits(self, task: str, length: int, example: Example) -> bool:
        return self._tokens(task, example) <= length

    def _largest(self, task: str, length: int) -> int:
        """By doubling, then bisection; a haystack that can't grow (few documents) ends it."""

        def fits(size: int) -> bool:
            return self._fits(task, length, self._build(task, length, 0, size))

        low = TASKS[task].smallest
        while 2 * low <= length and fits(2 * low):
            low *= 2
        high = 2 * low
        while high - low > max(1, low // 128):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def string_match(prediction: str, answers: list[str], part: bool) -> float:
    """RULER's string_match_all: the share of the answers that occur in the prediction, whatever
    their case; with `part`, string_match_part: 1 if any of them does."""
    prediction = re.sub(r"[\x00-\x1f]", "\n", prediction).lower()
    found = [answer.lower() in prediction for answer in answers]
    return float(any(found)) if part else sum(found) / len(found)
