"""Whole runs, as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# The quickstart, shrunk: the same parts, a few seconds.
SMALL = [
    "+experiment=quickstart", "tokenizer.vocab_size=512", "model.dim=32", "model.num_layers=2",
    "model.num_heads=4", "model.head_dim=16", "model.ffn_dim=64", "train.seq_len=256",
    "train.batch_tokens=1024", "train.micro_batch_tokens=512", "train.max_tokens=6144",
    "train.validation_tokens=1024", "train.validate_every=3", "log.wandb=disabled",
    "data.path=data/austen/northanger_abbey.txt", "data.validation.path=null",
    "data.validation.fraction=0.05",
]  # fmt: skip


def pretrain(folder, *overrides, launcher=(sys.executable,)):
    command = [*launcher, "train/pretrain.py", *SMALL, f"output_dir={folder}", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(run, *keys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("time", "tokens_per_s")} for m in lines]


def weights(run, step):
    return load_file(run / f"checkpoints/step_{step:08d}/model.safetensors")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder with one whole run of six steps, `whole`."""
    folder = tmp_path_factory.mktemp("outputs with space")
    pretrain(folder, "name=whole")
    return folder


def test_a_resumed_run_is_bitwise_the_undisturbed_one(outputs):
    pretrain(outputs, "name=halves", "train.max_steps=3")
    text = pretrain(outputs, "name=halves", "train.resume=true")
    assert "resumed at step 3" in text
    expected, got = weights(outputs / "whole", 6), weights(outputs / "halves", 6)
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name
    steps = metrics(outputs / "halves")
    assert [m["step"] for m in steps if "loss" in m] == [1, 2, 3, 4, 5, 6]
    training = [m for m in steps if "loss" in m]
    assert training == [m for m in metrics(outputs / "whole") if "loss" in m]


def test_two_ranks_follow_one(outputs):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    pretrain(outputs, "name=two", launcher=launcher)
    one, two = metrics(outputs / "whole"), metrics(outputs / "two")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_end_scores_the_whole_validation_split(outputs):
    last = metrics(outputs / "whole")[-1]
    assert last["step"] == 6 and last["val/loss"] > 0
    summary = json.loads((outputs / "whole/data_summary.json").read_text())["validation"]
    nats = last["val/loss"] * summary["tokens"] / summary["bytes"]
    assert last["val/bpb"] == pytest.approx(nats / 0.6931471805599453)


def test_a_finished_run_is_not_overwritten(outputs):
    before = weights(outputs / "whole", 6)
    assert "Nothing left to do" in pretrain(outputs, "name=whole", "train.resume=auto")
    command = [sys.executable, "train/pretrain.py", *SMALL, f"output_dir={outputs}", "name=whole"]
    for override, message in (
        ("train.resume=false", "already holds a run"),
        ("model.ffn_dim=32", "was started with"),
        ("name=new train.resume=true", "has no checkpoint"),
    ):
        result = subprocess.run(
            [*command, *override.split()], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode != 0 and message in result.stderr, result.stderr
    assert all(torch.equal(w, before[k]) for k, w in weights(outputs / "whole", 6).items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_takes_the_same_steps(outputs, stage):
    pretrain(outputs, f"name=zero{stage}", f"parallel=zero{stage}")
    for a, b in zip(metrics(outputs / "whole"), metrics(outputs / f"zero{stage}"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, weight in weights(outputs / "whole", 6).items():
        torch.testing.assert_close(
            weight, weights(outputs / f"zero{stage}", 6)[name], rtol=1e-3, atol=1e-5
        )


def test_bf16_trains(outputs):
    pretrain(outputs, "name=bf16", "train.precision=bf16", "train.max_steps=2")
    whole = {m["step"]: m for m in metrics(outputs / "whole") if "loss" in m}
    for m in metrics(outputs / "bf16"):
        if "loss" in m:
            assert m["loss"] == pytest.approx(whole[m["step"]]["loss"], rel=1e-2)
