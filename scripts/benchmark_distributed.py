"""Training on several GPUs of one host against one of them: the same losses, and at what speed.

    python scripts/benchmark_distributed.py --ranks 2 --out results.json --seconds 460

Real launches of train/pretrain.py, not compiled, each with a time limit of its own, on the embedded
novels as one document: data parallelism under ZeRO 1 to 3 at 8k and 64k, sequence parallelism at 64k
and beyond; then, beside each other, resuming on other numbers of ranks, a signal and a kill on one
rank, and the other launcher. Results are written after every part, and no part starts after
--seconds; the same call again goes on with what --out lacks. Overrides on the command line are added
to every run: the rehearsal is

    python scripts/benchmark_distributed.py --lengths 256 512 device=cpu model=tiny \\
        tokenizer.vocab_size=512 train.batch_tokens=4096
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from data.config import ROOT
from train.telemetry import measurement

LIMIT = 200  # seconds for one launch; the first ones of a machine compile kernels


class Bench:
    """results: calls, which measured the parts that name their number; parts, a run or several each;
    comparisons of parts that name another as `beside`."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began = options, time.monotonic()
        self.runs = Path(tempfile.mkdtemp(prefix="benchmark_"))
        self.lock = threading.Lock()  # around the results
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        out = Path(options.out)
        self.results = json.loads(out.read_text()) if out.exists() else {"calls": [], "parts": {}}
        self.results["calls"].append(measurement(device))

    def over(self) -> bool:
        return time.monotonic() - self.began > self.options.seconds

    def part(self, name: str, measure, started: bool = False) -> None:
        """measure() -> a dict for the results; what fails is recorded and does not end the rest.

        One that is `started` is waited for, however late it is.
        """
        if self.done(name) or (self.over() and not started):
            return
        began = time.monotonic()
        try:
            result = measure()
        except (RuntimeError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
            result = {"error": str(error)[-800:]}
        with self.lock:
            self.results["parts"][name] = result | {"call": len(self.results["calls"]) - 1}
            self.results["comparisons"] = self.comparisons()
            told = self.results["comparisons"].get(name, {})
            told |= {k: v for k, v in result.items() if k != "losses"}
            print(f"{name}: {json.dumps(told)} ({time.monotonic() - began:.0f} s)", flush=True)
            Path(self.options.out).write_text(json.dumps(self.results, indent=1))

    def done(self, name: str) -> bool:
        return "error" not in self.results["parts"].get(name, {"error": "not run"})

    def comparisons(self) -> dict:
        """Largest relative difference of the losses, and scaling efficiency where both were timed."""
        found, parts = {}, self.results["parts"]
        for name, part in parts.items():
            alone = parts.get(part.get("beside"), {})
            if "losses" not in alone:
                continue
            steps = zip(alone["losses"], part["losses"], strict=False)
            found[name] = {"loss_difference": max(abs(a - b) / a for a, b in steps)}
            if "tokens_per_s" in alone and "tokens_per_s" in part:
                share = part["tokens_per_s"] / alone["tokens_per_s"] / part["ranks"]
                found[name]["efficiency"] = share
        return found

    def launch(
        self, name: str, ranks: int, *overrides: str, launcher: str = "torchrun", gpu: int = 0
    ):
        """A started run."""
        script = ["train/pretrain.py", *overrides, *self.options.overrides]
        script += [f"name={name}", f"output_dir={self.runs}", "log.wandb=disabled"]
        environ = dict(os.environ, OMP_NUM_THREADS="1")
        if ranks == 1:
            command = [sys.executable, *script]
            environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        elif launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={ranks}", *script]
        else:
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
            command += [f"--num_gpus={ranks}", *script]
        log = open(self.runs / f"{name}.log", "w")
        return subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, name: str, process: subprocess.Popen) -> dict:
        """Wait for a run; what its records say."""
        try:
            status = process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if status:
            raise RuntimeError(self.reason(name))
        return self.summary(name)

    def reason(self, name: str) -> str:
        """What a failed run said: its own sentences, else the end of its output."""
        text = (self.runs / f"{name}.log").read_text()
        told = [
            line for line in text.splitlines() if line.startswith("error:") or "Error: " in line
        ]
        return "\n".join(told[:3]) or text[-800:]

    def summary(self, name: str) -> dict:
        lines = (self.runs / name / "metrics.jsonl").read_text().splitlines()
        steps = [m for m in map(json.loads, lines) if "loss" in m]
        measured = steps[len(steps) // 3 :]
        return {
            "tokens_per_s": statistics.median(m["tokens_per_s"] for m in measured),
            "mfu": statistics.median(m.get("mfu", 0) for m in measured),
            "memory_gb": steps[-1].get("memory_gb"),
            "losses": [m["loss"] for m in steps],
        }

    def run(self, name: str, ranks: int, *overrides: str, **how) -> dict:
        return self.finish(name, self.launch(name, ranks, *overrides, **how)) | {"ranks": ranks}

    def beside(self, alone: str, name: str, ranks: int, *overrides: str) -> dict:
        """A run to be compared with the part `alone`."""
        return self.run(name, ranks, *overrides) | {"beside": alone}

    def resumed(self, alone: str, name: str, first: list, then: list) -> dict:
        """Half of the steps by some ranks, the rest by others: (ranks, overrides) each."""
        half = f"train.max_steps={self.options.steps // 2}"
        self.run(name, *first, half)
        result = self.run(name, *then, "train.resume=true")
        return {"losses": result["losses"], "beside": alone}


def children(process: subprocess.Popen) -> list[int]:
    """The ranks that torchrun started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def disturbed(bench: Bench, number: int, recipe: list[str]) -> dict:
    """A run of many steps whose last rank gets a signal: how it ends, and what it leaves."""
    name, ranks = f"signal_{number}", bench.options.ranks
    long = [*recipe, "train.max_steps=20000", "train.checkpoint_every=4"]
    process = bench.launch(name, ranks, *long)
    metrics = bench.runs / name / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count('"loss"') < 6:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(bench.reason(name))
        time.sleep(0.1)
    sent = time.monotonic()
    os.kill(children(process)[-1], number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LIMIT)
    seconds, status = time.monotonic() - sent, process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    text = (bench.runs / f"{name}.log").read_text()
    telling = "stopped by", "error: ", "received by PID"  # the last is torchrun's
    said = [line.strip() for line in text.splitlines() if any(words in line for words in telling)]
    whole = sorted(p.parent.name for p in (bench.runs / name).glob("checkpoints/step_*/state.json"))
    return {
        "seconds_to_end": seconds, "status": status, "said": said[:4], "checkpoints": whole,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lengths", type=int, nargs=2, default=[8192, 65536], help="short, long")
    parser.add_argument("--seconds", type=float, default=460, help="no part starts after these")
    parser.add_argument("--out", default="benchmark_distributed.json")
    parser.add_argument("overrides", nargs="*", help="added to every run")
    options, rest = parser.parse_known_args()
    options.overrides += rest
    bench, ranks = Bench(options), options.ranks
    short, long = options.lengths
    novels = bench.runs / "novels.txt"
    parts = sorted((ROOT / "data" / "austen").glob("*.txt"))
    novels.write_text("\n\n".join(part.read_text(encoding="utf-8") for part in parts))
    shared = [
        "+experiment=nsa_64k", "data=folder", f"data.path={novels}", "tokenizer.vocab_size=8192",
        f"train.max_steps={options.steps}", "train.compile=false",
    ]  # fmt: skip

    def recipe(length: int, attention: str) -> list[str]:
        """Passes of one long sequence, or of as many tokens in short ones."""
        sizes = [f"train.seq_len={length}", f"train.micro_batch_tokens={max(length, long)}"]
        return [*shared, f"attention={attention}", *sizes]

    # One GPU: both lengths at once, on two GPUs, after the data is prepared by the first.
    alone_short = f"1 rank, {short:,} tokens, full"
    alone = {attention: f"1 rank, {long:,} tokens, {attention}" for attention in ("nsa", "full")}
    bench.part(alone_short, lambda: bench.run("alone", 1, *recipe(short, "full")))
    pair = {}
    for gpu, attention in enumerate(alone):
        if not bench.over() and not bench.done(alone[attention]):
            how = recipe(long, attention)
            pair[attention] = bench.launch(f"alone_{attention}", 1, *how, gpu=gpu)
    for attention, process in pair.items():
        name = f"alone_{attention}"
        bench.part(
            alone[attention],
            lambda n=name, p=process: bench.finish(n, p) | {"ranks": 1},
            started=True,
        )
    for stage in (1, 2, 3):
        for attention, length, one in (
            ("full", short, alone_short),
            ("nsa", long, alone["nsa"]),
        ):
            how = [*recipe(length, attention), f"parallel=zero{stage}"]
            bench.part(
                f"{ranks} ranks, {length:,} tokens, {attention}, ZeRO-{stage}",
                lambda n=f"{attention}{stage}", h=how, o=one: bench.beside(o, n, ranks, *h),
            )
    split = f"parallel.sequence={ranks}"
    for attention in ("nsa", "full"):
        bench.part(
            f"{ranks} ranks share {long:,} tokens, {attention}",
            lambda a=attention: bench.beside(alone[a], f"u{a}", ranks, *recipe(long, a), split),
        )
    for attention in ("nsa", "full"):
        bench.part(
            f"{ranks} ranks share {2 * long:,} tokens, {attention}",
            lambda a=attention: bench.run(f"u{a}2", ranks, *recipe(2 * long, a), split),
        )

    # What is not timed runs side by side, with small steps.
    small = [*recipe(short, "full"), f"train.micro_batch_tokens={short}"]
    small += [f"train.batch_tokens={2 * ranks * short}"]
    one, many = (1, *small), (ranks, *small, "parallel=zero3")
    whole = "small steps, 1 rank"
    untimed = {
        whole: lambda: {"losses": bench.run("small", *one)["losses"]},
        f"small steps, by {ranks} ranks under ZeRO-3, then by 1": lambda: bench.resumed(
            whole, "fewer", many, one
        ),
        f"small steps, by 1 rank, then by {ranks} under ZeRO-3": lambda: bench.resumed(
            whole, "more", one, many
        ),
        "SIGTERM on one rank": lambda: disturbed(bench, signal.SIGTERM, small),
        "SIGKILL on one rank": lambda: disturbed(bench, signal.SIGKILL, small),
        "the deepspeed launcher": lambda: {
            "losses": bench.run("ds", ranks, *small, launcher="deepspeed")["losses"],
            "beside": whole,
        },
    }
    with ThreadPoolExecutor(len(untimed)) as pool:
        for name, measure in untimed.items():
            pool.submit(bench.part, name, measure)

    # Longer ones, whose activations do not all fit.
    for times in (4, 8):
        memory = "train.activation_checkpointing=selective"
        sizes = [f"train.batch_tokens={times * long}", "train.max_steps=3", memory]
        for attention in ("nsa", "full"):
            how = [*recipe(times * long, attention), *sizes, split]
            bench.part(
                f"{ranks} ranks share {times * long:,} tokens, {attention}, recomputing: selective",
                lambda n=f"u{attention}{times}", h=how: bench.run(n, ranks, *h),
            )
    shutil.rmtree(bench.runs)


if __name__ == "__main__":
    main()
