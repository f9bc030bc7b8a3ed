"""Planted behaviour gets exactly the score it deserves; samples are what they claim to be."""

import dataclasses
import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.config import ROOT
from data.tokenizer import end_of_text_id
from eval import needle
from eval.accuracy import summarize, wilson
from eval.haystack import Haystack
from model.checkpoint import load_checkpoint, save_weights
from tests.eval.conftest import TEXT, run_script
from tests.eval.tiny import decoder

MODELS = {
    "model": {
        "_target_": "model.decoder.Decoder", "dim": 32, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "ffn_dim": 64,
    },
    "attention": {"_target_": "model.attention.full.FullAttention"},
}  # fmt: skip


class Reader:
    """Sees the last `sight` tokens and answers with the value of the needle, if that is there."""

    def __init__(self, tokenizer, sight=10**9):
        self.tokenizer, self.sight = tokenizer, sight

    def answer(self, prompt):
        text = self.tokenizer.decode(prompt[-self.sight :])
        text = text.rpartition("\n\n")[0]  # without the question
        found = re.search(r"\b(\d{7})\b\.", text)
        return found and " " + found[1]

    def generate(self, prompts, max_new_tokens):
        answers = [self.answer(p) or " no idea" for p in prompts]
        return [self.tokenizer.encode(a).ids[:max_new_tokens] for a in answers]

    def score(self, prompt, candidates):
        answer = self.answer(prompt)
        return [-0.1 if self.tokenizer.decode(c) == answer else -9.0 for c in candidates]


class Guesser:
    """Never looks at the prompt."""

    def __init__(self, tokenizer):
        self.rng = random.Random(0)

    def generate(self, prompts, max_new_tokens):
        return [[] for _ in prompts]

    def score(self, prompt, candidates):
        return [self.rng.random() for _ in candidates]


class Indifferent(Guesser):
    def score(self, prompt, candidates):
        return [-1.0 for _ in candidates]


class Favourite(Guesser):
    """Has a taste in values, and follows it."""

    def score(self, prompt, candidates):
        return [float(np.cos(np.dot(c, np.arange(len(c))))) for c in candidates]


def records(lm, tokenizer, haystack, settings):
    return [
        record
        for length in settings.lengths
        for record in needle.measure(lm, tokenizer, haystack, settings, length)
    ]


def test_a_model_that_reads_gets_everything(tokenizer, haystack, settings):
    for row in summarize(records(Reader(tokenizer), tokenizer, haystack, settings), "length"):
        assert (row["generation"], row["ranking"], row["samples"]) == (1.0, 1.0, 18)


def test_a_model_blind_beyond_k_tokens_finds_exactly_the_needles_within(
    tokenizer, haystack, settings
):
    sight = 120
    found = records(Reader(tokenizer, sight), tokenizer, haystack, settings)
    outcomes = set()
    for record in found:
        left = record["prompt_tokens"] - record["position"]  # tokens from the needle's start
        statement = len(tokenizer.encode(" " + record["needle"]).ids)
        if left <= sight:
            assert record["generation"] and record["ranking"]
        if left - statement > sight:
            assert not record["generation"]
        outcomes.add(record["generation"])
    assert outcomes == {True, False}
    by_depth = {row["depth"]: row["generation"] for row in summarize(found, "depth")}
    assert (by_depth[0.0], by_depth[100.0]) == (0.0, 1.0)


@pytest.mark.parametrize("model", [Guesser, Indifferent, Favourite])
def test_a_model_that_does_not_read_ranks_at_chance(model, tokenizer, haystack, settings):
    settings = dataclasses.replace(settings, lengths=[224], samples=200)
    [row] = summarize(records(model(tokenizer), tokenizer, haystack, settings), "length")
    assert row["generation"] == 0
    assert abs(row["ranking"] - 1 / settings.candidates) < 0.06  # 3.4 deviations


@pytest.mark.parametrize("values", ["numbers", "words"])
def test_samples_have_exactly_their_length_and_one_needle_at_a_sentence_end(
    values, tokenizer, haystack, settings
):
    settings = dataclasses.replace(settings, values=values)
    starts = set()
    for length in (200, 511, 1024):
        for depth in (0.0, 30.0, 50.0, 100.0):
            for index in range(4):
                sample = needle.make_sample(haystack, tokenizer, settings, length, depth, index)
                assert len(sample.prompt) == length - settings.max_new_tokens
                assert sample.prompt[0] == end_of_text_id(tokenizer)
                text = tokenizer.decode(sample.prompt, skip_special_tokens=True)
                assert text.count(sample.needle) == 1 and text.endswith("\n\n" + sample.question)
                before, after = text.split(" " + sample.needle)
                assert not before or re.search(r"(?<!Mr)(?<!Mrs)[.?]\"?$", before)
                assert not after or after[0].isspace()
                hay = before + after[: after.rindex("\n\n")]
                assert abs(len(before) / len(hay) - depth / 100) < 100 / len(hay)  # a sentence
                assert len(set(sample.candidates)) == settings.candidates
                assert not any(c in hay.lower() for c in sample.candidates)
                starts.add(hay[:60])
    assert len(starts) > 24  # different places in the text


def test_the_same_sample_in_whatever_grid(tokenizer, haystack, settings):
    other = dataclasses.replace(settings, lengths=[512], depths=5, samples=2)
    args = (512, 50.0, 1)
    assert needle.make_sample(haystack, tokenizer, settings, *args) == needle.make_sample(
        haystack, tokenizer, other, *args
    )
    reseeded = dataclasses.replace(settings, seed=1)
    assert needle.make_sample(haystack, tokenizer, reseeded, *args) != needle.make_sample(
        haystack, tokenizer, settings, *args
    )


def test_nothing_that_is_hidden_occurs_in_the_text_already(tokenizer, settings):
    settings = dataclasses.replace(settings, values="words")
    spoken = needle.WORDS[:60]
    tokens = np.array(tokenizer.encode(" ".join(spoken).upper() + ". ").ids)
    haystack = Haystack([tokens], tokenizer, longest=2048)
    for index in range(20):
        sample = needle.make_sample(haystack, tokenizer, settings, 2048, 50.0, index)
        assert not set(sample.candidates) & set(spoken)
    crowded = np.array(tokenizer.encode(" ".join(needle.WORDS) + ". ").ids)
    with pytest.raises(ValueError, match="values=numbers"):
        needle.make_sample(Haystack([crowded], tokenizer, 2048), tokenizer, settings, 2048, 50.0, 0)


def test_no_word_hides_in_another():
    for word in needle.WORDS:
        assert sum(word in other for other in needle.WORDS) == 1


def test_a_short_text_is_repeated_and_one_without_sentences_is_cut_anywhere(tokenizer):
    tokens = np.array(tokenizer.encode("no full stop " * 10).ids)
    haystack = Haystack([tokens], tokenizer, longest=300)
    assert haystack.size == len(tokens) and len(haystack.tokens) == len(tokens) + 300
    assert haystack.cut(0, 100, 0.37) == 37


def test_too_short_a_length_says_what_would_do(tokenizer, haystack, settings):
    with pytest.raises(ValueError, match="64 tokens leave no room .* would be a start"):
        needle.make_sample(haystack, tokenizer, settings, 64, 50.0, 0)


def test_non_finite_scores_are_an_error(tokenizer, haystack, settings):
    lm = Guesser(tokenizer)
    lm.score = lambda prompt, candidates: [float("nan")] * len(candidates)
    with pytest.raises(ValueError, match="not finite"):
        records(lm, tokenizer, haystack, settings)


def test_wilson_interval():
    low, high = wilson(8, 10)  # the textbook's example
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1
    assert wilson(0, 5)[1] > 0.4  # five failures prove little


# -- the decoder behind it, and the files


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    folder = tmp_path / "run" / "checkpoints" / "step_00000007"
    model = decoder(MODELS, tokenizer.get_vocab_size())
    recipe = yaml.safe_load((ROOT / "conf/eval/needle.yaml").read_text())
    save_weights(folder, model.state_dict(), MODELS | {"eval": recipe}, tokenizer)
    return load_checkpoint(tmp_path / "run")


def test_files_and_resumption(checkpoint, settings, tmp_path, monkeypatch):
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    settings = dataclasses.replace(settings, lengths=[224], samples=2, haystack=str(text))
    first = needle.run_needle(checkpoint, settings, say=lambda line: None)
    folder = tmp_path / "run" / "eval" / "needle"
    stem = folder / "step_00000007"
    assert json.loads(stem.with_suffix(".json").read_text()) == first
    assert first["step"] == 7 and len(first["cells"]) == 3 and first["chance"] == 0.25
    assert len(stem.with_suffix(".csv").read_text().splitlines()) == 4
    assert min(Image.open(stem.with_suffix(".png")).size) > 200
    assert "length" in needle.table(first)

    scored = []
    original = needle.score_sample
    monkeypatch.setattr(
        needle, "score_sample", lambda *args: scored.append(args) or original(*args)
    )
    assert needle.run_needle(checkpoint, settings, say=lambda line: None) == first
    assert not scored
    larger = dataclasses.replace(settings, samples=3)
    extended = needle.run_needle(checkpoint, larger, say=lambda line: None)
    assert len(scored) == 3 and len(extended["samples"]) == 9
    reseeded = dataclasses.replace(settings, seed=1)
    needle.run_needle(checkpoint, reseeded, say=lambda line: None)
    assert len(scored) == 9
    weights = checkpoint.model.state_dict() | {"norm.weight": torch.full((32,), 2.0)}
    save_weights(checkpoint.path, weights, MODELS, checkpoint.tokenizer)
    needle.run_needle(load_checkpoint(checkpoint.path), reseeded, say=lambda line: None)
    assert len(scored) == 15


def test_without_held_out_text_it_says_so(checkpoint, settings):
    with pytest.raises(FileNotFoundError, match="haystack=file.txt"):
        needle.run_needle(checkpoint, settings)
    missing = dataclasses.replace(settings, haystack="nowhere.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        needle.run_needle(checkpoint, missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"lengths": []}, "lengths=\\[\\]"),
        ({"lengths": ["a"]}, "token counts"),
        ({"candidates": 1}, "candidates=1"),
    ],
)
def test_settings_are_checked(settings, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **change)


def test_the_script(checkpoint, tmp_path):
    text = tmp_path / "a text, held out.txt"
    text.write_text(TEXT)
    run = tmp_path / "run"
    arguments = ["lengths=[224]", "depths=1", "samples=1", f"haystack='{text}'"]
    script = partial(run_script, "eval/needle.py", *arguments)
    done = script(f"checkpoint={run}")
    assert done.returncode == 0 and "generation" in done.stdout, done.stderr
    assert (run / "eval" / "needle" / "step_00000007.json").exists()
    done = script("checkpoint=nowhere")
    assert done.returncode == 1
    assert "nowhere is neither a checkpoint" in done.stderr and done.stderr.count("\n") == 1
