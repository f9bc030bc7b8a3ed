"""The comparison from its command to its results, tiny; and what it decides, without training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.config import ROOT
from data.shards import TokenShards
from data.stages import Stage, open_stages
from scripts.compare import CompareSettings, Comparison, alone_in, main

TINY = [
    "device=cpu", "views=[tokens]", "~evaluate.ruler", "~evaluate.position", "~evaluate.recall",
    "evaluate.needle.lengths=[512]", "evaluate.needle.depths=2", "evaluate.needle.samples=1",
    "data=novels_and_tasks", "model=tiny", "model.num_layers=1", "tokenizer.vocab_size=512",
    "data.sources.novels.path=data/austen/northanger_abbey.txt",
    "data.sources.novels.validation.path=null", "data.sources.novels.validation.fraction=0.02",
    "train.stages=[]", "train.seq_len=1024", "train.batch_tokens=2048", "train.micro_batch_tokens=2048",
    "train.validation_tokens=2048", "train.compile=false", "log.wandb=disabled",
]  # fmt: skip


def test_two_recipes_end_to_end(tmp_path, monkeypatch):
    recipes = "recipes=[nsa_small_64k,'coarse=nsa_small_64k attention.compress_block=64']"
    arguments = [recipes, "tokens=6144", "workers=2", f"output_dir={tmp_path}", *TINY]
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "results.md").read_text()
    for words in (
        "| nsa_small_64k | 6,144 |",
        "| coarse | 6,144 |",
        "novels 80%, tasks 20%",
        "Needle",
        "scripts/compare",
        "These trained beside each other, which slowed them: nsa_small_64k, coarse.",
    ):
        assert words in text, words
    assert "These trained beside each other" in (tmp_path / "report.html").read_text()
    config = yaml.safe_load((tmp_path / "coarse/config.yaml").read_text())
    assert config["attention"]["compress_block"] == 64 and config["seed"] == 0
    assert "Loss at equal tokens" in (tmp_path / "report.html").read_text()
    steps = (tmp_path / "steps.json").read_text()
    assert len(json.loads(steps)) == 4

    # Again, it trains and measures nothing.
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", None)
        main(arguments)
    assert (tmp_path / "steps.json").read_text() == steps
    assert not list(tmp_path.glob("*/budget.json"))  # no time was given

    # Measured by hand with other settings, a run is measured again as it was asked.
    (results,) = (tmp_path / "coarse/eval/needle").glob("*.json")
    wanted = json.loads(results.read_text())
    other = wanted | {"settings": wanted["settings"] | {"depths": 3}}
    results.write_text(json.dumps(other))
    main(arguments)
    assert json.loads(results.read_text())["settings"] == wanted["settings"]

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
    slower = ()  # runs whose names end so train at 80 % of the speed

    def step(self, name, script, arguments, again=False):
        key = f"{name}: {script} {' '.join(arguments)}"
        if key in self.steps:
            return
        if len(self.steps) == self.room:
            raise InterruptedError
        if script.startswith("train/"):
            self.leave(name, arguments)
        self.steps[key] = 1.0

    def leave(self, name, arguments):
        tokens = next((int(a.split("=")[1]) for a in arguments if "max_tokens" in a), 1000)
        speed = 1e6 if "nsa" in name else 1e6 / 3
        if name.endswith(self.slower):
            speed /= 1.25
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / "config.yaml").write_text(
            yaml.safe_dump({"name": name, "train": {"seq_len": 64, "max_tokens": tokens},
                            "seed": next((int(a[5:]) for a in arguments if "seed=" in a), 0)})
        )  # fmt: skip
        loss = 2.0 + (len(self.steps) + 1) / 100
        step = {"step": 1, "tokens": tokens, "time": 1, "loss": 2.0, "tokens_per_s": speed}
        validation = {"step": 1, "tokens": tokens, "time": 1, "val/loss": loss, "val/bpb": 1.0}
        lines = "".join(json.dumps(line) + "\n" for line in (step, validation))
        (self.folder / name / "metrics.jsonl").write_text(lines)


def fake(tmp_path, overrides=("data=austen",), **changes):
    settings = dict(
        recipes=["nsa_8k", "full_8k"], seeds=[0], tokens=3_000_000, minutes=None, workers=1,
        views=["tokens", "time"], output_dir=str(tmp_path), device="cpu",
        evaluate={"position": {"length": 64}},
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


def test_a_time_that_was_not_kept_is_told(tmp_path):
    comparison = fake(tmp_path)
    comparison.run()
    row = "| full_8k_same_time | full_8k | 333,333 | 333,333 | 0.05 | 0.05 |"
    results = (tmp_path / "results.md").read_text()
    assert row in results and "time it was given" not in results
    comparison = fake(tmp_path / "slow")
    comparison.slower = ("_same_time",)
    comparison.run()
    for page in ("results.md", "report.html"):
        sentence = "full_8k_same_time trained 25% longer than the time it was given"
        assert sentence in (tmp_path / "slow" / page).read_text()


def test_each_seed_with_the_budgets_of_the_first(tmp_path):
    fake(tmp_path).run()
    comparison = fake(tmp_path, seeds=[0, 2])
    comparison.slower = ("_seed2",)
    comparison.run()
    commands = trainings(comparison)
    pairs = "nsa_8k", "full_8k", "nsa_8k_seed2", "full_8k_seed2"
    assert list(commands) == [*pairs, "full_8k_same_time", "full_8k_same_time_seed2"]
    assert "seed=2" in commands["nsa_8k_seed2"] and "seed=" not in commands["nsa_8k"]
    assert "max_tokens=1000000" in commands["full_8k_same_time_seed2"]
    text = (tmp_path / "results.md").read_text()
    steps = [i / 100 for i, key in enumerate(comparison.steps, 1) if "train/" in key]
    nsa, full = ([2 + steps[i], 2 + steps[i + 2]] for i in (0, 1))
    mean = f"{sum(full) / 2:.4f} ({full[0]:.4f} .. {full[1]:.4f})"
    assert f"| full_8k | 2 | {mean} | {full[0] - nsa[0]:+.4f} |" in text
    assert "| full_8k_same_time | 2 |" in text and "needle generated" not in text
    assert "over seeds" in (tmp_path / "report.html").read_text()


def test_several_at_a_time_take_the_same_steps(tmp_path):
    how = dict(seeds=[0, 1, 2, 3], recipes=["nsa_8k", "full_8k", "sliding_8k"])
    one, four = fake(tmp_path / "one", **how), fake(tmp_path / "four", workers=4, **how)
    one.run()
    four.run()
    assert sorted(four.steps) == sorted(one.steps)
    assert "beside each other" not in (tmp_path / "one" / "results.md").read_text()


@pytest.mark.parametrize(("workers", "shared"), [(2, 0), (4, 4)])
def test_each_at_a_time_has_a_gpu_of_its_own_where_there_are_enough(
    workers, shared, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    comparison = fake(
        tmp_path, views=["tokens"], seeds=[0, 1], workers=workers, evaluate={}, device="cuda"
    )
    comparison.step, comparison.report = partial(Comparison.step, comparison), lambda: None
    seen, together = [], threading.Barrier(workers)  # or one thread might take all steps

    class Child:
        def __init__(self, command, env, **_):
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self):
            together.wait(10)

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr("scripts.compare.load_run", lambda folder: None)
    comparison.run()
    assert sorted(seen) == ["3", "3", "5", "5"]
    assert len(list(tmp_path.glob("*/shared.json"))) == shared


def test_times_are_of_trainings_that_have_a_gpu_each(tmp_path, monkeypatch):
    how = dict(seeds=[0, 1], device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with monkeypatch.context() as patch:
        patch.setattr("scripts.compare.check_config", lambda raw: None)
        fake(tmp_path, workers=2, **how).check()
        fake(tmp_path, workers=3, views=["tokens"], **how).check()
        with pytest.raises(ValueError, match="workers=3, and 2 GPUs: trainings that share one"):
            fake(tmp_path, workers=3, **how).check()
    comparison = fake(tmp_path, workers=2, **how)
    comparison.run()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    fake(tmp_path, workers=2, **how).check()  # what is done is only reported
    (tmp_path / "full_8k" / "shared.json").write_text("{}")
    with pytest.raises(ValueError, match="full_8k trained beside others on one GPU"):
        fake(tmp_path, **how).run()


@pytest.mark.parametrize(("workers", "trained"), [(1, 0), (2, 5)])
def test_one_that_fails_does_not_stop_those_beside_it(workers, trained, tmp_path):
    comparison = fake(tmp_path, views=["tokens"], seeds=[0, 1, 2], workers=workers)
    step = comparison.step

    def fail(name, *rest, **how):
        if name == "nsa_8k":
            raise ChildProcessError("nsa_8k: ended with status 1.")
        step(name, *rest, **how)

    comparison.step = fail
    with pytest.raises(ChildProcessError, match="nsa_8k: ended"):
        comparison.run()
    assert len(trainings(comparison)) == trained


def test_a_budget_of_minutes(tmp_path):
    comparison = fake(tmp_path, tokens=None, minutes=2.0, views=["time"])
    comparison.run()
    budgets = [path.parent.name for path in tmp_path.glob("*/budget.json")]
    assert sorted(budgets) == ["full_8k_same_time", "nsa_8k"]
    commands = trainings(comparison)
    assert list(commands) == ["nsa_8k_speed", "nsa_8k", "full_8k_speed", "full_8k_same_time"]
    assert "equal tokens" not in (tmp_path / "results.md").read_text()
    assert "max_tokens=120000000" in commands["nsa_8k"]
    assert "max_tokens=40000000" in commands["full_8k_same_time"]
    assert f"max_tokens={12 * 262144}" in commands["full_8k_speed"]
    stages = "train.stages=[{from_tokens:0.5,seq_len:16384},{from_tokens:0.75,seq_len:32768}]"
    comparison = fake(tmp_path / "b", ["data=austen", stages], tokens=None, minutes=2.0)
    comparison.run()  # a few steps of each length
    assert f"max_tokens={3 * 12 * 262144}" in trainings(comparison)["nsa_8k_speed"]
    stages = stages.replace("32768", "32768,batch_tokens:524288")
    comparison = fake(tmp_path / "c", ["data=austen", stages], tokens=None, minutes=2.0)
    comparison.run()
    assert f"max_tokens={3 * 12 * 524288}" in trainings(comparison)["nsa_8k_speed"]


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


def test_killed_it_takes_its_step_along_and_no_other_call_comes_between(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def save(number, frame):\n"
        "    while not (here / 'go').exists():\n"
        "        time.sleep(0.01)\n"
        "    (here / 'saved').touch()\n"
        "    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(here / 'ready').touch()\n"
        "signal.pause()\n"
    )
    parent = (
        "import sys\n"
        "from scripts.compare import CompareSettings, Comparison, alone_in\n"
        f"settings = CompareSettings(**{vars(fake(tmp_path).settings)!r})\n"
        "with alone_in(__import__('pathlib').Path(settings.output_dir)) as lock:\n"
        f"    Comparison(settings, [], '', lock).step('nsa_8k', {str(child)!r}, [])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="is at work in"), alone_in(tmp_path):
        pass
    (tmp_path / "go").touch()
    wait_for(tmp_path / "saved")
    for _ in range(1000):  # until the step has ended
        try:
            with alone_in(tmp_path):
                return
        except ValueError:
            time.sleep(0.01)
    pytest.fail("the lock was not given back")


def wait_for(path):
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    pytest.fail(f"{path.name} did not come")


@pytest.mark.parametrize("status, lost", [(128 + signal.SIGTERM, False), (1, True)])
def test_a_signal_ends_the_training_that_runs(status, lost, tmp_path, capsys):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, signal, sys\n"
        "def save(number, frame):\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        f"    sys.exit({status})\n"
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
            comparison.step("nsa_8k", f"train/{os.path.relpath(child, ROOT / 'train')}", [])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert error.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "saved").exists() and not comparison.steps
    assert ("has not saved its last steps" in capsys.readouterr().out) == lost
    with pytest.raises(SystemExit):  # and no other is begun
        comparison.step("full_8k", str(child), [])
    assert not capsys.readouterr().out


def test_other_budgets_do_not_mix_in_a_folder(tmp_path):
    fake(tmp_path, overrides=["data=nonsense"])  # no run begins, and so the next may correct it
    fake(tmp_path).run()
    fake(tmp_path, recipes=["nsa_8k", "sliding_8k"], views=["tokens"])  # more of the same
    with pytest.raises(ValueError, match="holds a comparison with tokens 3000000, not 5;"):
        fake(tmp_path, tokens=5)
    named = "mine=nsa_8k attention.top_n="
    fake(tmp_path, recipes=["nsa_8k", f"{named}8"])  # which has not begun yet
    fake(tmp_path, recipes=["nsa_8k", f"{named}4"]).run()
    fake(tmp_path, recipes=["nsa_8k", "full_8k"])
    with pytest.raises(ValueError, match="mine = nsa_8k attention.top_n=4, not .*=8; .* name to"):
        fake(tmp_path, recipes=["nsa_8k", f"{named}8"])
    with pytest.raises(ValueError, match="overrides data=austen, not data=folder train.seq_len=9;"):
        fake(tmp_path, overrides=["data=folder", "train.seq_len=9"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "tokens=… or as minutes=…"),
        (["tokens=5", "recipes=[nsa_9k]"], "no conf/experiment/nsa_9k.yaml"),
        (["tokens=5", "recipes=['nsa_8k train.seq_len=9']"], "a name of its own, as in 'mine="),
        (["tokens=5", "recipes=[nsa_8k,'nsa_8k=full_8k']"], "name one or more, each once"),
        (["tokens=5", "recipes=['nsa_8k_speed=nsa_8k']"], "cannot be a recipe's name here"),
        (["tokens=5", "recipes=['a=nsa_8k seed=9']"], "a: seed follows from the keys"),
        (["tokens=5", "seeds=[-1]"], "whole numbers from 0 up"),
        ([*TINY, "tokens=9999", "recipes=[nsa_8k,'a=nsa_8k attention.topn=9']"], "a: .*topn"),
        ([*TINY, "tokens=5", "recipes=[nsa_8k]"], "nsa_8k: train.max_tokens=5 is less than"),
        (
            [
                "tokens=99999999",
                "device=cpu",
                "recipes=[nsa_8k,'a=nsa_8k train.stages=[{from_tokens:9,seq_len:9}]']",
            ],
            "a: its stages begin at numbers of tokens",
        ),
        (["tokens=5", "views=[steps]"], "choose among tokens and time"),
        (
            ["tokens=5", "workers=2", "device=cpu"],
            "2, and 0 GPUs: trainings that share one have no",
        ),
        (["tokens=5", "evaluate.needles.depths=3"], "there is no eval/needles.py"),
        (["tokens=5", "views=["], "no viable alternative at input"),
        (["tokens=5", "recipes=[a=nsa_8k]"], "with = in it needs quotes of its own"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as error:
        main([*arguments, f"output_dir={tmp_path}"])
    assert "\n" not in str(error.value)


def test_help_says_what_can_be_set(capsys):
    main(["--help"])
    assert "evaluate:" in capsys.readouterr().out
