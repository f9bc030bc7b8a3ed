"""Recall by distance: exactly 1 for who reads, 0 for who does not, and the step of the half-blind."""

import json

import pytest

from eval import recall
from eval.records import Records
from model.checkpoint import save_weights
from tests.eval.conftest import run_script
from tests.eval.planted import Guesser, Reader
from tests.eval.test_needle import MODELS
from tests.eval.tiny import decoder

SETTINGS = recall.RecallSettings(length=1024, pairs=16, samples=12, seed=0)


def measured(lm, tmp_path, settings=SETTINGS):
    records = Records(tmp_path / "r.json", ("index",), {})
    return recall.measure(lm, settings, vocabulary=300, end=0, records=records), records


def test_sequences_ask_once_for_what_only_the_first_pair_tells():
    distances = []
    for index in range(SETTINGS.samples):
        tokens, queries = recall.make_sequence(SETTINGS, 300, 0, index)
        assert len(tokens) == 1024 and tokens[0] == 0 and len(queries) == 16
        for second, distance in queries:
            first = second - distance
            assert tokens[first : first + 2] == tokens[second : second + 2]
            assert [i for i, t in enumerate(tokens) if t == tokens[second]] == [first, second]
            assert [i for i, t in enumerate(tokens) if t == tokens[second + 1]] == [
                first + 1, second + 1,
            ]  # fmt: skip
            distances.append(distance)
        assert tokens[1:].count(0) == 0
    assert min(distances) < 8 and max(distances) > 256  # log-uniform from 2 to half the length
    assert recall.make_sequence(SETTINGS, 300, 0, 3) != recall.make_sequence(SETTINGS, 300, 0, 4)


def test_planted_behaviour(tmp_path):
    rows, records = measured(Reader(None), tmp_path / "a")
    assert [row["distance"] for row in rows] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert sum(row["samples"] for row in rows) == 16 * 12
    assert all(row["accuracy"] == 1 and row["logprob"] == -0.1 for row in rows)
    rows, _ = measured(Guesser(), tmp_path / "b")
    assert all(row["accuracy"] == 0 and row["logprob"] == -7 for row in rows)


@pytest.mark.parametrize(("sight", "length"), [(100, 1024), (4096, 16384)])
def test_blind_beyond_k_tokens(tmp_path, sight, length):
    settings = recall.RecallSettings(length=length, pairs=16, samples=12, seed=0)
    rows, records = measured(Reader(None, sight=sight), tmp_path / "c", settings)
    for row in rows:
        inside = [
            d < sight for sample in records.known.values() for d in sample["distances"]
            if row["distance"] <= d < 2 * row["distance"]
        ]  # fmt: skip
        assert row["accuracy"] == pytest.approx(sum(inside) / len(inside), abs=1e-4)
        assert row["accuracy"] == (row["distance"] < sight) or row["distance"] == 64


def test_what_can_not_be_says_so(tmp_path):
    for change, message in (
        (dict(length=100), "need length=256"), (dict(samples=0), "samples=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recall.RecallSettings(**{"length": 512, "pairs": 16, "samples": 1, "seed": 0} | change)
    with pytest.raises(ValueError, match="vocabulary of 64 tokens; this tokenizer has 50"):
        recall.make_sequence(SETTINGS, 50, 0, 0)


def test_the_script(tmp_path, tokenizer):
    folder = tmp_path / "run" / "checkpoints" / "step_00000007"
    models = MODELS | {"attention": {"_target_": "model.attention.nsa.NSAAttention"}}
    model = decoder(models, tokenizer.get_vocab_size())
    save_weights(folder, model.state_dict(), models, tokenizer)
    done = run_script(
        "eval/recall.py", f"checkpoint={tmp_path / 'run'}", "length=256", "pairs=8", "samples=2"
    )
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr
    stem = tmp_path / "run" / "eval" / "recall" / "step_00000007"
    results = json.loads(stem.with_suffix(".json").read_text())
    assert sum(row["samples"] for row in results["by_distance"]) == 16
    assert stem.with_suffix(".csv").read_text().startswith("distance,samples,accuracy")
    assert "block selected (chance)" in done.stdout
    for row in results["by_distance"]:
        layers = [row[f"selected/layer_{i:02d}"] for i in range(len(model.blocks))]
        assert all(0 <= share <= 1 for share in layers)
        # Up to three tokens back is the own block or the one before.
        assert row["distance"] > 2 or set(layers) == {1.0}
