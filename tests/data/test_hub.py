"""Datasets in the hub's format: by path, streamed and not, broken off anywhere; and out of reach."""

import json
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import data.corpus
import data.parts
import data.prepare
from data.config import ROOT, HubConfig
from data.hub import read_rows
from data.prepare import prepare
from data.shards import TokenShards

VALIDATION = {"fraction": 0.2}
BPE = {"vocab_size": 300}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder as `datasets` writes and the hub holds it: parquet in several files of unequal size."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "mine"
    for number, count in enumerate((130, 1, 77)):
        rows = {
            "content": [f"Row {i} of file {number}. " + "It goes on. " * i for i in range(count)],
            "id": list(range(count)),
        }
        path = folder / f"data/train-{number:05d}-of-00003.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(path)
    return folder


def config(dataset, **changes):
    hub = {"name": str(dataset), "streaming": True} | changes
    return {"name": "mine", "hub": hub, "text_field": "content", "validation": VALIDATION}


@pytest.fixture(scope="session")
def rows(dataset):
    return list(read_rows(HubConfig(str(dataset)), None, "content", "data"))


def test_all_rows_come_in_order(dataset, rows):
    assert [text.split(".")[0] for text, _ in rows[128:133]] == [
        "Row 128 of file 0", "Row 129 of file 0", "Row 0 of file 1", "Row 0 of file 2",
        "Row 1 of file 2",
    ]  # fmt: skip
    downloaded = HubConfig(str(dataset), streaming=False)
    assert [t for t, _ in read_rows(downloaded, None, "content", "data")] == [t for t, _ in rows]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 207), st.booleans())
def test_reading_goes_on_at_any_row(dataset, rows, number, streaming):
    reader = HubConfig(str(dataset), streaming=streaming)
    everything = list(read_rows(reader, None, "content", "data"))
    position = json.loads(json.dumps(everything[number][1]))
    rest = [text for text, _ in read_rows(reader, None, "content", "data", position)]
    assert rest == [text for text, _ in rows[number + 1 :]]


def test_a_dataset_is_prepared_like_its_files(dataset, tmp_path):
    streamed = prepare(config(dataset), BPE, tmp_path)
    downloaded = prepare(config(dataset, streaming=False), BPE, tmp_path)
    copy = prepare(config(dataset) | {"path": str(dataset)}, BPE, tmp_path)
    assert len({streamed, downloaded, copy}) == 3
    for side in ("train", "validation"):
        of = [TokenShards.open(f / side).fingerprint for f in (streamed, downloaded, copy)]
        assert of[0] == of[1] == of[2]
    summary = json.loads((streamed / "summary.json").read_text())
    assert summary["commit"] is None and summary["path"] == str(dataset)


def test_an_interrupted_stream_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    whole = prepare(config(dataset), BPE, tmp_path / "whole")
    monkeypatch.setattr(data.parts, "CHUNK", 3000)
    add, calls, positions = data.prepare._add, [], []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return add(*arguments)

    def watched(hub, commit, text_field, where, position=None):
        positions.append(position)
        return read_rows(hub, commit, text_field, where, position)

    monkeypatch.setattr(data.prepare, "_add", stop)
    monkeypatch.setattr(data.corpus, "read_rows", watched)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(dataset), BPE, tmp_path / "out")
    again = prepare(config(dataset), BPE, tmp_path / "out")
    assert positions[-1]["row"] > 0 and positions[-1]["state"]["examples_iterable"]
    for side in ("train", "validation"):
        of = [TokenShards.open(folder / side).fingerprint for folder in (whole, again)]
        assert of[0] == of[1]


def test_reading_stops_when_there_are_tokens_enough(dataset, tmp_path):
    some = prepare(config(dataset) | {"max_tokens": 5000}, BPE, tmp_path)
    assert 5000 <= TokenShards.open(some / "train").num_tokens < 7000


def test_what_the_dataset_has_not_is_named(dataset, tmp_path):
    column = config(dataset) | {"text_field": "text"}
    with pytest.raises(ValueError, match="^data.hub: .* has no column 'text', only content, id; "):
        prepare(column, BPE, tmp_path)
    with pytest.raises(ValueError, match="^data.hub: .*split"):
        prepare(config(dataset, split="nothing"), BPE, tmp_path)
    with pytest.raises(ValueError, match="^data.hub: .*'nothing' not found"):
        prepare(config(dataset, subset="nothing"), BPE, tmp_path)


@pytest.mark.parametrize(
    "overrides, what, way",
    [
        (
            ["data=fineweb_edu"],
            "data.hub: the dataset HuggingFaceFW/fineweb-edu can't be read (",
            "set data.path=/folder/of/them (parquet or jsonl)\n",
        ),
        (
            ["+experiment=nsa_64k"],
            "data.sources.web.hub: the dataset HuggingFaceFW/fineweb-edu can't be read (",
            "set data.sources.web.path=/folder/of/them (parquet or jsonl)\n",
        ),
        (
            ["tokenizer=hub", "tokenizer.hub=gpt2"],
            "tokenizer.hub: gpt2 can't be had (",
            "set tokenizer=file tokenizer.path=/folder/of/it\n",
        ),
    ],
)
def test_out_of_reach_it_says_how_to_do_without(overrides, what, way, tmp_path):
    done = subprocess.run(
        [sys.executable, "data/prepare.py", *overrides, f"output_dir={tmp_path}"],
        cwd=ROOT, env={"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(f"error: {what}"), done.stderr
    assert done.stderr.endswith(way) and done.stderr.count("\n") == 1


def test_a_streamed_dataset_trains_and_resumes_bit_for_bit(dataset, tmp_path):
    def pretrain(name, *overrides):
        command = [
            sys.executable, "train/pretrain.py", "+experiment=quickstart", "data=hub",
            f"data.hub.name={dataset}", "data.text_field=content", "data.validation.fraction=0.2",
            "tokenizer.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.num_heads=4",
            "model.head_dim=16", "model.ffn_dim=64", "train.seq_len=256", "train.batch_tokens=512",
            "train.micro_batch_tokens=256", "train.max_tokens=3072", "log.wandb=disabled",
            f"output_dir={tmp_path}", f"name={name}", *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    pretrain("whole", "train.checkpoint_every=3")
    checkpoints = "checkpoints/step_0000000"
    shutil.copytree(tmp_path / f"whole/{checkpoints}3", tmp_path / f"half/{checkpoints}3")
    pretrain("half", "train.resume=true")
    whole, resumed = (
        load_file(tmp_path / name / f"{checkpoints}6/model.safetensors")
        for name in ("whole", "half")
    )
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
