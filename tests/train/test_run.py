"""Whole runs, as a user starts them, on one rank and on several."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.train.ranks import ROOT, SMALL, pretrain, start

TIMING = ("time", "tokens_per_s", "seconds/", "data_wait")
CHOICES = ("selection/",)  # of blocks: a rounding may tip one


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = TIMING + CHOICES
    return [{k: v for k, v in m.items() if not k.startswith(left_out)} for m in lines]


def weights(run, step=6):
    return load_file(run / f"checkpoints/step_{step:08d}/model.safetensors")


def same_weights(a, b):
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert torch.equal(weight, b[name]), name


def same_curve(a, b, rel):
    """Losses, norms and scores of two runs."""
    assert len(metrics(a)) == len(metrics(b)) > 0
    for one, two in zip(metrics(a), metrics(b), strict=True):
        assert one == pytest.approx(two, rel=rel)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder with one whole run of six steps, `whole`."""
    folder = tmp_path_factory.mktemp("outputs with space")
    pretrain(folder, "name=whole")
    return folder


@pytest.mark.parametrize("stage, precision", [(1, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(outputs, stage, precision):
    how = [f"parallel=zero{stage}", f"train.precision={precision}"]
    pretrain(outputs, f"name=whole{stage}{precision}", *how)
    name = f"halves{stage}{precision}"
    pretrain(
        outputs, f"name={name}", "train.max_steps=3", "train.background_checkpoints=true", *how
    )
    text = pretrain(outputs, f"name={name}", "train.resume=true", *how)
    assert "resumed at step 3" in text and "train.max_steps was 3, is None" in text
    same_weights(weights(outputs / f"whole{stage}{precision}"), weights(outputs / name))
    expected = [m for m in metrics(outputs / f"whole{stage}{precision}") if "loss" in m]
    got = [m for m in metrics(outputs / name) if "loss" in m]
    for one, two in zip(expected, got, strict=True):  # update norms come at the end of a sitting
        assert one["loss"] == two["loss"] and one["grad_norm"] == two["grad_norm"]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_and_zero_stages_follow_one_process(outputs, stage, world_size):
    name = f"zero{stage}_{world_size}"
    pretrain(outputs, f"name={name}", f"parallel=zero{stage}", world_size=world_size)
    same_curve(outputs / "whole", outputs / name, rel=1e-5)


@pytest.mark.parametrize("stage, world_size", [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_bf16_follows_fp32(outputs, stage, world_size):
    name = f"bf16_{stage}"
    how = [f"name={name}", f"parallel=zero{stage}", "train.precision=bf16"]
    pretrain(outputs, *how, world_size=world_size)
    for one, two in zip(metrics(outputs / "whole"), metrics(outputs / name), strict=True):
        assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=3e-3)


@pytest.mark.parametrize("offload, stage", [("optimizer", 2), ("parameters", 3)])
def test_what_is_offloaded_takes_the_same_steps(outputs, offload, stage):
    name = f"offload_{offload}"
    how = [f"name={name}", f"parallel=zero{stage}", f"parallel.offload={offload}"]
    pretrain(outputs, *how)
    same_curve(outputs / "whole", outputs / name, rel=1e-5)


def test_two_ranks_of_zero_3_continue_on_any_number_and_stage(outputs):
    pretrain(outputs, "name=moved", "parallel=zero3", "train.max_steps=2", world_size=2)
    pretrain(
        outputs, "name=moved", "parallel=zero2", "train.max_steps=4", "train.resume=true",
        world_size=4,
    )  # fmt: skip
    pretrain(outputs, "name=moved", "parallel=zero1", "train.resume=true")
    by_step = {m["step"]: m["loss"] for m in metrics(outputs / "moved") if "loss" in m}
    for m in metrics(outputs / "whole"):
        if "loss" in m:
            assert by_step[m["step"]] == pytest.approx(m["loss"], rel=1e-5)
    for name, weight in weights(outputs / "whole").items():
        torch.testing.assert_close(weight, weights(outputs / "moved")[name], rtol=1e-3, atol=1e-5)


def test_the_end_scores_the_whole_validation_split(outputs):
    last = metrics(outputs / "whole")[-1]
    assert last["step"] == 6 and last["val/loss"] > 0
    summary = json.loads((outputs / "whole/data_summary.json").read_text())["validation"]
    nats = last["val/loss"] * summary["tokens"] / summary["bytes"]
    assert last["val/bpb"] == pytest.approx(nats / 0.6931471805599453)


def test_a_finished_run_is_not_overwritten(outputs):
    before = weights(outputs / "whole")
    for less in ([], ["train.max_steps=4"]):
        assert "Nothing left to do" in pretrain(outputs, "name=whole", "train.resume=auto", *less)
    for overrides, message in (
        (["name=whole", "train.resume=false"], "already holds a run"),
        (["name=whole", "model.ffn_dim=32"], "was started with"),
        (["name=new", "train.resume=true"], "has no checkpoint"),
    ):
        run = start(outputs, *overrides)
        assert run.wait() == [1] and message in run.text() and "Traceback" not in run.text()
    same_weights(before, weights(outputs / "whole"))


def test_torchrun_shares_one_folder(outputs):
    """The launcher itself, once: all else runs without it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["train/pretrain.py", *SMALL, f"output_dir={outputs}", "name=torchrun"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("step 6/6") == 1
    same_curve(outputs / "whole", outputs / "torchrun", rel=1e-5)


def test_a_sparse_run_starts_from_a_dense_one(outputs):
    pretrain(outputs, "name=dense", "attention=full", "train.max_steps=4")
    how = ["name=sparse", f"train.init_from={outputs}/dense", "train.max_steps=2"]
    text = pretrain(outputs, *how)
    assert "weights of" in text and "are new, such as blocks.0.attention.compress_k" in text
    dense, sparse = metrics(outputs / "dense"), metrics(outputs / "sparse")
    assert sparse[0]["loss"] < dense[0]["loss"] - 0.05  # it does not start anew
    shutil.rmtree(outputs / "dense")  # which a run that has begun does not need
    text = pretrain(outputs, *how, "train.resume=true", "train.max_steps=3")
    assert "resumed at step 2" in text and "weights of" not in text


def test_compressed_blocks_may_grow(outputs):
    """By a whole factor: the weights by place in the block are stretched."""
    short, long = (outputs / name for name in ("whole", "coarse"))
    how = [f"train.init_from={short}", "train.max_steps=1", "optimizer.lr=1e-30"]
    config = yaml.safe_load((short / "config.yaml").read_text())["attention"]
    block, stride = 2 * config["compress_block"], 2 * config["compress_stride"]
    how += [f"attention.compress_block={block}", f"attention.compress_stride={stride}"]
    text = pretrain(outputs, "name=coarse", *how)
    assert "compressed blocks 2 times as long" in text and "are new" not in text
    name = "blocks.0.attention.compress_k.position"
    given, found = weights(short)[name], weights(long, 1)[name]
    assert given.abs().max() > 0 and torch.equal(found, given.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["attention.compress_block=24"], "the sizes of the model must be the same"),
        (["tokenizer.vocab_size=400"], "with another tokenizer"),
        (["model.ffn_dim=32"], "the sizes of the model must be the same"),
        (["model.rope_fraction=0.5"], "start with model.rope_fraction=1.0"),
        (["train.init_from=/no/such/run"], "neither a checkpoint"),
    ],
)
def test_weights_that_do_not_fit_are_refused(outputs, overrides, message):
    how = ["name=misfit", "train.max_steps=1", f"train.init_from={outputs}/whole", *overrides]
    run = start(outputs, *how)
    assert run.wait() == [1] and message in run.text() and "Traceback" not in run.text()


STAGES = [
    "train.stages=[{from_tokens:2048,seq_len:512,rope_base:20000},{from_tokens:4096,seq_len:1024}]",
    "train.micro_batch_tokens=1024",
]


def test_stages_change_lengths_and_positions_and_resume_bit_for_bit(outputs):
    """Two steps a stage; sittings end on a border and within a stage."""
    pretrain(outputs, "name=staged", *STAGES)
    lengths = [m["seq_len"] for m in metrics(outputs / "staged") if "loss" in m]
    assert lengths == [256, 256, 512, 512, 1024, 1024]
    for steps in (2, 3, 6):
        pretrain(outputs, "name=parts", "train.resume=auto", f"train.max_steps={steps}", *STAGES)
        path = outputs / f"parts/checkpoints/step_{steps:08d}/config.yaml"
        stored = yaml.safe_load(path.read_text())
        assert stored["model"]["rope_base"] == (10000 if steps == 2 else 20000)
        assert stored["train"]["seq_len"] == {2: 256, 3: 512, 6: 1024}[steps]
    same_weights(weights(outputs / "staged"), weights(outputs / "parts"))
    pretrain(outputs, "name=shared", "parallel.sequence=2", *STAGES, world_size=2)
    same_curve(outputs / "staged", outputs / "shared", rel=1e-5)


def test_a_dense_warm_up_lasts_as_long_as_sequences_are_short(outputs):
    how, losses = [*STAGES, "attention.num_selected=4"], {}  # blocks of 32 tokens
    for until in (0, 256, 512):
        pretrain(outputs, f"name=until_{until}", f"train.dense_until={until}", *how)
        losses[until] = [m["loss"] for m in metrics(outputs / f"until_{until}") if "loss" in m]
    assert losses[0][0] != losses[256][0] == losses[512][0]
    assert losses[256][:2] == losses[512][:2] and losses[256][2] != losses[512][2]
    for steps in (3, 6):
        sitting = "name=sittings", "train.resume=auto", f"train.max_steps={steps}"
        pretrain(outputs, *sitting, "train.dense_until=512", *how)
    same_weights(weights(outputs / "until_512"), weights(outputs / "sittings"))
    shared = "name=dense_shared", "train.dense_until=512", "parallel.sequence=2"
    pretrain(outputs, *shared, *how, world_size=2)
    same_curve(outputs / "until_512", outputs / "dense_shared", rel=1e-5)


LARGER = [
    "train.stages=[{from_tokens:2048,seq_len:512},{from_tokens:3072,seq_len:512,batch_tokens:2048}]",
    "train.micro_batch_tokens=512",
]


def test_a_stage_of_larger_batches_resumes_bit_for_bit_and_is_shared_by_ranks(outputs):
    pretrain(outputs, "name=larger", *LARGER)
    steps = [m for m in metrics(outputs / "larger") if "loss" in m]
    assert [m["tokens"] for m in steps] == [1024, 2048, 3072, 5120]
    for count in (3, 4):
        pretrain(outputs, "name=halves", "train.resume=auto", f"train.max_steps={count}", *LARGER)
    same_weights(weights(outputs / "larger", 4), weights(outputs / "halves", 4))
    pretrain(outputs, "name=split", *LARGER, world_size=2)
    same_curve(outputs / "larger", outputs / "split", rel=1e-5)


def test_a_grid_that_would_be_refused_on_the_way_ends_the_run_before_its_first_step(outputs):
    run = start(outputs, "name=short", "eval.during.every_tokens=2048", "eval.during.lengths=[20]")
    assert run.wait() == [1]
    assert "error: lengths: 20 tokens leave no room" in run.text(), run.text()
    assert "step 1" not in run.text() and not (outputs / "short").exists()


def test_scoring_on_the_way_disturbs_nothing(outputs):
    text = pretrain(
        outputs, "name=scored", "eval.during.every_tokens=2048", "eval.during.lengths=[160]",
        "eval.during.depths=1", "eval.during.samples=1", "eval.max_new_tokens=12",
    )  # fmt: skip
    assert text.count("single, length 160") == 3  # of 6 steps of 1024 tokens, every second
    scored, score = metrics(outputs / "scored"), "needle/single/160/ranking"
    needles = [m for m in scored if score in m]
    assert [m["step"] for m in needles] == [2, 4, 6]
    assert all(m[score] in (0, 1) for m in needles)
    assert [m for m in scored if m not in needles] == metrics(outputs / "whole")
    same_weights(weights(outputs / "whole"), weights(outputs / "scored"))
    for step in (2, 4, 6):
        stem = outputs / "scored" / "eval" / "needle" / f"step_{step:08d}"
        assert json.loads(stem.with_suffix(".json").read_text())["step"] == step
        assert stem.with_suffix(".png").exists()


def test_answers_weigh_more_in_the_objective_alone_and_on_any_ranks(outputs):
    how = [
        "~data.path", "~data.validation", "data=novels_and_tasks", "data.weights.tasks=0.8",
        "data.sources.novels.path=data/austen/northanger_abbey.txt",
        "data.sources.novels.validation={path:null,fraction:0.02}",
        "data.sources.tasks.tasks=[recall]", "train.seq_len=512", "train.micro_batch_tokens=512",
        "train.max_steps=3",
    ]  # fmt: skip
    pretrain(outputs, "name=answers", *how)
    late = "train.stages=[{from_tokens:1024,seq_len:512,answer_share:0.5}]"
    pretrain(outputs, "name=later", late, *how)
    how.append("train.answer_share=0.5")
    pretrain(outputs, "name=heavy", *how)
    pretrain(outputs, "name=heavy_ranks", *how, world_size=2)
    pretrain(outputs, "name=heavy_shared", "parallel.sequence=2", *how, world_size=2)
    once, late, more = (
        [m for m in metrics(outputs / name) if "loss" in m]
        for name in ("answers", "later", "heavy")
    )
    untaught = pytest.approx(once[0]["loss"], rel=0.05)
    assert once[0]["answer_loss"] == untaught
    assert late[0] == once[0]
    assert late[1]["grad_norm"] > 1.2 * once[1]["grad_norm"]
    assert more[0]["loss"] == once[0]["loss"] and more[0]["answer_loss"] == once[0]["answer_loss"]
    assert more[0]["grad_norm"] > 1.5 * once[0]["grad_norm"]
    assert more[2]["answer_loss"] < once[2]["answer_loss"]
    for name in ("heavy_ranks", "heavy_shared"):
        same_curve(outputs / "heavy", outputs / name, rel=1e-5)
