import ast
import random
import re

import numpy as np
import pytest
import torch

from data.config import ROOT, TASKS
from data.shards import ShardWriter
from data.synthetic import (
    COPY,
    KEY_ADJECTIVES,
    KEY_NOUNS,
    SENTENCES,
    SHORTEST,
    Question,
    SyntheticLoader,
    made_up_name,
)
from data.tokenizer import encode_documents, end_of_text_id, fingerprint, vocab_size
from eval.words import ADJECTIVES, NOUNS


@pytest.fixture(scope="module")
def haystack(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("haystack") / "train"
    writer = ShardWriter(
        folder, vocab_size(tokenizer), end_of_text_id(tokenizer), fingerprint(tokenizer)
    )
    texts = [f"The {i}. fox jumps over the lazy dog. It is quick.\n" * 5 for i in range(40)]
    for tokens, num_bytes in encode_documents(tokenizer, texts):
        writer.add(tokens, num_bytes)
    return writer.close()


@pytest.fixture
def loader(haystack, tokenizer):
    def make(tasks=TASKS, seq_len=2048, seed=0):
        return SyntheticLoader(haystack, tokenizer, tasks, seq_len, seed)

    return make


def documents(loader, tokenizer, samples=20):
    """Texts of the documents, after checking what the batch promises."""
    batch = loader.batch(0, samples)
    ends = batch.cu_seqlens.tolist()
    assert ends[-1] == len(batch.tokens) == samples * loader.seq_len
    assert set(range(0, ends[-1] + 1, loader.seq_len)) <= set(ends)
    eot = end_of_text_id(tokenizer)
    texts = []
    for start, end in zip(ends, ends[1:], strict=False):
        tokens = batch.tokens[start:end]
        assert (tokens == eot).sum() == 1 and tokens[0] == eot
        assert batch.positions[start:end].tolist() == list(range(end - start))
        assert torch.equal(batch.targets[start:end], torch.cat([tokens[1:], torch.tensor([eot])]))
        assert SHORTEST <= end - start <= batch.max_seqlen
        texts.append(tokenizer.decode(tokens[1:].tolist()))
    return texts


@pytest.mark.parametrize("task", TASKS)
def test_what_is_asked_can_be_read_in_the_document(loader, tokenizer, task):
    lengths = set()
    for text in documents(loader([task]), tokenizer):
        if task == "copy":
            (mark,) = [mark for mark in COPY if mark in text]
            passage, again = text.split(mark)
            assert len(again) > 30 and passage.startswith(again)
            continue
        body, ending = text.rsplit("\n\n", 1)
        assert "fox jumps" in body
        assert task == "needle" or "fox jumps" not in ending  # whose questions may be any words
        if task == "variables":
            value, names = re.fullmatch(r"The names that came to be (\d+): (.*)\.", ending).groups()
            given = dict(re.findall(r"let (\S+) be (?:the same as )?(\S+)\.", body))

            def resolve(name, given=given):
                return resolve(given[name]) if name in given else name

            assert {name for name in given if resolve(name) == value} == set(names.split(", "))
        else:
            for answer in re.findall(r"\d{4,}", ending):
                assert len(re.findall(rf"\b{answer}\b", body)) == 1
        lengths.add(len(text))
    assert task == "copy" or len(lengths) > 10


def test_the_same_sample_whoever_asks_and_whenever(loader):
    whole = loader().batch(3, 4)
    assert torch.equal(whole.tokens, torch.cat([loader().batch(i, 1).tokens for i in range(3, 7)]))
    assert not torch.equal(loader(seed=1).batch(3, 4).tokens, whole.tokens)
    assert not torch.equal(loader().batch(0, 1).tokens, loader().batch(1, 1).tokens)


def test_stages_go_on_with_new_samples(loader):
    first, later = loader(seq_len=1024), loader(seq_len=1024).next_stage(1024, consumed=5)
    assert torch.equal(later.batch(0, 2).tokens, first.batch(5, 2).tokens)
    assert later.next_stage(2048, 3).batch(0, 1).max_seqlen <= 2048


def test_a_short_sequence_is_refused(loader):
    with pytest.raises(ValueError, match="synthetic tasks need 512 tokens"):
        loader(seq_len=256)


def four_words(text: str) -> set[tuple[str, ...]]:
    """Every four words in a row, placeholders aside."""
    words = re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", text.lower()))
    return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}


def strings(*paths):
    """Every string in the code but the docstrings."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    constants = {node for node in nodes if isinstance(node, ast.Constant)} - docstrings
    return [node.value for node in constants if isinstance(node.value, str)]


def test_training_and_evaluation_share_no_wording_and_no_key():
    """Every string of data/synthetic.py against every one in eval/, whatever it is for."""
    theirs = strings(*(ROOT / "eval").rglob("*.py"))
    evaluated = set().union(*map(four_words, theirs))
    assert len(evaluated) > 100
    for string in strings(ROOT / "data/synthetic.py"):
        assert not four_words(string) & evaluated, string
    rng = random.Random(0)
    names = {made_up_name(rng) for _ in range(20_000)}
    assert len(names) > 19_000 and all("-" in name for name in names)
    assert not names & {word for string in theirs for word in string.split()}
    assert not {*KEY_NOUNS, *KEY_ADJECTIVES} & {*NOUNS, *ADJECTIVES}


def test_needles_come_in_many_wordings(loader, tokenizer):
    endings = [t.rsplit("\n\n", 1)[1] for t in documents(loader(["needle"]), tokenizer, 150)]
    questions = re.findall(r"([^.?]+?) \d{4,}\.", " ".join(endings))
    wordings = {re.sub(r"[A-Z][a-z]+-[A-Z][a-z]+", "{key}", q) for q in questions}
    assert len(questions) > 200 and len(wordings) > len(questions) / 4


def test_depths_are_spread_over_the_document(loader, tokenizer):
    depths = []
    for text in documents(loader(["passkey"], seq_len=1024), tokenizer, samples=60):
        number = re.findall(r"\d{4,}", text)[-1]
        depths.append(text.index(number) / len(text))
    assert np.quantile(depths, 0.2) < 0.35 and np.quantile(depths, 0.8) > 0.6


def test_questions_follow_their_statements_all_over_the_document(loader, tokenizer):
    places = []
    for text in documents(loader(["recall"], seq_len=4096), tokenizer, samples=40):
        pairs = re.findall(r"\S* -> \d+;", text)
        assert {pairs.count(pair) for pair in pairs} == {2}  # as stated, and as asked for
        assert text.endswith(pairs[-1])
        places += [text.rindex(pair) / len(text) for pair in set(pairs)]
    assert len(places) > 200 and np.quantile(places, 0.2) < 0.75 < np.quantile(places, 0.6)


def test_no_question_stands_before_its_statement(loader, tokenizer, monkeypatch):
    numbers = range(5)

    def task(*_):
        questions = [Question(f"Asked: {i}!", str(i), i) for i in numbers for _ in range(3)]
        return [f"Stated: {i}." for i in numbers], questions[::-1]

    monkeypatch.setitem(SENTENCES, "needle", task)
    for text in documents(loader(["needle"]), tokenizer, samples=30):
        for i in numbers:
            assert text.count(f"Asked: {i}!") == 3
            assert 0 <= text.find(f"Stated: {i}.") < text.find(f"Asked: {i}!")


def marked(batch, tokenizer):
    """What is marked as answers, a list of texts for each document."""
    found = []
    ends = batch.cu_seqlens.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        edges = (
            torch.nn.functional.pad((batch.answers[start:end] > 0).int(), (1, 1))
            .diff()
            .nonzero()[:, 0]
        )
        targets = batch.targets[start:end]
        found.append([tokenizer.decode(targets[a:b].tolist()) for a, b in edges.view(-1, 2)])
    return found


def test_the_answers_are_marked_with_the_space_before_them(loader, tokenizer, monkeypatch):
    answers = ["12345", "lazy dog", "7"]

    def task(*_):
        questions = [Question(f"{a} {i}? {a}.", a, i) for i, a in enumerate(answers)]
        return ["Stated."] * 3, questions

    monkeypatch.setitem(SENTENCES, "needle", task)
    for found in marked(loader(["needle"]).batch(0, 30), tokenizer):
        assert sorted(found) == sorted(f" {answer}" for answer in answers)


@pytest.mark.parametrize("task", SENTENCES)
def test_only_answers_are_marked(loader, tokenizer, monkeypatch, task):
    draw, answers = SENTENCES[task], set()

    def recorded(*args):
        statements, questions = draw(*args)
        answers.update(f" {question.answer}" for question in questions)
        return statements, questions

    monkeypatch.setitem(SENTENCES, task, recorded)
    batch = loader([task]).batch(0, 30)
    documents = marked(batch, tokenizer)
    assert all(documents) and {answer for found in documents for answer in found} <= answers
    if task == "recall":  # every pair is stated, and asked for
        pairs = tokenizer.decode(batch.targets.tolist()).count(" -> ")
        assert 2 * sum(map(len, documents)) == pairs


def test_the_answers_of_a_document_add_up_to_its_length(loader):
    batch = loader([*SENTENCES, "copy"]).batch(0, 30)
    ends = batch.cu_seqlens.tolist()
    copies = 0
    for start, end in zip(ends, ends[1:], strict=False):
        answers = batch.answers[start:end]
        assert len(answers[answers > 0].unique()) <= 1
        assert answers.sum().item() in (0, pytest.approx(end - start))
        copies += not answers.any()
    assert 0 < copies < len(ends) / 2


def test_a_copy_has_no_answers(loader):
    assert not loader(["copy"]).batch(0, 5).answers.any()


def test_much_is_asked_and_half_of_the_samples_are_one_document(loader, tokenizer):
    texts = documents(loader(["recall"], seq_len=8192), tokenizer, samples=30)
    asked = [text.count("->") / 2 for text in texts]
    per_token = sum(asked) / (30 * 8192)
    assert 1 / 1000 < per_token < 1 / 96  # at the densest one in 48, then one in two is a statement
    assert min(asked) <= 2  # and few in a document are not rare
    ends = loader(["passkey"], seq_len=8192).batch(0, 200).cu_seqlens
    whole = int((ends.diff() == 8192).sum())
    assert 70 < whole < 130
