"""The study's losses are what they say, and a study of two runs goes on where it was stopped."""

import json

import numpy as np
import pytest
import torch

from data.recall_chain import STATES, VOCABULARY, Sequences, make_sequences
from scripts.retrieval_study import (
    Packed,
    Run,
    Settings,
    build,
    losses,
    main,
    objective,
    table,
    variants,
)
from tests.eval.conftest import run_script
from train.cuda_graphs import PassGraph


@pytest.mark.parametrize("value_tokens", [1, 3])
def test_the_losses_are_of_what_can_be_known(value_tokens):
    made = make_sequences(64, 256, 8, value_tokens, np.random.default_rng(0))
    logits = torch.zeros(*made.tokens.shape, VOCABULARY)
    logits[:, :-1].scatter_(2, made.tokens[:, 1:, None], 50.0)  # knows the next token
    assert all(float(loss) < 1e-6 for loss in losses(logits, made))
    for i in range(value_tokens):
        logits[torch.arange(64)[:, None], made.second + i] = 0
    chain, asked = losses(logits, made)
    assert float(chain) < 1e-6 and float(asked) == pytest.approx(np.log(VOCABULARY))
    states = made.tokens * made.plain
    assert states.max() < STATES and made.plain.double().mean() > 0.5


def test_the_table_gives_mean_and_range():
    result = {"name": "a", "accuracy": 0.5, "far_accuracy": 0.25, "chain_loss": 2.0,
              "parameters": 4_000_000, "seconds": 60.0}  # fmt: skip
    sparse = result | {"name": "b", "block_recall": [0.1, 0.7], "block_chance": 0.2}
    text = table([result, sparse | {"accuracy": 0.9}, sparse | {"accuracy": 0.7}])
    best, control = (line.split() for line in text.splitlines()[1:])
    assert best[:6] == ["b", "2", "0.800", "(0.700", "..", "0.900)"] and "0.700" in best[6:]
    assert control[:4] == ["a", "1", "0.500", "0.250"]


def test_every_variant_is_a_model_of_its_own():
    found = variants()
    assert len({tuple(overrides) for overrides in found.values()}) == len(found) == 124


@pytest.mark.parametrize("dense", [False, True])
def test_a_captured_pass_has_the_gradients_of_a_plain_one(dense, no_graphs):
    settings = Settings(512, 2, 1, 2, 1, 1, False, 1.0, 0.5)  # more than are all selected
    run = Run("nsa", ["attention=nsa_small", "attention.selection_kl=1", "model.num_layers=1"], 0)
    _, model, _ = build(run)
    packed = Packed(settings, torch.device("cpu"))
    part = make_sequences(2, 512, 2, 1, np.random.default_rng(0))
    model.select_all(dense)
    objective(model, packed, part).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    graph = PassGraph(model, lambda *x: [objective(model, packed, Sequences(*x))], part)
    graph(part)[0].backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_the_command(tmp_path):
    out = tmp_path / "study.jsonl"
    how = ["--out", str(out), "--only", "full conv4", "gated_mean 8/4 G4", "--length", "128"]
    how += ["--pairs", "4", "--batch", "2", "--steps", "3", "--warmup", "1", "--workers", "2"]
    how += ["--selection-kl", "0.3", "--dense-warmup", "0.5"]
    small = ["model.dim=32", "model.num_layers=1", "model.ffn_dim=32"]
    done = run_script("scripts/retrieval_study.py", *how, *small)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["name"].split(" model.")[0]: line for line in lines}
    assert set(found) == {"full conv4", "gated_mean 8/4 G4"}
    assert found["full conv4"]["model"]["kv_conv"] == 4
    sparse = found["gated_mean 8/4 G4"]
    assert len(sparse["block_recall"]) == 1 and sparse["attention"]["compress_stride"] == 4
    assert {"accuracy", "by_distance", "recall_loss", "seconds", "curve"} <= sparse.keys()
    out.write_text("\n".join(json.dumps(lines[0]) for _ in "a") + "\n")
    again = run_script("scripts/retrieval_study.py", *how, *small)
    assert again.returncode == 0 and len(out.read_text().splitlines()) == 2, again.stderr
    assert "gated_mean 8/4 G4" in again.stdout and "full conv4" in again.stdout

    # The first is begun in any case; one that fails is told in the end, a mistake before any run.
    more = [*how, "--only", "full", "sliding*", "--workers", "1", "--seconds", "0", *small]
    first = run_script("scripts/retrieval_study.py", *more)
    assert first.returncode == 0 and "2 of 3 runs were not begun" in first.stdout
    assert len(out.read_text().splitlines()) == 3
    fails = run_script("scripts/retrieval_study.py", *more, "optimizer.betas=[2,0.9]")
    assert fails.returncode == 1 and "1 of 3 runs failed" in fails.stderr, fails.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "full", "--", "optimizer.lrr=1"], "lrr"),
        (["--only", "fool"], "--only matches no variant"),
        (["--only", "full", "optimizer.lr=1e-3"], "overrides come first"),
    ],
)
def test_a_wrong_argument_is_one_sentence_before_any_run(arguments, words, tmp_path, monkeypatch):
    out = tmp_path / "study.jsonl"
    monkeypatch.setattr("sys.argv", ["retrieval_study.py", "--out", str(out), *arguments])
    with pytest.raises(SystemExit, match=f"error: .*{words}") as wrong:
        main()
    assert "\n" not in str(wrong.value) and not out.exists()
