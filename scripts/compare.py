"""Recipes against each other, at equal tokens and at equal time, from training to results.

    python scripts/compare.py tokens=200_000_000 data=packages data.sources.text.path=~/corpus

Every recipe trains `tokens`; then every other one trains once more, its schedule shortened or
lengthened to end after as much time as the first recipe took. Each run is evaluated, and output_dir
gets report.html, results.md and figures. All steps are commands of this repository, which are printed;
killed at any moment, the same call goes on where it was, and finished steps are not done again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Literal

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from data.config import ROOT, command_line, from_config, resolve_path
from eval.compare import clock
from eval.report import load_run, write_comparison
from eval.results import write_results

SPEED_STEPS = 12  # of a run that only measures how fast a recipe trains
SUFFIX = "_same_time"  # of runs that take as long as the first recipe's


@dataclass(frozen=True)
class CompareSettings:
    """conf/compare.yaml"""

    recipes: list[str]
    tokens: int | None
    minutes: float | None
    views: list[str]
    output_dir: str
    device: Literal["cuda", "cpu"]
    evaluate: dict

    def __post_init__(self) -> None:
        if len(set(self.recipes)) != len(self.recipes) or not self.recipes:
            raise ValueError(f"recipes={self.recipes}; name one or more, each once.")
        for recipe in self.recipes:
            if not (ROOT / "conf" / "experiment" / f"{recipe}.yaml").is_file():
                raise ValueError(f"recipes: there is no conf/experiment/{recipe}.yaml.")
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("Give the budget as tokens=… or as minutes=…, one of the two.")
        if not self.views or not set(self.views) <= {"tokens", "time"}:
            raise ValueError(f"views={self.views}; choose among tokens and time.")
        for name in self.evaluate:
            if not (ROOT / "eval" / f"{name}.py").is_file():
                raise ValueError(f"evaluate.{name}: there is no eval/{name}.py.")


class Comparison:
    """The steps, and in <output_dir>/steps.json those that are done, with their seconds."""

    def __init__(self, settings: CompareSettings, overrides: list[str], command: str):
        self.settings, self.overrides, self.command = settings, overrides, command
        self.folder = resolve_path(settings.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_same()
        self.steps_path = self.folder / "steps.json"
        self.steps = json.loads(self.steps_path.read_text()) if self.steps_path.exists() else {}
        self.child: subprocess.Popen | None = None
        self.stopped = 0  # by this signal

    def _check_same(self) -> None:
        """Raises ValueError if the folder holds runs of another budget or with other overrides.

        A command whose first training refused its settings has left no run, and binds nothing.
        """
        path = self.folder / "comparison.yaml"
        now = {
            "first recipe": self.settings.recipes[0],
            "tokens": self.settings.tokens,
            "minutes": self.settings.minutes,
            "overrides": self.overrides,
        }
        begun = path.exists() and any(self.folder.glob("*/config.yaml"))
        before = yaml.safe_load(path.read_text()) if begun else now
        for key, value in now.items():
            if before[key] != value:
                old, new = (
                    shlex.join(x) if isinstance(x, list) else x for x in (before[key], value)
                )
                raise ValueError(
                    f"{self.folder} holds a comparison with {key} {old or 'none'}, not "
                    f"{new or 'none'}; go on with that one, or give another output_dir=…"
                )
        _write(path, yaml.safe_dump(now, sort_keys=False))

    def run(self) -> None:
        """All steps that are not done yet. Raises ChildProcessError when one fails."""
        first, *others = self.settings.recipes
        same_tokens = "tokens" in self.settings.views
        tokens = self.settings.tokens or round(60 * self.settings.minutes * self.short_run(first))
        for recipe in [first, *(others if same_tokens else ())]:
            self.train(recipe, recipe, tokens)
        if "time" in self.settings.views:
            _, seconds = self.tokens_and_seconds(first)
            for recipe in others:
                speed = self.speed(recipe) if same_tokens else self.short_run(recipe)
                self.train(recipe, recipe + SUFFIX, round(seconds * speed))

    def train(self, recipe: str, name: str, tokens: int) -> None:
        """A run, its evaluations, and what there is to report with it."""
        config = self.folder / name / "config.yaml"
        if config.exists():  # a run that has begun keeps its schedule
            tokens = yaml.safe_load(config.read_text())["train"]["max_tokens"]
        self.step(
            name, "train/pretrain.py", self._training(recipe, name, f"train.max_tokens={tokens}")
        )
        for evaluation, settings in self.settings.evaluate.items():
            arguments = [f"{key}={_spell(value)}" for key, value in settings.items()]
            self.step(name, f"eval/{evaluation}.py", [*arguments, f"device={self.settings.device}"])
        self.report()

    def short_run(self, recipe: str) -> float:
        """The speed of a recipe, from a run of a few steps."""
        name = f"{recipe}_speed"
        short = f"train.max_steps={SPEED_STEPS}", "log.wandb=disabled"
        self.step(name, "train/pretrain.py", self._training(recipe, name, *short))
        return self.speed(name)

    def speed(self, name: str) -> float:
        """A run's training tokens per second."""
        tokens, seconds = self.tokens_and_seconds(name)
        return tokens / seconds

    def tokens_and_seconds(self, name: str) -> tuple[int, float]:
        """A run's training tokens and seconds."""
        steps = load_run(self.folder / name).training
        return steps[-1]["tokens"], clock(steps)[-1]

    def _training(self, recipe: str, name: str, *budget: str) -> list[str]:
        fixed = f"name={name}", "train.resume=auto", f"device={self.settings.device}"
        return [f"+experiment={recipe}", *self.overrides, *budget, *fixed]

    def step(self, name: str, script: str, arguments: list[str]) -> None:
        """One command, unless it is done. Raises ChildProcessError with one sentence."""
        key = f"{name}: {script} {' '.join(arguments)}"
        if key in self.steps:
            return
        place = self.settings.output_dir
        training = script.startswith("train/")
        where = f"output_dir={place}" if training else f"checkpoint={place}/{name}"
        command = [script, *arguments, where]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        started, status = time.time(), None
        if not self.stopped:
            # Ctrl-C reaches the child too, where it would end an evaluation with a traceback; the
            # child ignores it (a training sets a handler of its own), and stop() ends it.
            self.child = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )
            if self.stopped:  # while it was being started
                self.child.terminate()
            status = self.child.wait()
        if self.stopped:
            print("stopped; the same command goes on from here", flush=True)
            sys.exit(128 + self.stopped)
        if status:
            raise ChildProcessError(f"{name}: {script} ended with status {status}; see above.")
        self.steps[key] = round(time.time() - started, 1)
        _write(self.steps_path, json.dumps(self.steps, indent=1))

    def stop(self, number: int, frame) -> None:
        """End the child, before which a training saves, and this process with it."""
        self.stopped = number
        if self.child:
            self.child.terminate()

    def report(self) -> None:
        """Pages and tables of what has been trained so far."""
        first, *others = self.settings.recipes
        names = {
            "tokens": [first, *others],
            "time": [first, *(recipe + SUFFIX for recipe in others)],
        }
        trained = {key.partition(": train/")[0] for key in self.steps}
        views = {
            f"equal {view}": [self.folder / name for name in names[view] if name in trained]
            for view in self.settings.views
        }
        folders = list(dict.fromkeys(folder for group in views.values() for folder in group))
        write_comparison(folders, self.folder / "report.html", views)
        write_results(views, self.folder, self.command)


def _write(path: Path, text: str) -> None:
    """The old file or the new one is there, whenever this is killed."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _spell(value) -> str:
    """A setting as Hydra reads it from a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_spell, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def main(arguments: list[str]) -> None:
    """What is not a key of conf/compare.yaml is an override of every training."""
    if {"-h", "--help"} & set(arguments):
        return print(f"{__doc__}\n{(ROOT / 'conf' / 'compare.yaml').read_text()}", end="")
    keys = OmegaConf.load(ROOT / "conf" / "compare.yaml")
    ours = [a for a in arguments if re.split(r"[.=]", a.lstrip("+~"))[0] in keys]
    overrides = [a for a in arguments if a not in ours]
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            config = compose("compare", command_line(ours))
        command = shlex.join(["python", "scripts/compare.py", *arguments])
        comparison = Comparison(from_config(CompareSettings, config, "compare"), overrides, command)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, comparison.stop)
        comparison.run()
    except (HydraException, ValueError, OSError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    print(f"report      {comparison.folder / 'report.html'}, results.md")


if __name__ == "__main__":
    main(sys.argv[1:])
