"""Long-context tasks made while training: sample i is the same for everyone who asks for it.

Statements are hidden in running text, or a passage stands at a document's start, and later on, at the
end at the latest, stands what only a reader of all before can go on with. The wordings, names and
numbers here are for training; none is among those that eval/ asks for.
"""

import random
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from data.batch import Batch
from data.shards import TokenShards
from data.tokenizer import end_of_text_id, vocab_size

SHORTEST = 512  # tokens of a document, which hold one statement and its question in any tokenizer
TOKENS_PER_ITEM = 48  # of the document, for each statement, at the densest

PASSKEYS = (
    ("Keep this code in mind: {value}.", "The code to keep in mind was"),
    ("To open the gate, type {value}.", "The gate opens when you type"),
    ("Note for later: the access number is {value}.", "The access number noted earlier is"),
    ("(By the way, the combination of the lock is {value}.)", "The lock's combination is"),
    ("Write down {value}; it will be asked for.", "What was to be written down is"),
    ("The counter showed {value} when we left.", "When we left, the counter showed"),
)
NEEDLES = (
    ("{key} lives at house number {value}.", "The house number of {key} is"),
    ("The telephone of {key} rings at {value}.", "To call {key}, dial"),
    ("In the ledger, {key} is listed under {value}.", "The ledger lists {key} under"),
    ("{key} paid exactly {value} coins.", "The coins paid by {key} number exactly"),
    ("Locker {value} belongs to {key}.", "{key} owns locker"),
    ("The password that {key} chose is {value}.", "{key} chose the password"),
    ("According to the register, {key} arrived on ship {value}.", "{key} arrived on ship"),
    ("Parcel {value} is addressed to {key}.", "The parcel addressed to {key} is"),
    ("{key} sat in seat {value}.", "The seat that {key} took was"),
    ("The clock in {key}'s hall stopped at {value}.", "In {key}'s hall the clock stopped at"),
    ("{key}: {value}.", "{key}:"),
    ("They counted {value} steps to the door of {key}.", "To the door of {key}, the steps number"),
)
# Wordings and keys by the million, so that what is learnt is to say again what followed, not a list;
# and ordinary words among the keys, so that no odd name is what announces a question.
SUBJECTS = (
    "badge ballot bill cabin card coupon crate deposit docket engine fare file flight folio frequency "
    "invoice lease level licence lot meter model order page permit plate platform plot policy prize "
    "quota receipt route row score serial shelf shift slot stamp stock table tag tally target ticket "
    "toll track tray unit vault verse vote voucher ward weight zone"
).split()
MEASURES = "number code count figure index key mark rank reference sum total value".split()
OPENINGS = (
    "The|A|One|This|That|Our|Their|Each|Another|The first|The last|The only|Some|No other".split(
        "|"
    )
)
LINKS = "of for with by at from under near behind beside about after before to on".split()
VERBS = (
    "is|was|is:|was:|are:|reads|says|equals|became|came to|stands at|remains|runs to|made|:".split(
        "|"
    )
)
HEADS = (
    "{opening} {adjective} {subject} {measure} {link} {key} {verb}",
    "{opening} {adjective} {subject} {measure} {link} {key} {verb}",
    "{opening} {adjective} {subject} {link} {key} {verb}",
    "{opening} {subject} {measure} {link} {key} {verb}",
    "{opening} {subject} {link} {key} {verb}",
    "{opening} {measure} {link} {key} {verb}",
    "{opening} {adjective} {measure} {link} {key} {verb}",
    "{link} {key} {opening} {subject} {measure} {verb}",
    "{key} {verb} {opening} {adjective} {subject} {measure}",
    "{key} {verb} {opening} {measure}",
    "{key} has the {subject} {measure}",
    "{key}'s {subject} {measure} was",
    "It is known that {key} took {subject} {measure}",
    "Anyone who asks for {key} is sent to {subject} {measure}",
    "As to {key}, the {subject} {measure} came to",
    "Of {key} they noted this {subject} {measure}:",
    "Where {key} is concerned, {subject} {measure} equals",
    "A clerk gave {key} the {subject} {measure}",
    "{key} was handed the {measure}",
    "Among the papers of {key} is {subject} {measure}",
    "Many things belong to {key}, such as {subject} {measure}",
)
LEADS = (
    "", "", "", "Note: ", "By the way, ", "Mark this: ", "It is written that ", "One more thing: ",
    "Do not forget: ", "As was said before, ",
)  # fmt: skip
ASKING = (
    "", "", "", "Once more: ", "Which one was it? ", "From the pages before: ", "What was said of {key}? ",
    "Look up the {subject} {measure} again. ", "Question: which {subject} {measure} has {key}? Answer: ",
    "Tell me about {key}. ", "Which {measure} did the pages before name for {key}? ",
    "What was the {adjective} {subject} {measure} {link} {key}? ", "{opening} {measure} {link} {key}? ",
    "Who knows the {adjective} {measure} {link} {key}, as it was written? ",
)  # fmt: skip
KEY_NOUNS = (
    "acorn almond arrow autumn bakery bamboo banner barrel beetle bishop bonnet bottle bracelet bridge "
    "broom bucket buckle butter cactus camera canoe captain carriage carrot cave cellar chapel chimney "
    "chisel cider circus clock clover comet compass cousin cradle crater cricket crown curtain cushion "
    "daughter desert doctor drawer drum eagle elbow emerald envelope fabric farmer feast fence ferry "
    "fountain fox gallery garden gate glove goose grape guitar hawk hedge heron hill inn insect jewel "
    "juice kite lace lake lamp library lily lobster loom maple market melon mill mitten moth museum "
    "napkin nest oak oar onion orchard otter owl palace parrot peach pearl pencil piano pilot plum "
    "pocket pond poppy quilt reef river robin rope sailor sandal satchel saucer scarf shepherd shore "
    "spoon stable statue stream swan tailor teapot temple thistle thunder torch tower trumpet valley "
    "vessel village wagon well wheel whistle window wolf yarn"
).split()
KEY_ADJECTIVES = (
    "amber ample azure bald blue bold bronze carved chalky chilly coarse cracked crimson damp dark deep "
    "distant drowsy dry eastern fading fine flat folded fragile furry glassy grand green grey handsome "
    "hidden icy jagged kind large lean light little long lost low marked mossy new northern old oval "
    "painted pale pink pointed quaint red round sandy scented short silken slim small soft southern "
    "square stern striped tall tame thick thin tidy upper vast western white wide windy worn"
).split()
SLOTS = {
    "subject": SUBJECTS,
    "measure": MEASURES,
    "adjective": KEY_ADJECTIVES,
    "opening": OPENINGS,
    "link": LINKS,
    "verb": VERBS,
}
# Half of the time the words alone, half of the time nothing after them: a number is not what one would
# expect there.
WITH_WORDS = *["{words}"] * 3, "{words} {key}", "{words} {key} {after}", "{key} {words}"
AFTER_WORDS = *[""] * 6, ":", " is", " was", " are", " is:", " ="
COPY = ("\n\nThe same once more, from the beginning:\n\n", "\n\n=== copy ===\n\n", "\n\nAgain:\n")
ONSETS = "b br d dr f g gr h j k kl l m n p pr r s st t tr v w z".split()
VOWELS = "a e i o u ai ea oo".split()
CODAS = ["", "", "l", "n", "r", "s", "x"]


def made_up_name(rng: random.Random) -> str:
    """Such as Trano-Velix: two made-up words, which no list of real words holds."""
    return "-".join(
        "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in "ab").title()
        for _ in "ab"
    )


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**3, 10 ** rng.randint(4, 9)))


def _key(rng: random.Random) -> str:
    """A made-up name, lamp, the lamp, or the old lamp."""
    if rng.random() < 0.4:
        return made_up_name(rng)
    noun = rng.choice(KEY_NOUNS)
    return rng.choice((noun, f"the {noun}", f"the {rng.choice(KEY_ADJECTIVES)} {noun}"))


def _pairs(
    rng: random.Random, most: int, key: Callable[[random.Random], str] = _key
) -> dict[str, str]:
    """Different keys with a number each: 1 to `most`, in a third of the documents evenly so that what
    can be learnt from is dense, in a third evenly by magnitude, and in a third no more than four: that
    something was stated is harder to know where little else was."""
    count = rng.choice(
        (rng.randint(1, most), round(most ** rng.random()), rng.randint(1, min(most, 4)))
    )
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        pairs[key(rng)] = _number(rng)
    return pairs


class Question(NamedTuple):
    """A text, the answer in it, and the number of the statement that must come before it."""

    text: str
    answer: str
    about: int


Words = Callable[[], str]  # some words of the haystack, in a row
Task = tuple[list[str], list[Question]]  # statements in their order, and questions


def passkey(rng: random.Random, *_) -> Task:
    """One number to remember."""
    statement, question = rng.choice(PASSKEYS)
    value = _number(rng)
    return [statement.format(value=value)], [Question(f"{question} {value}.", value, 0)]


def _fact(
    rng: random.Random, number: int, key: str, value: str, some_words: Words
) -> tuple[str, Question]:
    """Statement `number`, and a question: in other words, or after the statement's own.

    Some statements are any words of the haystack and the value: nothing announces it but that it
    followed them before.
    """
    kind = rng.random()
    if kind < 0.15:
        statement, question = rng.choice(NEEDLES)
        text = f"{question.format(key=key)} {value}."
        return statement.format(key=key, value=value), Question(text, value, number)
    if kind < 0.65:
        before = rng.choice(WITH_WORDS)
        before = before.format(words=some_words(), key=key, after=some_words().split()[0])
        value = value if rng.random() < 0.75 else some_words()
        statement = f"{before}{rng.choice(AFTER_WORDS)} {value}."
        lead = rng.choice(("", f"{some_words()}? ", f"{some_words()}. "))
        return statement, Question(lead + statement, value, number)
    words = {slot: rng.choice(choices) for slot, choices in SLOTS.items()} | {"key": key}
    statement = rng.choice(LEADS) + rng.choice(HEADS).format(**words) + f" {value}."
    answer = statement
    if rng.random() < 0.5:
        words |= {
            slot: rng.choice(SLOTS[slot]) for slot in ("opening", "adjective", "link", "verb")
        }
        answer = rng.choice(HEADS).format(**words) + f" {value}."
    return statement, Question(rng.choice(ASKING).format(**words) + answer, value, number)


def needle(rng: random.Random, most: int, some_words: Words) -> Task:
    """Facts in many wordings, of which some are asked for."""
    pairs = enumerate(_pairs(rng, most).items())
    statements, questions = zip(
        *(_fact(rng, i, *pair, some_words) for i, pair in pairs), strict=True
    )
    return list(statements), rng.sample(questions, rng.randint(1, len(questions)))


def recall(rng: random.Random, most: int, _) -> Task:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): every key is asked for."""
    pairs = _pairs(rng, most).items()
    facts = [Question(f"{key} -> {value};", value, i) for i, (key, value) in enumerate(pairs)]
    return [fact.text for fact in facts], rng.sample(facts, len(facts))


def variables(rng: random.Random, most: int, _) -> Task:
    """Chains of assignments; the answer is every name that ends up with one chain's value."""
    names = iter(_pairs(rng, most, made_up_name).items())
    chains: list[tuple[str, list[str]]] = []
    statements = []
    for name, value in names:
        if not chains or rng.random() < 0.25:
            chains.append((value, [name]))
            statements.append(f"let {name} be {value}.")
        else:
            _, chain = rng.choice(chains)
            statements.append(f"let {name} be the same as {chain[-1]}.")
            chain.append(name)
    value, chain = rng.choice(chains)
    names = ", ".join(chain)
    question = f"The names that came to be {value}: {names}."
    return statements, [Question(question, names, len(statements) - 1)]


# Each: (rng, greatest number of statements, words of the haystack) -> statements and questions.
# A copy is of tokens and not of sentences: SyntheticLoader._copy.
SENTENCES: dict[str, Callable[[random.Random, int, Words], Task]] = {
    "passkey": passkey,
    "needle": needle,
    "recall": recall,
    "variables": variables,
}


def _unasked(tokens: Sequence[int]) -> np.ndarray:
    """int64 [2, length]: the tokens, none of which answers a question."""
    return np.stack([tokens, np.zeros(len(tokens), np.int64)])


class SyntheticLoader:
    """Random access to an endless run of samples, each `seq_len` tokens of whole documents.

    Attributes:
        padding_share: 0, as documents are made to measure.
    """

    padding_share = 0.0

    def __init__(
        self, haystack: TokenShards, tokenizer: Tokenizer, tasks: Sequence[str], seq_len: int,
        seed: int, skipped: int = 0,
    ):  # fmt: skip
        """
        Args:
            haystack: the text that things are hidden in.
            tasks: names in data.config.TASKS, as often as they are named.
            skipped: samples that earlier stages took, which don't come again.
        """
        if seq_len < SHORTEST:
            raise ValueError(f"seq_len={seq_len}: synthetic tasks need {SHORTEST} tokens or more")
        self.haystack, self.tokenizer, self.tasks = haystack, tokenizer, tasks
        self.seq_len, self.seed, self.skipped = seq_len, seed, skipped
        self.eot_id = end_of_text_id(tokenizer)

    def next_stage(self, seq_len: int, consumed: int) -> "SyntheticLoader":
        return SyntheticLoader(
            self.haystack, self.tokenizer, self.tasks, seq_len, self.seed, self.skipped + consumed
        )

    def describe(self, samples: int) -> str:
        return f"{samples:,} samples"

    def batch(self, first: int, count: int) -> Batch:
        """Samples first … first + count - 1, as count * seq_len tokens."""
        samples = range(self.skipped + first, self.skipped + first + count)
        documents = [document for sample in samples for document in self.sample(sample)]
        tokens, asked = np.concatenate([*documents, _unasked([self.eot_id])], 1)
        lengths = np.array([document.shape[1] for document in documents])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        # A lone answer is to weigh as much as hundreds together; a copy has none.
        counts = np.add.reduceat(asked[1:], ends[:-1])
        answers = (asked[1:] * np.repeat(lengths / counts.clip(min=1), lengths)).astype(np.float32)
        arrays = tokens[:-1], tokens[1:].copy(), answers, positions, ends.astype(np.int32)
        return Batch(*map(torch.from_numpy, arrays), int(lengths.max()))

    def sample(self, number: int) -> list[np.ndarray]:
        """The documents of a sample, int64 [2, length] each: tokens, end-of-text first, and 1 for those that
        answer a question; seq_len tokens in all.

        One half of the samples are one document; in the other, lengths are spread evenly over the
        powers of two up to the whole sequence.
        """
        rng = random.Random(f"{self.seed}/{number}")
        if rng.random() < 0.5:
            return [self._document(rng, self.seq_len)]
        documents, left = [], self.seq_len
        while left:
            length = round(SHORTEST * (left / SHORTEST) ** rng.random())
            if left - length < SHORTEST:
                length = left
            documents.append(self._document(rng, length))
            left -= length
        return documents

    def _document(self, rng: random.Random, length: int) -> np.ndarray:
        task = rng.choice(self.tasks)
        start = rng.randrange(self.haystack.num_tokens)
        if task == "copy":
            return self._copy(rng, start, length)
        most, room = length // TOKENS_PER_ITEM, 0
        while room < length // 4:  # which stays text, also when every byte is a token
            statements, questions = SENTENCES[task](rng, most, partial(self._some_words, rng))
            # All questions at the end, or one there and the others anywhere after what they ask for.
            last = questions if rng.random() < 0.3 else questions[-1:]
            early = questions[: len(questions) - len(last)]
            inserts = [self._encode(" " + statement) for statement in statements]
            inserts += [self._encode(f"\n\n{q.text}\n\n", q.answer) for q in early]
            gaps = "\n\n", *[" "] * (len(last) - 1)
            ending = np.concatenate(
                [self._encode(gap + q.text, q.answer) for gap, q in zip(gaps, last, strict=True)], 1
            )
            room = length - 1 - sum(part.shape[1] for part in [*inserts, ending])
            most = max(most // 2, 1)
        text = self._text(start, room)
        places = sorted(self._sentence_end(text, rng.randint(0, room)) for _ in statements)
        places += [self._sentence_end(text, rng.randint(places[q.about], room)) for q in early]
        parts, before = [_unasked([self.eot_id])], 0
        for i in np.argsort(places, kind="stable"):
            parts += [_unasked(text[before : places[i]]), inserts[i]]
            before = places[i]
        return np.concatenate([*parts, _unasked(text[before:]), ending], 1)

    def _copy(self, rng: random.Random, start: int, length: int) -> np.ndarray:
        """A passage, some text between, and the passage again."""
        again = self._encode(rng.choice(COPY))[0]
        room = length - 1 - len(again)
        size = rng.randint(room // 8, room // 2)
        text = self._text(start, room - size)
        return _unasked(np.concatenate([[self.eot_id], text, again, text[:size]]))

    def _some_words(self, rng: random.Random) -> str:
        """Three to twelve words of the haystack in a row, or as many as 24 tokens hold, in one half of the
        cases with what stands between them but the line ends; "there" for none."""
        text = self.tokenizer.decode(self._text(rng.randrange(self.haystack.num_tokens), 24))
        words = re.findall(r"[^\W\d_]+", text) if rng.random() < 0.5 else text.split()
        return " ".join(words[1 : 1 + rng.randint(3, 12)]) or "there"

    def _encode(self, text: str, answer: str | None = None) -> np.ndarray:
        """int64 [2, length]: the text's tokens, and 1 for those of the answer, in its last place.

        The space before it counts too: where it is a token of its own, the answer begins with it.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        found = _unasked(encoding.ids)
        if answer is not None:
            first = text.rindex(f" {answer}")
            end = first + 1 + len(answer)
            found[1] = [start < end and stop > first for start, stop in encoding.offsets]
        return found

    def _text(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, without ends of text; the file's end meets its start."""
        parts, found = [], 0
        while found < count:
            stretch = np.arange(start, start + count - found + 64)
            tokens = self.haystack.tokens.take(stretch, mode="wrap").astype(np.int64)
            parts.append(tokens[tokens != self.eot_id][: count - found])
            start, found = start + len(stretch), found + len(parts[-1])
        return np.concatenate(parts)

    @cached_property
    def _ends_sentence(self) -> np.ndarray:
        """bool [vocab_size]: tokens that end a sentence or a line (written Ċ in a vocabulary)."""
        ends = np.zeros(vocab_size(self.tokenizer), bool)
        for token, i in self.tokenizer.get_vocab().items():
            ends[i] = token.endswith((".", "!", "?", "Ċ"))
        return ends

    def _sentence_end(self, text: np.ndarray, place: int) -> int:
        """The first end of a sentence from `place` on, or `place` where none is near."""
        near = np.flatnonzero(self._ends_sentence[text[place : place + 256]])
        return place + int(near[0]) + 1 if len(near) else place
