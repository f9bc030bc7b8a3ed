"""The dashboard's panels against what a run records, read back from its W&B file."""

import pytest

from scripts.wandb_dashboard import SECTIONS, listing, missing, recorded, workspace
from tests.eval.conftest import run_script
from tests.train.ranks import pretrain


def test_an_offline_run_fills_every_panel(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pretrain(tmp_path, "name=run", "log.wandb=offline")
    names = recorded(tmp_path / "run")
    assert {"loss", "tokens", "val/bpb", "gates/window/layer_01"} <= names
    assert missing(names) == {}
    assert missing(names - {"loss"}) == {"Training loss (nats per token)": ["loss"]}

    before = sorted(tmp_path.rglob("*"))
    done = run_script("scripts/wandb_dashboard.py", f"run={tmp_path / 'run'}")
    assert done.returncode == 0 and "upload with: wandb sync" in done.stdout, done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # looking adds nothing


def test_without_a_run_or_a_project_it_says_what_to_give():
    done = run_script("scripts/wandb_dashboard.py")
    assert done.returncode == 1 and done.stderr.startswith("error: give run=outputs/<name>")
    assert done.stderr.count("\n") == 1


def test_series_are_listed_by_group():
    names = {"loss", "gates/window/layer_00", "gates/window/layer_01", "val/loss"}
    names |= {"needle/_type", "needle/sha256", "needle/single/512/ranking"}
    assert listing(names) == [
        "alone: loss, needle",
        "gates: window/layer_…",
        "needle: single/512/ranking",
        "val: loss",
    ]


def test_a_run_without_wandb_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="log.wandb=offline"):
        recorded(tmp_path)


def test_the_workspace_holds_every_section():
    pytest.importorskip("wandb_workspaces")
    built = workspace("me", "nsa-lm")
    assert [section.name for section in built.sections][: len(SECTIONS)] == list(SECTIONS)
