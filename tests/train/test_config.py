"""Config errors: one sentence each, before anything costs time."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize
from omegaconf import OmegaConf

from model.build import build_decoder
from model.checkpoint import CONFIG
from train.checkpoint import STATE, check_resume, differences
from train.config import check_config

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml"))


def resolved(*overrides):
    with initialize(version_base=None, config_path="../../conf"):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)


def test_the_table_of_contents_alone_is_a_valid_run():
    assert check_config(resolved("device=cpu")).num_steps > 0


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid_on_the_cpu(experiment):
    # Compiling is for GPUs; on a CPU it depends on what else the machine has. A checkpoint is not there.
    elsewhere = "train.compile=false", "train.init_from=null"
    overrides = f"+experiment={experiment}", "device=cpu", *elsewhere
    run = check_config(resolved(*overrides))
    assert run.num_steps > 0 and run.dtype is torch.float32


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_hint_for_machines_without_a_gpu_holds(experiment, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU") as refused:
        check_config(resolved(f"+experiment={experiment}", "device=cuda"))
    hint = str(refused.value).partition("here, add: ")[2].split()
    assert check_config(resolved(f"+experiment={experiment}", *hint)).num_steps == 2


@pytest.mark.parametrize(
    "group, option",
    [(g, p.stem) for g in ("model", "attention", "schedule", "parallel", "optimizer")
     for p in sorted((ROOT / "conf" / g).glob("*.yaml"))],
)  # fmt: skip
def test_every_option_of_a_group_is_valid(group, option):
    divided = ["optimizer=adamw"] if group == "parallel" else []  # its own wants whole matrices
    check_config(resolved("+experiment=quickstart", *divided, f"{group}={option}", "device=cpu"))


def test_a_stage_begins_at_tokens_or_at_a_share_of_the_run():
    stages = "train.stages=[{from_tokens:40960,seq_len:1024},{from_tokens:0.5,seq_len:2048}]"
    run = check_config(resolved("+experiment=quickstart", "train.max_tokens=819200", stages))
    per_step = run.train.batch_tokens
    assert [s.first_step for s in run.stages] == [0, 40960 // per_step, 409600 // per_step]


def test_stages_keep_the_share_of_answers_or_change_it():
    ends = "{from_tokens:0.25,seq_len:1024},{from_tokens:0.5,seq_len:1024,answer_share:0.1}"
    more = "{from_tokens:0.75,seq_len:2048},{from_tokens:0.9,seq_len:1024,answer_share:0}"
    stages = f"train.stages=[{ends},{more}]"
    run = check_config(
        resolved(
            "+experiment=quickstart", "train.max_tokens=100000", "train.answer_share=0.2", stages
        )
    )
    assert [s.answer_share for s in run.stages] == [0.2, 0.2, 0.1, 0.1, 0]


def test_a_stage_may_have_larger_batches():
    last = "{from_tokens:0.75,seq_len:2048,batch_tokens:8192}"
    stages = f"train.stages=[{{from_tokens:0.5,seq_len:2048}},{last}]"
    batch = "train.batch_tokens=4096", "train.micro_batch_tokens=2048"
    run = check_config(
        resolved("+experiment=quickstart", "train.max_tokens=100000", stages, *batch)
    )
    assert [s.first_step for s in run.stages] == [0, 12, 12 + 6]
    assert [s.first_tokens for s in run.stages] == [0, 12 * 4096, 18 * 4096]
    assert [s.micro_batch_tokens for s in run.stages] == [2048, 2048, 4096]
    assert [run.sequences_per_step(i) for i in range(3)] == [2, 2, 4]
    assert run.num_steps == 18 + (100000 - 18 * 4096) // 8192
    assert run.num_tokens == 18 * 4096 + 3 * 8192
    beyond = "train.stages=[{from_tokens:200000,seq_len:2048,batch_tokens:8192}]"
    run = check_config(
        resolved("+experiment=quickstart", "train.max_tokens=100000", beyond, *batch)
    )
    assert run.num_steps == 24 and run.num_tokens == 24 * 4096


def test_a_run_of_before_a_key_was_there_may_go_on(tmp_path):
    how = "+experiment=quickstart", f"output_dir={tmp_path}", "train.resume=true"
    run = check_config(resolved(*how))
    folder = run.folder / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    (folder / STATE).write_text('{"step": 2}')
    stored = copy.deepcopy(run.as_trained(2))
    del stored["attention"]["taught_queries"]
    (folder / CONFIG).write_text(yaml.safe_dump(stored))
    check_resume(check_config(resolved(*how)))
    assert differences(folder, run.as_trained(2), "")
    del stored["model"]["rope_fraction"]  # then all dimensions turned
    (folder / CONFIG).write_text(yaml.safe_dump(stored))
    check_resume(check_config(resolved(*how)))
    with pytest.raises(ValueError, match=r"model.rope_fraction is 0.5, .* started with 1.0"):
        check_resume(check_config(resolved(*how, "model.rope_fraction=0.5")))
    del stored["model"]["full_layers"]
    (folder / CONFIG).write_text(yaml.safe_dump(stored))
    check_resume(check_config(resolved(*how, "~model.full_layers", "~model.z_loss")))
    with pytest.raises(ValueError, match=r"attention.window is 64, but .* with 128; set it back"):
        check_resume(check_config(resolved(*how, "attention.window=64")))
    with pytest.raises(ValueError, match=r"optimizer.name is adamw, but .* with muon; set it back"):
        check_resume(check_config(resolved(*how, "optimizer=adamw")))


def parameters(raw):
    with torch.device("meta"):
        model = build_decoder(raw["model"], raw["attention"], raw["tokenizer"]["vocab_size"])
    return model.num_parameters()


@pytest.mark.parametrize("family, largest", [("8k", 160e6), ("64k", 160e6), ("small_64k", 30e6)])
def test_recipes_differ_in_the_attention_alone(family, largest):
    """Of one size within 1 %: what NSA spends on keys and values, the others have in the feed-forward."""
    raws = {name: resolved(f"+experiment={name}_{family}") for name in ("nsa", "full", "sliding")}
    sizes = [parameters(raw) for raw in raws.values()]
    assert max(sizes) < largest and max(sizes) < 1.01 * min(sizes)
    for name, raw in raws.items():
        assert raw.pop("attention")["_target_"].rpartition(".")[2].lower() == f"{name}attention"
        assert raw.pop("name") == f"{name}_{family}"
        assert raw["model"].pop("ffn_dim") > 0
        assert raw == raws["nsa"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["+train.max_stepz=3"], "did you mean train.max_steps"),
        (["+attention.windw=3"], "did you mean attention.window"),
        (["+model.num_layer=3"], "did you mean model.num_layers"),
        (["+colour=blue"], "colour: unknown key"),
        (["+devise=cpu"], r"did you mean device\?"),
        (["name="], "a run needs a name of its own"),
        (["train.max_steps=0"], "train.max_steps=0; it must be at least 1"),
        (["train.init_from=/no/run"], "train.init_from: /no/run is neither .* or null to start"),
        (["model.num_heads=5"], "num_kv_heads"),
        (["train.seq_len=8"], "shorter than attention.compress_b"),
        (["train.seq_len=3000"], "not a multiple of seq_len"),
        (["train.batch_tokens=10000"], "train.batch_tokens=10000 is not a multiple"),
        (["train.max_tokens=100"], "less than one step"),
        (["train.dense_until=-1"], "must be at least 0"),
        (["train.precision=fp8"], "train.precision"),
        (["parallel.zero_stage=4"], "parallel.zero_stage"),
        (["attention.compress_stride=5"], "not a multiple of compress_stride"),
        (["device=tpu"], "it must be auto, cpu or cuda"),
        (["parallel.sequence=4"], "does not divide model.num_kv_heads=2"),
        (["parallel=zero0", "parallel.offload=optimizer"], "choose parallel=zero1"),
        (["optimizer=adamw", "parallel=zero3", "train.compile=true"], "choose parallel=zero2"),
        (["log.profile=[5]"], "first step, last step"),
        (["train.stages=[{from_tokens:100,seq_len:1024}]"], "not beyond the stage before it"),
        (["train.stages=[{from_tokens:1e-9,seq_len:1024}]"], "not beyond the stage before it"),
        (["train.stages=[{from_tokens:40960,seq_len:8192}]"], "not a multiple of seq_len=8192"),
        (
            ["train.stages=[{from_tokens:40960,seq_len:1024,batch_tokens:5000}]"],
            "batch_tokens=5000 does not divide into 1 passes.*; 4096 would do",
        ),
        (["train.stages=[{from_tokens:9,seq_len:9,batch_tokens:0}]"], "batch_tokens=0; it must"),
        (
            ["train.stages=[{from_tokens:9,seq_len:9,answer_share:-1}]"],
            "answer_share=-1.0; it must",
        ),
        (["train.answer_share=-1"], "train.answer_share=-1.0; it must be at least 0"),
        (["train.answer_share=inf"], "train.answer_share=inf; it must be at least 0"),
        (
            [
                "train.batch_tokens=6144",
                "train.stages=[{from_tokens:40960,seq_len:1024,batch_tokens:8192}]",
            ],
            "train.batch_tokens=6144 is not a multiple of train.micro_batch_tokens=4096",
        ),
        (["train.stages=[{from_tokens:40960,seqlen:1024}]"], "did you mean train.stages.0.seq_len"),
    ],
)
def test_a_mistake_is_one_sentence(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        check_config(resolved("+experiment=quickstart", *overrides))
    assert "\n" not in str(error.value)


def test_graphs_go_with_whole_parameters(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    how = "+experiment=quickstart", "optimizer=adamw", "device=cuda", "train.cuda_graphs=true"
    check_config(resolved(*how))
    for other in ("parallel=zero3", "train.activation_checkpointing=full"):
        with pytest.raises(ValueError, match=r"train.cuda_graphs=true goes with ZeRO-0"):
            check_config(resolved(*how, other))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is for machines without CUDA")
def test_a_gpu_recipe_without_a_gpu_names_the_way_out():
    with pytest.raises(
        ValueError, match=r"\+experiment=quickstart.*device=cpu data=austen model=tiny"
    ):
        check_config(resolved("+experiment=nsa_64k"))


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if "64k" in e])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is for machines without CUDA")
def test_the_way_out_is_one(experiment):
    with pytest.raises(ValueError, match="To try this recipe here, add: ") as error:
        check_config(resolved(f"+experiment={experiment}"))
    check_config(resolved(f"+experiment={experiment}", *str(error.value).split("add: ")[1].split()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data=folder", "data.path=/no/such/folder"], "/no/such/folder"),
        (["train.max_stepz=3"], "max_stepz"),
        (["devise=cpu"], "did you mean device?"),
        (["model=huge"], "huge"),
        (["model.num_heads=5"], "num_kv_heads"),
    ],
)
def test_the_command_prints_no_traceback(arguments, message, tmp_path):
    command = [sys.executable, "train/pretrain.py", "+experiment=quickstart", *arguments]
    result = subprocess.run(
        [*command, f"name={tmp_path.name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr
