"""Prepared folders as the loaders of a run: mixtures, shards that are there, length stages."""

import json

import pytest
import torch

from data.config import data_config
from data.prepare import prepare
from data.shards import TokenShards
from data.stages import Stage, fingerprint, open_stages

BPE = {"vocab_size": 300}
TEXT = {"validation": {"fraction": 0.2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two kinds of text, and where prepared data goes."""
    root = tmp_path_factory.mktemp("mixture")
    for name, sentence in (("novels", "She was {i} and in love."), ("code", "def f{i}(): pass")):
        (root / name).mkdir()
        for i in range(30):
            text = "\n".join([sentence.format(i=i)] * (10 + 9 * i))
            (root / name / f"{i}.txt").write_text(text)
    return root


def mixture(folders, weights, **changes):
    sources = {
        "novels": {"name": "novels", "path": str(folders / "novels"), **TEXT},
        "code": {"name": "code", "path": str(folders / "code"), **TEXT},
        "tasks": {"name": "tasks", "tasks": ["passkey", "copy"], "haystack": None},
    }
    return {"name": "mixed", "sources": sources | changes, "weights": weights}


WEIGHTS = {"novels": 0.5, "code": 0.3, "tasks": 0.2}


def test_a_mixture_of_text_and_tasks(folders, tmp_path, capsys):
    (folders / "code" / "copy.txt").write_text((folders / "code" / "3.txt").read_text())
    path = prepare(mixture(folders, WEIGHTS), BPE, tmp_path)
    out = capsys.readouterr().out
    assert "novels" in out and "50.0%" in out and "made while training" in out
    assert "left out, documents that were there before: 1 equal" in out
    assert sorted(p.name.rsplit("-", 1)[0] for p in tmp_path.glob("[!.]*")) == [
        "code", "mixed", "novels", "tokenizer",
    ]  # fmt: skip
    sides = [TokenShards.open(p / "validation") for p in tmp_path.glob("[nc]o*")]
    merged = TokenShards.open(path / "validation")
    assert merged.num_tokens == sum(side.num_tokens for side in sides)
    assert merged.num_bytes == sum(side.num_bytes for side in sides)

    [loader] = open_stages(path, [Stage(512)], seed=0)
    tokens = {name: 0 for name in WEIGHTS}
    for i in range(100):
        tokens[loader._names[loader._source[i]]] += 1
    assert tokens["tasks"] == pytest.approx(20, abs=2)
    assert loader.describe(100).endswith("tasks 20 samples")

    other = prepare(mixture(folders, WEIGHTS | {"tasks": 0.1}), BPE, tmp_path)
    assert other != path and len(list(tmp_path.glob("novels-*"))) == 1  # no text is read again
    assert fingerprint(other) != fingerprint(path)
    assert fingerprint(prepare(mixture(folders, WEIGHTS), BPE, tmp_path)) == fingerprint(path)


def test_stages_change_length_and_weights(folders, tmp_path):
    path = prepare(mixture(folders, WEIGHTS), BPE, tmp_path)
    stages = [Stage(512, 10), Stage(1024, 7, {"novels": 1}), Stage(2048, None, {"tasks": 1})]
    loaders = open_stages(path, stages, seed=1)
    assert [loader.seq_len for loader in loaders] == [512, 1024, 2048]
    again = open_stages(path, stages, seed=1)
    for loader, same in zip(loaders, again, strict=True):
        assert torch.equal(loader.batch(3, 2).tokens, same.batch(3, 2).tokens)
        assert loader.batch(0, 2).tokens.shape == (2 * loader.seq_len,)
    # Of the tasks, those of the first stage don't come again.
    assert loaders[2].loaders["tasks"].skipped == 2
    with pytest.raises(ValueError, match="data.weights.poems: there is no such source"):
        open_stages(path, [Stage(512, weights={"poems": 1})], seed=1)


def test_a_single_source_has_stages_and_no_weights(folders, tmp_path):
    path = prepare({"name": "x", "path": str(folders / "code"), **TEXT}, BPE, tmp_path)
    loaders = open_stages(path, [Stage(64, 5), Stage(256)], seed=1)
    assert torch.equal(
        loaders[1].batch(0, 3).tokens, loaders[0].next_stage(256, 5).batch(0, 3).tokens
    )
    assert fingerprint(path) == TokenShards.open(path / "train").fingerprint
    with pytest.raises(ValueError, match="single source, which has none; leave them out"):
        open_stages(path, [Stage(64, weights={"x": 1})], seed=1)


def test_tokens_that_are_there_are_a_source(folders, tmp_path):
    made = prepare({"name": "x", "path": str(folders / "code"), **TEXT}, BPE, tmp_path)
    shards = {"name": "shards", "shards": str(made)}
    assert prepare(shards, {"path": str(made)}, tmp_path) == made
    with pytest.raises(ValueError, match="no text to train on; set tokenizer=file"):
        prepare(shards, BPE, tmp_path)
    mixed = prepare(mixture(folders, WEIGHTS, code=shards), {"path": str(made)}, tmp_path)
    sources = json.loads((mixed / "mixture.json").read_text())["sources"]
    assert sources["code"] == {"folder": made.name}

    before = fingerprint(mixed)
    moved = (tmp_path / "elsewhere").resolve()
    moved.mkdir()
    for folder in tmp_path.glob("*-*"):
        folder.rename(moved / folder.name)
    assert fingerprint(moved / mixed.name) == before
    assert open_stages(moved / mixed.name, [Stage(512)], seed=0)[0].batch(0, 9)
    made = moved / made.name
    shards["shards"] = str(made)
    mixed = prepare(mixture(folders, WEIGHTS, code=shards), {"path": str(made)}, tmp_path)
    sources = json.loads((mixed / "mixture.json").read_text())["sources"]
    assert sources["code"] == {"folder": str(made)}

    other = prepare({"name": "y", "path": str(folders / "novels"), **TEXT}, BPE, tmp_path)
    for config in (shards, mixture(folders, WEIGHTS, code=shards)):
        with pytest.raises(ValueError, match="was made by another tokenizer than this run's; set"):
            prepare(config, {"path": str(other)}, tmp_path)
    with pytest.raises(FileNotFoundError, match="isn't a folder that data/prepare.py made"):
        prepare(shards | {"shards": str(folders)}, {"path": str(made)}, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": {"poems": 1}}, "data.weights.poems: there is no such source"),
        ({"weights": {"code": 0}}, "every source has weight 0"),
        ({"sources": {"t": {"name": "t", "tasks": ["copy"]}}}, "at least one of them must be text"),
        ({"sources": {"m": {"name": "m"}}}, "data.sources.m.validation: missing"),
        ({"sources": {"m": {"name": "m", **TEXT}}}, "data.sources.m.path: null is nothing to read"),
        (
            {"sources": {"a": {"name": "a", "path": "a", **TEXT},
                         "t": {"name": "t", "tasks": ["copy"], "haystack": "b"}}},
            "data.sources.t.haystack: 'b' is no source of text here; these are: a",
        ),
        (
            {"sources": {"a": {"name": "a", "path": "a", **TEXT},
                         "t": {"name": "t", "tasks": ["juggle"]}}},
            "data.sources.t.tasks: there is no task 'juggle', only passkey",
        ),
        (
            {"sources": {"a": {"name": "a", "path": "a", **TEXT},
                         "m": {"name": "m", "sources": {}, "weights": {}}}},
            "at least one of them must be text",
        ),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_named(folders, change, message):
    with pytest.raises(ValueError, match=message) as error:
        data_config(mixture(folders, WEIGHTS) | change)
    assert "\n" not in str(error.value)


def test_tasks_alone_have_nothing_to_hide_in(tmp_path):
    with pytest.raises(ValueError, match="synthetic tasks need text to hide in; mix them"):
        prepare({"name": "t", "tasks": ["copy"]}, BPE, tmp_path)
