"""Training on several GPUs of one host against one of them: the same losses, and at what speed.

    python scripts/benchmark_distributed.py --ranks 2 --out results.json --seconds 460

Real launches of train/pretrain.py, each with a time limit of its own, on the embedded novels as one
document: data parallelism under ZeRO 1 to 3 at 8k and 64k, sequence parallelism at 64k, 128k and
beyond, resuming on fewer ranks, a signal and a kill on one rank, and both launchers. Results are
written after every part, and no part starts after --seconds. Overrides on the command line are added
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
import time

import torch

from data.config import ROOT
from train.telemetry import measurement

LIMIT = 90  # seconds for one launch


class Bench:
    def __init__(self, options: argparse.Namespace):
        self.options, self.began = options, time.monotonic()
        self.runs = Path(tempfile.mkdtemp(prefix="benchmark_"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.results = {"environment": measurement(device), "parts": {}}

    def over(self) -> bool:
        return time.monotonic() - self.began > self.options.seconds

    def part(self, name: str, measure, started: bool = False) -> dict:
        """measure() -> a dict for the results; what fails is recorded and does not end the rest.

        One that is `started` is waited for, however late it is.
        """
        if self.over() and not started:
            return {}
        began = time.monotonic()
        try:
            result = measure()
        except (RuntimeError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
            result = {"error": str(error)[-800:]}
        shown = {k: v for k, v in result.items() if k != "losses"}
        print(f"{name}: {json.dumps(shown)} ({time.monotonic() - began:.0f} s)", flush=True)
        self.results["parts"][name] = result
        Path(self.options.out).write_text(json.dumps(self.results, indent=1))
        return result

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
        return self.finish(name, self.launch(name, ranks, *overrides, **how))

    def compared(self, alone: dict, name: str, ranks: int, *overrides: str) -> dict:
        """A run beside one GPU's: largest relative difference of the losses, scaling efficiency."""
        result = self.run(name, ranks, *overrides)
        if "losses" in alone:
            pairs = zip(alone["losses"], result["losses"], strict=False)
            result["loss_difference"] = max(abs(a - b) / a for a, b in pairs)
            result["efficiency"] = result["tokens_per_s"] / alone["tokens_per_s"] / ranks
        return result | {"tokens_per_s_per_rank": result["tokens_per_s"] / ranks}


def children(process: subprocess.Popen) -> list[int]:
    """The ranks that torchrun started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def disturbed(bench: Bench, number: int, recipe: list[str]) -> dict:
    """A run of many steps whose second rank gets a signal: how it ends, and that it goes on."""
    name, ranks = f"signal_{number}", bench.options.ranks
    long = [*recipe, "train.max_steps=2000", "train.checkpoint_every=2"]
    process = bench.launch(name, ranks, *long)
    metrics = bench.runs / name / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count('"loss"') < 3:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(bench.reason(name))
        time.sleep(0.1)
    sent = time.monotonic()
    os.kill(children(process)[1], number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LIMIT)
    seconds, status = time.monotonic() - sent, process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    text = (bench.runs / f"{name}.log").read_text()
    said = [line for line in text.splitlines() if "stopped by" in line or line.startswith("error:")]
    whole = sorted(p.parent.name for p in (bench.runs / name).glob("checkpoints/step_*/state.json"))
    return {
        "seconds_to_end": seconds, "status": status, "said": said[:2], "checkpoints": whole,
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
    alone = {
        "short": bench.part(
            "1 rank, short", lambda: bench.run("alone_short", 1, *recipe(short, "full"))
        )
    }
    pair = {}
    if not bench.over():
        for gpu, (name, attention) in enumerate((("alone_nsa", "nsa"), ("alone_full", "full"))):
            pair[name] = bench.launch(name, 1, *recipe(long, attention), gpu=gpu)
    for name, process in pair.items():
        alone[name] = bench.part(
            f"1 rank, long, {name}", lambda n=name, p=process: bench.finish(n, p), started=True
        )
    for stage in (1, 2, 3):
        zero = f"parallel=zero{stage}"
        bench.part(
            f"{ranks} ranks, short, ZeRO-{stage}",
            lambda zero=zero, stage=stage: bench.compared(
                alone["short"], f"s{stage}", ranks, *recipe(short, "full"), zero
            ),
        )
        bench.part(
            f"{ranks} ranks, long nsa, ZeRO-{stage}",
            lambda zero=zero, stage=stage: bench.compared(
                alone.get("alone_nsa", {}), f"n{ranks}{stage}", ranks, *recipe(long, "nsa"), zero
            ),
        )
    split = f"parallel.sequence={ranks}"
    for attention, one in (("nsa", "alone_nsa"), ("full", "alone_full")):
        for times, beside in ((1, alone.get(one, {})), (2, {})):
            bench.part(
                f"{ranks} ranks share a sequence of {times * long}, {attention}",
                lambda a=attention, n=times * long, b=beside: bench.compared(
                    b, f"u{a}{n}", ranks, *recipe(n, a), split
                ),
            )
    more = f"train.max_steps={options.steps + 3}"
    bench.part(
        f"saved by {ranks} ranks under ZeRO-3, continued by 1",
        lambda: bench.run("s3", 1, *recipe(short, "full"), more, "train.resume=true"),
    )
    for number in (signal.SIGTERM, signal.SIGKILL):
        bench.part(
            f"{number.name} on one rank",
            lambda n=number: disturbed(bench, n, recipe(short, "full")),
        )
    bench.part(
        "the deepspeed launcher",
        lambda: bench.run("ds", ranks, *recipe(short, "full"), launcher="deepspeed"),
    )
    # Longer ones, whose activations do not all fit.
    for times, recompute in ((4, "selective"), (8, "full")):
        sizes = [f"train.batch_tokens={times * long}", "train.max_steps=3"]
        memory = f"train.activation_checkpointing={recompute}"
        for attention in ("nsa", "full"):
            how = [*recipe(times * long, attention), *sizes, memory, split]
            bench.part(
                f"{ranks} ranks share a sequence of {times * long}, {attention}, {memory}",
                lambda name=f"u{attention}{times}", how=how: bench.run(name, ranks, *how),
            )
    shutil.rmtree(bench.runs)


if __name__ == "__main__":
    main()
