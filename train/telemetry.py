"""What a run tells: metrics.jsonl always, W&B as a view of it, a line or a bar for the person."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from train.config import LogConfig

# Dense bf16 peak in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """The card's bf16 peak, where known; without it no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for the report."""
    packages = ("torch", "triton", "deepspeed", "datasets", "tokenizers", "hydra-core", "wandb")
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {"python": platform.python_version(), **found, "device": hardware, "commit": commit}


def measurement(device: torch.device) -> dict[str, str]:
    """The head of a result file: environment(), the date, and the command that is running."""
    command = shlex.join(["python", *sys.argv])
    return environment(device) | {"date": time.strftime("%Y-%m-%d"), "command": command}


def code_fingerprint() -> str:
    """Of every source file that a run executes; shown when a run goes on with other code."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for room in ("kernels", "model", "data", "train"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Stopwatch:
    """Seconds of a step by part. On a GPU the parts are timed there, by events in its queue, so
    nothing waits: a part is the time the GPU spent in it or idle before the next."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[str, float | torch.cuda.Event]] = []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """What has passed since the last lap belongs to `part`."""
        self.laps.append((part, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds by part, and of the whole `step`. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in pairwise(self.laps):
            passed = before.elapsed_time(after) / 1000 if self.cuda else after - before
            seconds[part] = seconds.get(part, 0.0) + passed
        return {"step": sum(seconds.values()), **seconds}


class Profiler:
    """torch's profiler around the steps first … last: a trace for chrome://tracing or Perfetto, and
    the table of operators that took the longest."""

    def __init__(self, folder: Path, steps: list[int] | None):
        self.folder, self.steps, self.profile = folder, steps or [0, -1], None

    def before(self, step: int) -> None:
        if step == self.steps[0]:
            self.profile = torch.profiler.profile()
            self.profile.start()

    def after(self, step: int) -> None:
        if self.profile is None or step < self.steps[1]:
            return
        self.profile.stop()
        self.folder.mkdir(exist_ok=True)
        name = "steps_{}_{}".format(*self.steps)
        self.profile.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = self.profile.key_averages().table(f"self_{device}_time_total", 30)
        (self.folder / f"{name}.txt").write_text(table)
        self.profile = None


def mean_rate(steps: list[dict], name: str) -> float:
    """Of something per second, over all of these steps' time."""
    seconds = [sum(v for key, v in step.items() if key.startswith("seconds/")) for step in steps]
    return statistics.fmean([step[name] for step in steps], seconds)


class Telemetry:
    """Rank 0's records; on other ranks every method does nothing."""

    def __init__(self, folder: Path, config: dict, log: LogConfig, num_steps: int, active: bool):
        self.active, self.every = active, log.every
        self.wandb = self.bar = self.file = None
        if not active:
            return
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)  # whole lines, at once
        self.wandb = _start_wandb(folder, config, log)
        if sys.stderr.isatty():
            self.bar = tqdm(total=num_steps, unit="step", dynamic_ncols=True)
        self.num_steps = num_steps
        self.steps = []  # since the last printed line
        self.first, self.length = False, None  # whether the last step was the first of its length

    def say(self, text: str) -> None:
        """A line for the person."""
        if self.active:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def record(self, metrics: dict) -> None:
        """One line of metrics.jsonl; `step` is among the metrics."""
        if not self.active:
            return
        self.file.write(json.dumps(metrics) + "\n")
        self._wandb(lambda run: run.log(metrics, step=metrics["step"]))

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture for W&B; the file is the run's own record of it."""
        if self.wandb:
            import wandb

            self._wandb(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def _wandb(self, action) -> None:
        """action(run) if W&B is on; a view of the run must never stop it."""
        if self.wandb:
            try:
                action(self.wandb)
            except Exception as error:
                self.say(f"W&B stopped: {error}")
                self.wandb = None

    def progress(self, metrics: dict, seconds_left: float) -> None:
        """Move the bar, or print a line every log.every steps and at the end.

        The line's speed is that of the steps since the line before: its own step takes longer, since
        more is measured in it. The first step of a process or a length, which compiles, counts only
        where there is no other.
        """
        if not self.active:
            return
        step = metrics["step"]
        if self.bar is not None or self.length != metrics["seq_len"]:
            self.steps = [metrics]
        else:
            self.steps = [*self.steps[self.first :], metrics]
        self.first, self.length = self.length != metrics["seq_len"], metrics["seq_len"]
        text = f"loss {metrics['loss']:.3f}  {mean_rate(self.steps, 'tokens_per_s'):,.0f} tok/s"
        if "mfu" in metrics:
            text += f"  MFU {mean_rate(self.steps, 'mfu'):.1%}"
        if "memory_gb" in metrics:
            text += f"  {metrics['memory_gb']:.1f} GB"
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        elif step % self.every == 0 or step in (1, self.num_steps):
            left = f"{seconds_left // 60:.0f}m{seconds_left % 60:02.0f}s"
            print(f"step {step}/{self.num_steps}  {text}  {left} left", flush=True)
            self.steps = []

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self._wandb(lambda run: run.finish())
        if self.file:
            self.file.close()


def _start_wandb(folder: Path, config: dict, log: LogConfig):
    """A W&B run in the run's folder, or None: a missing server or key never stops training."""
    mode = log.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    for attempt in dict.fromkeys((mode, "offline")):  # without a server: into a file, for later
        try:
            import wandb

            settings = wandb.Settings(init_timeout=30, finish_timeout=60)
            return wandb.init(
                project=log.wandb_project, name=config["name"], config=config, dir=str(folder),
                mode=attempt, settings=settings,
            )  # fmt: skip
        except Exception as error:
            print(f"W&B {attempt} failed ({error}); metrics.jsonl has everything.", flush=True)
    return None
