"""The comparison from its command to its results, tiny; and what it decides, without training."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.config import ROOT
from data.shards import TokenShards
from data.stages import Stage, open_stages
from scripts.compare import CompareSettings, Comparison, main

TINY = [
    "device=cpu", "views=[tokens]", "~evaluate.ruler", "~evaluate.position", "~evaluate.recall",
    "evaluate.needle.lengths=[512]", "evaluate.needle.depths=2", "evaluate.needle.samples=1",
    "data=novels_and_tasks", "model=tiny", "model.num_layers=1", "tokenizer.vocab_size=512",
    "data.sources.novels.path=data/austen/northanger_abbey.txt",
    "data.sources.novels.validation.path=null", "data.sources.novels.validation.fraction=0.02",
    "train.seq_len=1024", "train.batch_tokens=2048", "train.micro_batch_tokens=2048",
    "train.validation_tokens=2048", "train.compile=false", "log.wandb=disabled",
]  # fmt: skip


def test_two_recipes_end_to_end(tmp_path, monkeypatch):
    recipes = "recipes=[nsa_small_64k,full_small_64k]"
    arguments = [recipes, "tokens=6144", f"output_dir={tmp_path}", *TINY]
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "results.md").read_text()
    for words in (
        "| nsa_small_64k | 6,144 |",
        "novels 80%, tasks 20%",
        "Needle",
        "scripts/compare",
    ):
        assert words in text, words
    assert "Loss at equal tokens" in (tmp_path / "report.html").read_text()
    steps = (tmp_path / "steps.json").read_text()
    assert len(json.loads(steps)) == 4

    # Again, it trains and measures nothing.
    monkeypatch.setattr(subprocess, "Popen", None)
    main(arguments)
    assert (tmp_path / "steps.json").read_text() == steps

    # Nothing that evaluation hides needles in was trained on, be it as text or around a task.
    data = Path(yaml.safe_load((tmp_path / "nsa_small_64k/config.yaml").read_text())["data_path"])
    held_out = windows(TokenShards.open(data / "validation").tokens)
    (loader,) = open_stages(data, [Stage(1024)], seed=0)
    trained = windows(loader.batch(0, 300).tokens)
    assert len(held_out) > 2000 and len(trained) > 150_000  # of the latter an epoch has fewer
    assert not held_out & trained


def windows(tokens):
    """Every 24 tokens in a row."""
    rows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int64), 24)
    return {row.tobytes() for row in rows}


class Fake(Comparison):
    """Steps leave what the script reads: one token a microsecond for NSA, a third of it else."""

    room = None  # steps before an interruption

    def step(self, name, script, arguments):
        key = f"{name}: {script} {' '.join(arguments)}"
        if key in self.steps:
            return
        if len(self.steps) == self.room:
            raise InterruptedError
        self.steps[key] = 1.0
        if not script.startswith("train/"):
            return
        tokens = next((int(a.split("=")[1]) for a in arguments if "max_tokens" in a), 1000)
        speed = 1e6 if "nsa" in name else 1e6 / 3
        (self.folder / name).mkdir()
        (self.folder / name / "config.yaml").write_text(
            yaml.safe_dump({"name": name, "train": {"seq_len": 64, "max_tokens": tokens}})
        )
        step = {"step": 1, "tokens": tokens, "time": 1, "loss": 2.0, "tokens_per_s": speed}
        validation = {"step": 1, "tokens": tokens, "time": 1, "val/loss": 2.0, "val/bpb": 1.0}
        lines = "".join(json.dumps(line) + "\n" for line in (step, validation))
        (self.folder / name / "metrics.jsonl").write_text(lines)


def fake(tmp_path, overrides=("data=austen",), **changes):
    settings = dict(
        recipes=["nsa_8k", "full_8k"], tokens=3_000_000, minutes=None, views=["tokens", "time"],
        output_dir=str(tmp_path), device="cpu", evaluate={"position": {"length": 64}},
    )  # fmt: skip
    return Fake(CompareSettings(**settings | changes), list(overrides), "the command")


def trainings(comparison):
    """Name and arguments of each training."""
    split = (key.split(": train/pretrain.py ") for key in comparison.steps)
    return {name: rest[0] for name, *rest in split if rest}


def test_the_first_recipe_sets_the_time_of_the_others(tmp_path):
    comparison = fake(tmp_path)
    comparison.run()
    commands = trainings(comparison)
    assert list(commands) == ["nsa_8k", "full_8k", "full_8k_same_time"]
    assert "max_tokens=3000000" in commands["full_8k"] and "data=austen" in commands["full_8k"]
    assert "max_tokens=1000000" in commands["full_8k_same_time"]
    assert "| full_8k_same_time | 1,000,000 | 0.1 |" in (tmp_path / "results.md").read_text()
    assert "full_8k: eval/position.py length=64 device=cpu" in comparison.steps


def test_a_budget_of_minutes(tmp_path):
    comparison = fake(tmp_path, tokens=None, minutes=2.0, views=["time"])
    comparison.run()
    commands = trainings(comparison)
    assert list(commands) == ["nsa_8k_speed", "nsa_8k", "full_8k_speed", "full_8k_same_time"]
    assert "equal tokens" not in (tmp_path / "results.md").read_text()
    assert "max_tokens=120000000" in commands["nsa_8k"]
    assert "max_tokens=40000000" in commands["full_8k_same_time"]
    assert (
        "max_steps" in commands["full_8k_speed"] and "max_tokens" not in commands["full_8k_speed"]
    )


@pytest.mark.parametrize("budget", [{"tokens": 3_000_000}, {"tokens": None, "minutes": 2.0}])
def test_interrupted_anywhere_it_takes_the_same_steps(tmp_path, budget):
    whole = fake(tmp_path / "whole", **budget)
    whole.run()
    for count in range(len(whole.steps)):
        parts = tmp_path / f"{count}"
        first = fake(parts, **budget)
        first.room = count
        with pytest.raises(InterruptedError):
            first.run()
        again = fake(parts, **budget)
        again.steps = first.steps
        again.run()
        assert again.steps == whole.steps


def test_a_signal_ends_the_step_that_runs(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, signal, sys\n"
        "def save(number, frame):\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        "    sys.exit()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # Ctrl-C is the parent's\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "signal.pause()\n"
    )
    settings = fake(tmp_path).settings
    comparison = Comparison(settings, ["data=austen"], "the command")
    before = signal.signal(signal.SIGUSR1, comparison.stop)
    try:
        with pytest.raises(SystemExit) as error:
            comparison.step("nsa_8k", str(child), [])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert error.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "saved").exists() and not comparison.steps


def test_other_budgets_do_not_mix_in_a_folder(tmp_path):
    fake(tmp_path, overrides=["data=nonsense"])  # no run begins, and so the next may correct it
    fake(tmp_path).run()
    fake(tmp_path, recipes=["nsa_8k", "sliding_8k"], views=["tokens"])  # more of the same
    with pytest.raises(ValueError, match="holds a comparison with tokens 3000000, not 5;"):
        fake(tmp_path, tokens=5)
    with pytest.raises(ValueError, match="overrides data=austen, not data=folder train.seq_len=9;"):
        fake(tmp_path, overrides=["data=folder", "train.seq_len=9"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "tokens=… or as minutes=…"),
        (["tokens=5", "recipes=[nsa_9k]"], "no conf/experiment/nsa_9k.yaml"),
        (["tokens=5", "views=[steps]"], "choose among tokens and time"),
        (["tokens=5", "evaluate.needles.depths=3"], "there is no eval/needles.py"),
        (["tokens=5", "views=["], "no viable alternative at input"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as error:
        main([*arguments, f"output_dir={tmp_path}"])
    assert "\n" not in str(error.value)


def test_help_says_what_can_be_set(capsys):
    main(["--help"])
    assert "evaluate:" in capsys.readouterr().out
