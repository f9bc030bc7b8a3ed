"""Planted behaviour gets exactly the score it deserves; samples are what they claim to be."""

import dataclasses
import itertools
import json
import re
from contextlib import nullcontext
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
from eval.lm import DecoderLM
from eval.needle_samples import TASKS, check_lengths, make_sample
from eval.records import Records
from eval.words import ADJECTIVES, NOUNS
from model.checkpoint import load_checkpoint, save_weights
from tests.eval.conftest import TEXT, run_script
from tests.eval.planted import Favourite, Guesser, Indifferent, Reader
from tests.eval.tiny import decoder

MODELS = {
    "model": {
        "_target_": "model.decoder.Decoder", "dim": 32, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "ffn_dim": 64,
    },
    "attention": {"_target_": "model.attention.full.FullAttention"},
}  # fmt: skip


def find_values(text):
    """The seven-digit numbers that statements in the text give to the keys of its question."""
    text, _, question = text.rpartition("\n\n")
    asked = [noun for noun in NOUNS if re.search(rf"\b{noun}\b", question)]
    statements = re.findall(r"[^.]* \d{7}\b(?=\.)", text)
    return [s[-7:] for s in statements if any(noun in s for noun in asked)]


def measured(lm, tokenizer, haystack, settings, tmp_path):
    """All records of the grid, not resumed."""
    return [
        record
        for task in settings.tasks
        for length in settings.lengths
        for record in needle.measure(
            lm, tokenizer, haystack, settings, task, length,
            Records(tmp_path / "none" / f"{task}{length}.json", needle.KEYS, {}),
        )
    ]  # fmt: skip


@pytest.fixture
def everything(settings):
    return dataclasses.replace(settings, tasks=list(TASKS))


def test_a_model_that_reads_gets_everything(tokenizer, haystack, everything, tmp_path):
    lm = Reader(tokenizer, find_values)
    rows = summarize(measured(lm, tokenizer, haystack, everything, tmp_path), "task", "length")
    assert len(rows) == 8
    for row in rows:
        assert (row["generation"], row["ranking"], row["samples"]) == (1.0, 1.0, 18), row


@pytest.mark.parametrize(("sight", "lengths"), [(160, [320, 512]), (4096, [2048, 8192])])
def test_a_model_blind_beyond_k_tokens_finds_exactly_the_needles_within(
    tokenizer, haystack, everything, tmp_path, sight, lengths
):
    settings = dataclasses.replace(everything, lengths=lengths)
    lm = Reader(tokenizer, find_values, sight)
    found = measured(lm, tokenizer, haystack, settings, tmp_path)
    for record in found:
        whole = touched = 0.0  # the share of the asked needles that are seen whole, or in part
        for needle_text, place in zip(record["needles"], record["positions"], strict=True):
            if any(value in needle_text for value in record["values"]):
                left = record["prompt_tokens"] - place
                tokens = len(tokenizer.encode(" " + needle_text).ids)
                whole += (left <= sight) / len(record["values"])
                touched += (left - tokens < sight) / len(record["values"])
        assert whole - 1e-9 <= record["generation"] <= touched + 1e-9
        assert record["ranking"] >= whole - 1e-9
        if record["length"] < sight:
            assert record["generation"] == record["ranking"] == 1
    outcomes = {(r["task"], r["generation"]) for r in found}
    assert {("single", 0), ("single", 1), ("multi_value", 0), ("multi_value", 1 / 3)} <= outcomes
    single = [r for r in found if r["task"] == "single" and r["length"] == lengths[-1]]
    by_depth = {row["depth"]: row["generation"] for row in summarize(single, "depth")}
    assert (by_depth[0.0], by_depth[100.0]) == (0.0, 1.0)


@pytest.mark.parametrize("model", [Guesser, Indifferent, Favourite])
@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_does_not_read_ranks_at_chance(
    model, task, tokenizer, haystack, settings, tmp_path
):
    settings = dataclasses.replace(settings, tasks=[task], lengths=[288], samples=150)
    [row] = summarize(measured(model(), tokenizer, haystack, settings, tmp_path), "length")
    assert row["generation"] == 0
    assert settings.chance(task) == (0.6 if task in ("multi_value", "multi_query") else 0.2)
    assert abs(row["ranking"] - settings.chance(task)) < 0.065  # 3.4 deviations


@pytest.mark.parametrize("values", ["numbers", "words"])
@pytest.mark.parametrize("task", TASKS)
def test_samples_have_exactly_their_length_and_their_needles_at_sentence_ends(
    values, task, tokenizer, haystack, settings
):
    settings = dataclasses.replace(settings, values=values)
    starts = set()
    for length in (320, 511, 1024):
        for depth in (0.0, 30.0, 50.0, 100.0):
            for index in range(3):
                sample = make_sample(haystack, tokenizer, settings, task, length, depth, index)
                assert len(sample.prompt) == length - settings.answer_tokens(task)
                assert sample.prompt[0] == end_of_text_id(tokenizer)
                text = tokenizer.decode(sample.prompt, skip_special_tokens=True)
                assert text.endswith("\n\n" + sample.question)
                assert len(sample.needles) == (1 if task == "single" else 3)
                for statement, place in zip(sample.needles, sample.positions, strict=True):
                    assert text.count(statement) == 1
                    before = tokenizer.decode(sample.prompt[:place], skip_special_tokens=True)
                    assert not before or re.search(r"(?<!Mr)(?<!Mrs)[.?]\"?$", before)
                    assert tokenizer.decode(sample.prompt[place:]).startswith(" " + statement)
                hay = text[: text.rindex("\n\n")]
                for statement in sample.needles:
                    hay = hay.replace(" " + statement, "")
                first = tokenizer.decode(sample.prompt[: sample.positions[0]])
                for statement in sample.needles[1:]:
                    first = first.replace(" " + statement, "")
                assert abs(len(first) / len(hay) - depth / 100) < 100 / len(hay)  # a sentence
                assert len(set(sample.candidates)) == settings.candidates
                assert not any(c in hay.lower() for c in sample.candidates)
                right = {sample.candidates[i] for i in sample.answers}
                there = {c for c in sample.candidates if any(c in n for n in sample.needles)}
                assert right <= there and len(right) == settings.answers(task)
                starts.add(hay[:60])
    assert len(starts) > 18  # different places in the text


def test_tasks_ask_for_what_they_say(tokenizer, haystack, settings):
    for index in range(6):
        for task, keys, asked in (
            ("single", 1, 1), ("multi_key", 3, 1), ("multi_value", 1, 1), ("multi_query", 3, 3),
        ):  # fmt: skip
            sample = make_sample(haystack, tokenizer, settings, task, 512, 50.0, index)
            nouns = [n for n in NOUNS if any(re.search(rf"\b{n}\b", s) for s in sample.needles)]
            assert len(nouns) == keys
            assert sum(bool(re.search(rf"\b{n}\b", sample.question)) for n in nouns) == asked


def test_the_same_sample_in_whatever_grid(tokenizer, haystack, settings):
    other = dataclasses.replace(settings, lengths=[512], depths=5, samples=2)
    args = ("multi_key", 512, 50.0, 1)
    assert make_sample(haystack, tokenizer, settings, *args) == make_sample(
        haystack, tokenizer, other, *args
    )
    reseeded = dataclasses.replace(settings, seed=1)
    assert make_sample(haystack, tokenizer, reseeded, *args) != make_sample(
        haystack, tokenizer, settings, *args
    )


def test_nothing_that_is_hidden_occurs_in_the_text_already(tokenizer, settings):
    settings = dataclasses.replace(settings, values="words")
    spoken = NOUNS[:60]
    tokens = np.array(tokenizer.encode(" ".join(spoken).upper() + ". ").ids)
    haystack = Haystack([tokens], tokenizer, longest=2048)
    for index in range(20):
        sample = make_sample(haystack, tokenizer, settings, "single", 2048, 50.0, index)
        assert not set(sample.candidates) & set(spoken)
    crowded = np.array(tokenizer.encode(" ".join(NOUNS) + ". ").ids)
    haystack = Haystack([crowded], tokenizer, 2048)
    with pytest.raises(ValueError, match="values=numbers"):
        make_sample(haystack, tokenizer, settings, "single", 2048, 50.0, 0)


def test_no_word_hides_in_another():
    for words in (NOUNS, ADJECTIVES):
        for word in words:
            assert sum(word in other for other in words) == 1


def test_a_short_text_is_repeated_and_one_without_sentences_is_cut_anywhere(tokenizer):
    tokens = np.array(tokenizer.encode("no full stop " * 10).ids)
    haystack = Haystack([tokens], tokenizer, longest=300)
    assert haystack.size == len(tokens) and len(haystack.tokens) == len(tokens) + 300
    assert haystack.cut(0, 100, 0.37) == 37


def test_too_short_a_length_says_what_would_do(tokenizer, haystack, settings):
    with pytest.raises(ValueError, match="64 tokens leave no room .* would be a start"):
        make_sample(haystack, tokenizer, settings, "single", 64, 50.0, 0)


def test_non_finite_scores_are_an_error(tokenizer, haystack, settings, tmp_path):
    lm = Guesser()
    lm.score = lambda prompts, candidates: [[float("nan")] * len(those) for those in candidates]
    with pytest.raises(ValueError, match="not finite"):
        measured(lm, tokenizer, haystack, settings, tmp_path)


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
    settings = dataclasses.replace(
        settings, lengths=[288], samples=2, max_new_tokens=4, haystack=str(text)
    )
    first = needle.run_needle(checkpoint, settings, say=lambda line: None)
    folder = tmp_path / "run" / "eval" / "needle"
    stem = folder / "step_00000007"
    assert json.loads(stem.with_suffix(".json").read_text()) == first
    assert first["step"] == 7 and len(first["cells"]) == 3 and first["chance"] == {"single": 0.2}
    assert len(stem.with_suffix(".csv").read_text().splitlines()) == 4
    assert min(Image.open(stem.with_suffix(".png")).size) > 200
    assert "length" in needle.table(first)

    scored = []
    monkeypatch.setattr(
        needle, "make_sample", lambda *args, **key: scored.append(key) or make_sample(*args, **key)
    )
    assert needle.run_needle(checkpoint, settings, say=lambda line: None) == first
    assert not scored
    larger = dataclasses.replace(settings, samples=3)
    extended = needle.run_needle(checkpoint, larger, say=lambda line: None)
    assert len(scored) == 3 and len(extended["samples"]) == 9
    both = dataclasses.replace(settings, tasks=["single", "multi_query"])
    extended = needle.run_needle(checkpoint, both, say=lambda line: None)
    assert len(scored) == 9 and len(extended["samples"]) == 15 and len(extended["cells"]) == 6
    assert min(Image.open(stem.with_suffix(".png")).size) > 200
    reseeded = dataclasses.replace(settings, seed=1)
    needle.run_needle(checkpoint, reseeded, say=lambda line: None)
    assert len(scored) == 15
    weights = checkpoint.model.state_dict() | {"norm.weight": torch.full((32,), 2.0)}
    save_weights(checkpoint.path, weights, MODELS, checkpoint.tokenizer)
    needle.run_needle(load_checkpoint(checkpoint.path), reseeded, say=lambda line: None)
    assert len(scored) == 21


def test_an_interrupted_grid_goes_on_where_it_stopped(
    tokenizer, haystack, settings, tmp_path, monkeypatch
):
    class Stopping(Guesser):
        def generate(self, prompts, max_new_tokens):
            self.left -= len(prompts)
            if self.left < 0:
                raise KeyboardInterrupt
            return super().generate(prompts, max_new_tokens)

    finished, unfinished = tmp_path / "grid.json", tmp_path / "grid.unfinished"

    def grid(lm):
        records = Records(finished, needle.KEYS, {"lm": "guesser"})
        needle.measure(lm, tokenizer, haystack, settings, "single", 320, records)
        return records

    before = Records(finished, needle.KEYS, {"lm": "another"}).write({"step": 1})
    lm = Stopping()
    monkeypatch.setattr(needle, "BATCH_TOKENS", 4 * 320)  # four at once
    for left, done in ((9, 8), (9, 16), (9, 18)):
        lm.left = left
        if done < 18:
            with pytest.raises(KeyboardInterrupt):
                grid(lm)
            assert len(json.loads(unfinished.read_text())["samples"]) == done
            assert json.loads(finished.read_text()) == before
        else:
            records = grid(lm)
            assert lm.left == 9 - 2
    # Finished results of other settings in between leave what is to be gone on with.
    other = Records(finished, needle.KEYS, {"lm": "another"}).write({"step": 2})
    assert other["step"] == 2 and len(json.loads(unfinished.read_text())["samples"]) == 16
    assert len(records.write({"step": 3})["samples"]) == 18 and not unfinished.exists()
    lm.left = 0
    assert len(grid(lm).known) == 18 and not unfinished.exists()


def test_a_refused_grid_leaves_the_files_as_they_are(checkpoint, settings, tmp_path):
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    settings = dataclasses.replace(
        settings, lengths=[288], depths=1, samples=1, max_new_tokens=4, haystack=str(text)
    )
    short = dataclasses.replace(settings, lengths=[288, 20])
    folder = tmp_path / "run" / "eval"
    with pytest.raises(ValueError, match="20 tokens leave no room .* would be a start"):
        needle.run_needle(checkpoint, short, say=lambda line: None)
    assert not folder.exists()
    needle.run_needle(checkpoint, settings, say=lambda line: None)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(ValueError, match="20 tokens leave no room"):
        needle.run_needle(checkpoint, short, say=lambda line: None)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_length_is_refused_if_any_of_its_samples_has_no_room(tokenizer, haystack, settings):
    settings = dataclasses.replace(settings, tasks=["single"], samples=12)
    mixed = 0  # lengths that some samples fit and others do not
    for length in range(80, 320, 8):
        settings = dataclasses.replace(settings, lengths=[length])
        fits = set()
        for depth, index in itertools.product(settings.depth_percents, range(settings.samples)):
            try:
                make_sample(haystack, tokenizer, settings, "single", length, depth, index)
                fits.add(True)
            except ValueError:
                fits.add(False)
        mixed += len(fits) == 2
        with pytest.raises(ValueError, match="no room") if False in fits else nullcontext():
            check_lengths(haystack, tokenizer, settings)
    assert mixed


def test_the_recall_of_the_values_blocks_is_told(tokenizer, haystack, settings):
    attention = {"_target_": "model.attention.nsa.NSAAttention", "select_block": 16, "window": 32,
                 "compress_block": 16, "compress_stride": 8, "num_selected": 4}  # fmt: skip
    models = MODELS | {"attention": attention}
    lm = DecoderLM(decoder(models, tokenizer.get_vocab_size()), set())
    samples = [
        make_sample(haystack, tokenizer, settings, "multi_query", 640, depth, 0)
        for depth in (0.0, 100.0)
    ]
    for sample in samples:
        places = needle.value_places(tokenizer, sample)
        values = {sample.candidates[i] for i in sample.answers}
        found = {tokenizer.decode(sample.prompt[place : place + 8]).strip() for place in places}
        assert len(places) == len(values) == settings.needles
        assert all(any(text.startswith(value) for text in found) for value in values)
    records = list(needle.score_samples(lm, tokenizer, samples, 4))
    for record in records:
        assert 0 < record["selected/chance"] < 0.2
        assert all(0 <= record[f"selected/layer_{i:02d}"] <= 1 for i in range(2))
    records = [r | {"length": 640} for r in records]
    [row] = summarize(records, "length")
    mean = sum(r["selected/layer_01"] for r in records) / 2
    assert row["selected/layer_01"] == pytest.approx(mean, abs=1e-4)


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
        ({"tasks": ["double"]}, "choose among single"),
        ({"tasks": ["multi_key"], "needles": 5}, "needs 6 to"),
        ({"needles": 1}, "needles=1"),
    ],
)
def test_settings_are_checked(settings, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **change)
    with pytest.raises(ValueError, match="eval.during.samples=0; at least 1, or null"):
        dataclasses.replace(settings.during, samples=0)


def test_the_script(checkpoint, tmp_path):
    text = tmp_path / "a text, held out.txt"
    text.write_text(TEXT)
    run = tmp_path / "run"
    arguments = ["lengths=[288]", "depths=1", "samples=1", f"haystack='{text}'"]
    script = partial(run_script, "eval/needle.py", *arguments)
    done = script(f"checkpoint={run}")
    assert done.returncode == 0 and "generation" in done.stdout, done.stderr
    assert (run / "eval" / "needle" / "step_00000007.json").exists()
    done = script("checkpoint=nowhere")
    assert done.returncode == 1
    assert "nowhere is neither a checkpoint" in done.stderr and done.stderr.count("\n") == 1
