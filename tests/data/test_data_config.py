from dataclasses import dataclass, field
from typing import Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.config import (
    ROOT,
    TokenizerConfig,
    command_line,
    data_config,
    from_config,
    resolve_path,
)

DATA = {"name": "x", "path": "a.txt", "validation": {"fraction": 0.1}}


@dataclass
class Inner:
    share: float
    kind: Literal["fast", "slow"] = "fast"


@dataclass
class Outer:
    size: int
    on: bool = False
    when: bool | Literal["auto"] = "auto"
    inner: Inner | None = None
    names: list = field(default_factory=list)
    lengths: list[int] | None = None


def test_builds_nested_dataclasses_from_dicts_and_hydra_configs():
    raw = {"size": 3, "on": True, "inner": {"share": 1}, "names": ["a"]}
    expected = Outer(3, True, "auto", Inner(1.0, "fast"), ["a"])
    assert (
        from_config(Outer, raw, "x") == from_config(Outer, OmegaConf.create(raw), "x") == expected
    )
    assert from_config(Outer, {"size": 1, "when": False, "inner": None}, "x").when is False


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"sise": 3}, "x.sise: unknown key; did you mean x.size?"),
        (
            {"size": 3, "zzzz": 1},
            "x.zzzz: unknown key; known: size, on, when, inner, names, lengths",
        ),
        ({}, "x.size: missing; set it, as in x.size=…"),
        ({"size": "???"}, "x.size: missing; set it, as in x.size=…"),
        ({"size": 1, "on": "???"}, "x.on: missing; set it, as in x.on=…"),
        ({"size": "three"}, "x.size: 'three' isn't a whole number"),
        ({"size": 1.5}, "x.size: 1.5 isn't a whole number"),
        ({"size": True}, "x.size: True isn't a whole number"),
        ({"size": None}, "x.size: null isn't a whole number"),
        ({"size": 1, "on": 1}, "x.on: 1 isn't true or false"),
        ({"size": 1, "when": "later"}, "x.when: 'later' isn't true or false or 'auto'"),
        (
            {"size": 1, "inner": {"shar": 1}},
            "x.inner.shar: unknown key; did you mean x.inner.share?",
        ),
        (
            {"size": 1, "inner": {"share": 1, "kind": "f"}},
            "x.inner.kind: 'f' isn't 'fast' or 'slow'",
        ),
        ({"size": 1, "names": {}}, "x.names: {} isn't a list"),
        (
            {"size": 1, "lengths": 512},
            "x.lengths: 512 isn't a list or null; a list is written [512]",
        ),
        ({"size": 1, "inner": 7}, "x.inner: 7 isn't a group of keys"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(raw, message):
    for mapping in (raw, OmegaConf.create(raw)):
        with pytest.raises(ValueError) as caught:
            from_config(Outer, mapping, "x")
        assert str(caught.value) == message


def test_keys_of_no_group_are_named_alone():
    for raw, message in (({"sise": 3}, "did you mean size"), ({}, "as in size=")):
        with pytest.raises(ValueError, match=f"^si[sz]e: .*{message}"):
            from_config(Outer, raw)


@pytest.mark.parametrize(
    "validation, message",
    [
        ({}, "set exactly one of path"),
        ({"path": "a", "fraction": 0.1}, "set exactly one of path"),
        ({"fraction": 0}, "isn't between 0 and 1"),
        ({"fraction": 1.0}, "isn't between 0 and 1"),
    ],
)
def test_validation_is_said_in_one_way(validation, message):
    with pytest.raises(ValueError, match=message):
        data_config(DATA | {"validation": validation})


def test_tokenizer_is_said_in_one_way():
    for raw in ({}, {"path": "a", "hub": "b"}):
        with pytest.raises(ValueError, match="set exactly one of vocab_size"):
            from_config(TokenizerConfig, raw, "tokenizer")
    named = from_config(TokenizerConfig, {"vocab_size": 300, "path": "a"}, "tokenizer")
    assert named.vocab_size is None and named.path == "a"  # a recipe's size, another's tokenizer


@pytest.mark.parametrize(
    "group, option",
    [(g, file.stem) for g in ("data", "tokenizer") for file in (ROOT / "conf" / g).glob("*.yaml")],
)
def test_the_config_files_are_read_in_full(group, option):
    """Every key of every file of a group is one we know; ??? is the user's to set."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", [f"{group}={option}"])
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "x")
    raw = OmegaConf.to_container(config)[group]
    data_config(raw) if group == "data" else from_config(TokenizerConfig, raw, group)


def test_paths_start_at_the_repository_or_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane")
    assert resolve_path("data/austen") == ROOT / "data" / "austen"
    assert str(resolve_path("~/books")) == "/home/jane/books"
    assert str(resolve_path("/books/*.txt")) == "/books/*.txt"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_path_goes_through_the_command_line(path):
    if path == "null" or path[0] in "'\"":
        return
    for key in ("data.path", "checkpoint"):
        (argument,) = command_line([f"{key}={path}"])
        assert OverridesParser.create().parse_override(argument).value() == path


def test_keys_are_left_to_our_own_check():
    given = [
        "devise=cpu",
        "train.max_stepz=3",
        "+x.path_length=[1,2]",
        "data.path=null",
        "data.path='~/a'",
    ]
    want = [
        "++devise=cpu",
        "++train.max_stepz=3",
        "++x.path_length=[1,2]",
        "++data.path=null",
        "++data.path='~/a'",
    ]
    assert command_line(given) == want


def test_other_arguments_stay_as_they_are():
    arguments = ["data=folder", "--cfg", "job", "+experiment=x", "hydra.verbose=1"]
    assert command_line(arguments) == arguments
