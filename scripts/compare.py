"""Recipes against each other, at equal tokens and at equal time, from training to results.

    python scripts/compare.py tokens=100_000_000 data=packages data.sources.text.path=~/corpus

Every recipe trains `tokens`; then every other one trains once more, its schedule shortened or
lengthened to end after as much time as the first recipe took; and all of it once for each seed. Each
run is evaluated, and output_dir gets report.html, results.md and figures. All steps are commands of
this repository, which are printed; killed at any moment, the same call goes on where it was, and
finished steps are not done again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import ctypes
import fcntl
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from data.config import ROOT, command_line, from_config, resolve_path
from eval.compare import BUDGET, SHARED, clock
from eval.report import load_run, write_comparison
from eval.results import write_results
from train.config import check_config

SPEED_STEPS = 12  # for each length of a run that only measures how fast a recipe trains
SPEED, SAME_TIME = "_speed", "_same_time"  # ends of those runs' names, and of those at equal time
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of prctl(2)
OURS = {"name", "output_dir", "device", "seed", "train.max_tokens", "train.resume"}  # of a training


@dataclass(frozen=True)
class Recipe:
    """An entry of recipes: conf/experiment/<experiment>.yaml, with overrides of its own."""

    name: str
    experiment: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, entry: str) -> Recipe:
        """From `experiment` or `name=experiment override …`. Raises ValueError with one sentence."""
        first, *overrides = shlex.split(entry) or [""]
        name, _, experiment = first.rpartition("=")
        if not (ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file():
            raise ValueError(f"recipes: there is no conf/experiment/{experiment}.yaml.")
        if overrides and not name:
            raise ValueError(f"recipes: give '{entry}' a name of its own, as in 'mine={entry}'.")
        name = name or experiment
        taken = rf"data|figures|.*({SPEED}|{SAME_TIME}|_seed\d+)"  # by what the comparison makes
        if not re.fullmatch(r"\w[\w.-]*", name) or re.fullmatch(taken, name):
            raise ValueError(f"recipes: {name} cannot be a recipe's name here; choose another.")
        return cls(name, experiment, tuple(overrides))

    def run(self, seed: int, kind: str = "") -> str:
        """The name of a run, which is its folder's too."""
        return f"{self.name}{kind}{f'_seed{seed}' if seed else ''}"


@dataclass(frozen=True)
class CompareSettings:
    """conf/compare.yaml"""

    recipes: list[str]
    seeds: list[int]
    tokens: int | None
    minutes: float | None
    views: list[str]
    workers: int
    output_dir: str
    device: Literal["cuda", "cpu"]
    evaluate: dict

    def __post_init__(self) -> None:
        names = [Recipe.parse(entry).name for entry in self.recipes]
        for key, given in (("recipes", names), ("seeds", self.seeds)):
            if len(set(given)) != len(given) or not given:
                raise ValueError(f"{key}: {given}; name one or more, each once.")
        if not all(isinstance(seed, int) and seed >= 0 for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds}; they must be whole numbers from 0 up.")
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("Give the budget as tokens=… or as minutes=…, one of the two.")
        if not self.views or not set(self.views) <= {"tokens", "time"}:
            raise ValueError(f"views={self.views}; choose among tokens and time.")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}; it must be at least 1.")
        for name in self.evaluate:
            if not (ROOT / "eval" / f"{name}.py").is_file():
                raise ValueError(f"evaluate.{name}: there is no eval/{name}.py.")


class Comparison:
    """The steps, and in <output_dir>/steps.json those that are done, with their seconds."""

    def __init__(
        self, settings: CompareSettings, overrides: list[str], command: str, lock: int | None = None
    ):
        """lock: a descriptor that the steps inherit, as alone_in gives it."""
        self.settings, self.overrides, self.command = settings, overrides, command
        self.recipes = [Recipe.parse(entry) for entry in settings.recipes]
        self.inherited = () if lock is None else (lock,)
        self.folder = resolve_path(settings.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_same()
        self.steps_path = self.folder / "steps.json"
        self.steps = json.loads(self.steps_path.read_text()) if self.steps_path.exists() else {}
        self.children: set[subprocess.Popen] = set()
        self.stopped = 0  # by this signal
        self.gpus = _gpus() if settings.device == "cuda" else []
        together = min(settings.workers, len(settings.recipes) * len(settings.seeds))
        self.shared = together > max(1, len(self.gpus))  # a GPU, or the processor, by trainings
        self.thread = threading.local()  # .gpu: that its steps see, None for all
        self.lock = threading.Lock()  # around the steps' file and the pages

    def _check_same(self) -> None:
        """Raises ValueError if the folder holds runs of another budget or with other overrides.

        A command whose first training refused its settings has left no run, and binds nothing.
        """
        path = self.folder / "comparison.yaml"
        begun = path.exists() and any(self.folder.glob("*/config.yaml"))
        before = yaml.safe_load(path.read_text()) if begun else {}
        recipes_before = before.get("recipes", {})
        now = {
            "first recipe": self.recipes[0].name,
            "tokens": self.settings.tokens,
            "minutes": self.settings.minutes,
            "overrides": self.overrides,
        }
        recipes = {recipe.name: [recipe.experiment, *recipe.overrides] for recipe in self.recipes}
        compared = [(key, before.get(key, value), value) for key, value in now.items()]
        compared += [
            (f"{name} =", recipes_before.get(name, value), value)
            for name, value in recipes.items()
            if self._begun(name)
        ]
        for key, *values in compared:
            old, new = (shlex.join(x) if isinstance(x, list) else x for x in values)
            if old != new:
                other = "name to this recipe" if key.endswith("=") else "output_dir=…"
                raise ValueError(
                    f"{self.folder} holds a comparison with {key} {old or 'none'}, not "
                    f"{new or 'none'}; go on with that one, or give another {other}."
                )
        now["recipes"] = recipes_before | recipes
        _write(path, yaml.safe_dump(now, sort_keys=False))

    def _begun(self, recipe: str) -> bool:
        """Whether the folder has a run of this recipe."""
        kinds = rf"{re.escape(recipe)}({SPEED}|{SAME_TIME})?(_seed\d+)?"
        configs = self.folder.glob("*/config.yaml")
        return any(re.fullmatch(kinds, path.parent.name) for path in configs)

    def check(self) -> None:
        """Raises ValueError for a recipe that would be refused when its turn comes."""
        first, *others = self.recipes
        timed = others if "time" in self.settings.views else []
        timed = timed if self.settings.minutes is None else [first, *timed]
        if timed and self.shared and not all(self._begun(recipe.name) for recipe in self.recipes):
            raise ValueError(
                f"workers={self.settings.workers}, and {len(self.gpus)} GPUs: trainings that share one "
                "have no times that others could be given; take fewer workers, or compare with "
                "tokens=… and views=[tokens]."
            )
        budget = (
            () if self.settings.tokens is None else (f"train.max_tokens={self.settings.tokens}",)
        )
        for recipe in self.recipes:
            try:
                for override in (*self.overrides, *recipe.overrides):
                    if (key := override.lstrip("+~").partition("=")[0]) in OURS:
                        raise ValueError(f"{key} follows from the keys of conf/compare.yaml.")
                raw = self._config(recipe, *budget)
                if recipe in timed and any(x["from_tokens"] > 1 for x in raw["train"]["stages"]):
                    raise ValueError(
                        "its stages begin at numbers of tokens, so its speed depends on its length "
                        "and no time can be given to it; let them begin at shares of the run, or "
                        "compare it with tokens=… and views=[tokens]."
                    )
                if not self._begun(recipe.name):  # else it may be on a machine that only reports
                    check_config(raw)
            except (HydraException, ValueError, OSError) as error:
                raise ValueError(f"{recipe.name}: {str(error).splitlines()[0]}") from error

    def run(self) -> None:
        """All steps that are not done yet. Raises ChildProcessError when one fails.

        The first seed's runs give the speeds; the other seeds have the same budgets.
        """
        first, *others = self.recipes
        views, seeds = self.settings.views, self.settings.seeds
        budget = {"tokens": self.settings.tokens}
        if self.settings.minutes is not None:
            budget = self.budget(60 * self.settings.minutes, self.short_run(first))
        same = {"tokens": budget["tokens"]}
        self.train_all(
            (recipe, recipe.run(seed), seed, budget if recipe == first else same)
            for seed in seeds
            for recipe in (self.recipes if "tokens" in views else [first])
        )
        if "time" in views:
            _, seconds = self.tokens_and_seconds(first.run(seeds[0]))
            known = "tokens" in views
            measured = {r: r.run(seeds[0]) if known else self.short_run(r) for r in others}
            self.train_all(
                (recipe, recipe.run(seed, SAME_TIME), seed, self.budget(seconds, measured[recipe]))
                for seed in seeds
                for recipe in others
            )
        self.report()

    def train_all(self, runs: Iterable[tuple]) -> None:
        """`train` with each of these arguments, by so many workers, each with a GPU of its own if
        there are enough. A run that fails does not stop those beside it."""
        if self.settings.workers == 1:
            for run in runs:
                self.train(*run)
            return
        free = queue.SimpleQueue()
        for worker in range(self.settings.workers):
            free.put(self.gpus[worker % len(self.gpus)] if self.gpus else None)
        own = {"initializer": lambda: setattr(self.thread, "gpu", free.get())}
        with ThreadPoolExecutor(self.settings.workers, **own) as pool:
            done = [pool.submit(self.train, *run) for run in runs]
        for run in done:
            run.result()  # raises what it raised

    def budget(self, seconds: float, measured: str) -> dict:
        """The tokens for so many seconds at a run's speed, and where they come from."""
        tokens, took = self.tokens_and_seconds(measured)
        speed = tokens / took
        return {"tokens": round(seconds * speed), "seconds": seconds,
                "tokens_per_s": speed, "measured": measured}  # fmt: skip

    def train(self, recipe: Recipe, name: str, seed: int, budget: dict) -> None:
        """A run, its evaluations, and what there is to report with it."""
        folder, tokens, done = self.folder / name, budget["tokens"], dict(self.steps)
        if (folder / "config.yaml").exists():  # a run that has begun keeps its schedule
            tokens = yaml.safe_load((folder / "config.yaml").read_text())["train"]["max_tokens"]
        elif "seconds" in budget:
            folder.mkdir(exist_ok=True)
            _write(folder / BUDGET, json.dumps(budget, indent=1))
        arguments = self._training(recipe, name, seed, f"train.max_tokens={tokens}")
        self.step(name, "train/pretrain.py", arguments)
        before = load_run(folder)
        for evaluation, settings in self.settings.evaluate.items():
            arguments = [f"{key}={_spell(value)}" for key, value in settings.items()]
            arguments.append(f"device={self.settings.device}")
            # Results of other settings, of a call by hand, are not what is to be compared.
            found = getattr(before, evaluation, None) or {}
            other = any(
                value not in (None, found.get("settings", settings).get(key))
                for key, value in settings.items()
            )
            self.step(name, f"eval/{evaluation}.py", arguments, again=other)
        if self.steps != done:
            self.report()

    def short_run(self, recipe: Recipe) -> str:
        """The name of a run of a few steps, which shows how fast a recipe trains."""
        name, train = recipe.name + SPEED, self._config(recipe)["train"]
        steps = SPEED_STEPS * (1 + len(train["stages"]))
        largest = max(stage.get("batch_tokens") or 0 for stage in [train, *train["stages"]])
        short = f"train.max_tokens={steps * largest}", "log.wandb=disabled"
        self.step(name, "train/pretrain.py", self._training(recipe, name, 0, *short))
        return name

    def tokens_and_seconds(self, name: str) -> tuple[int, float]:
        """A run's training tokens and seconds. Raises ValueError if it shared a GPU."""
        if (self.folder / name / SHARED).exists():
            raise ValueError(
                f"{name} trained beside others on one GPU, so its time can't be given to others; "
                "compare with views=[tokens], or anew in another output_dir=…"
            )
        steps = load_run(self.folder / name).training
        return steps[-1]["tokens"], clock(steps)[-1]

    def _config(self, recipe: Recipe, *budget: str) -> dict:
        """The resolved config of a recipe's training."""
        arguments = self._training(recipe, recipe.name, self.settings.seeds[0], *budget)
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            return OmegaConf.to_container(compose("config", command_line(arguments)), resolve=True)

    def _training(self, recipe: Recipe, name: str, seed: int, *budget: str) -> list[str]:
        own = *recipe.overrides, *([f"seed={seed}"] if seed else ())
        fixed = f"name={name}", "train.resume=auto", f"device={self.settings.device}"
        return [f"+experiment={recipe.experiment}", *self.overrides, *own, *budget, *fixed]

    def step(self, name: str, script: str, arguments: list[str], again: bool = False) -> None:
        """One command, unless it is done. Raises ChildProcessError with one sentence."""
        key = f"{name}: {script} {' '.join(arguments)}"
        if key in self.steps and not again:
            return
        if self.stopped:
            sys.exit(128 + self.stopped)
        place = self.settings.output_dir
        training = script.startswith("train/")
        where = f"output_dir={place}" if training else f"checkpoint={place}/{name}"
        command = [script, *arguments, where]
        gpu = getattr(self.thread, "gpu", None)
        visible = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        spelt = [*(f"{k}={v}" for k, v in visible.items()), "python", shlex.join(command)]
        print("\n$", *spelt, flush=True)
        started = time.time()
        log = self.folder / f"{name}.log" if self.settings.workers > 1 else None
        if training and self.shared:
            (self.folder / name).mkdir(exist_ok=True)
            _write(self.folder / name / SHARED, json.dumps({"workers": self.settings.workers}))
        with open(log, "a") if log else nullcontext() as output:
            child = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | visible,
                stdout=output,
                stderr=output,
                preexec_fn=_as_child,
                pass_fds=self.inherited,
            )
            self.children.add(child)
            if self.stopped:  # while it was being started
                child.terminate()
            status = child.wait()
            self.children.remove(child)
        if self.stopped:
            if training and status not in (0, 128 + signal.SIGTERM):  # what stop() sends
                print(f"{name}: ended with status {status} and has not saved its last steps")
            sys.exit(128 + self.stopped)
        if status:
            where = f"see {log}" if log else "see above"
            raise ChildProcessError(f"{name}: {script} ended with status {status}; {where}.")
        with self.lock:
            self.steps[key] = round(time.time() - started, 1)
            _write(self.steps_path, json.dumps(self.steps, indent=1))

    def stop(self, number: int, frame) -> None:
        """End the children, before which a training saves, and this process with them."""
        self.stopped = number
        for child in tuple(self.children):
            child.terminate()

    def report(self) -> None:
        """Pages and tables of what has been trained so far."""
        first = self.recipes[0]
        names = {
            view: [
                recipe.run(seed, SAME_TIME if view == "time" and recipe != first else "")
                for seed in self.settings.seeds
                for recipe in self.recipes
            ]
            for view in self.settings.views
        }
        trained = {key.partition(": train/")[0] for key in tuple(self.steps)}
        views = {
            f"equal {view}": [self.folder / name for name in names[view] if name in trained]
            for view in names
        }
        folders = list(dict.fromkeys(folder for group in views.values() for folder in group))
        with self.lock:
            write_comparison(folders, self.folder / "report.html", views)
            write_results(views, self.folder, self.command)


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """The descriptor of a lock on the folder, held until this process and all that inherit it end:
    a training that outlives this process, to save, keeps others out. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another comparison, or a step that one has left, is at work in {folder}; wait "
                "for its end, or give another output_dir=…"
            ) from None
        yield file.fileno()


def _gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        given.replace(" ", "").split(",")
        if given
        else [str(i) for i in range(torch.cuda.device_count())]
    )


def _as_child() -> None:
    """What a step does before it becomes its script.

    Ctrl-C reaches it too, where it would end an evaluation with a traceback: it is ignored (a
    training sets a handler of its own), and stop() ends the step. If this process is killed, Linux
    sends the step SIGTERM, at which a training saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
        settings = from_config(CompareSettings, config)
        with alone_in(resolve_path(settings.output_dir)) as lock:
            comparison = Comparison(settings, overrides, command, lock)
            comparison.check()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, comparison.stop)
            try:
                comparison.run()
            finally:
                if comparison.stopped:
                    print("stopped; the same command goes on from here", flush=True)
    except (HydraException, ValueError, OSError) as error:
        message = str(error).splitlines()[0]
        if isinstance(error, HydraException) and any(a.startswith("recipes=") for a in ours):
            message += "; an entry of recipes=[…] with = in it needs quotes of its own"
        sys.exit(f"error: {message}")
    print(f"report      {comparison.folder / 'report.html'}, results.md")


if __name__ == "__main__":
    main(sys.argv[1:])
