"""How fast a recipe trains: step time, MFU, memory, and what DeepSpeed and torch.compile cost or gain.

    python scripts/benchmark_step.py --out bench.json --seconds 120

Random tokens in documents of one sequence each, on one device, through the trainer's own engine and
through a bare torch loop. A variant is a recipe with overrides; each writes its line as it ends, and none
starts after --seconds. A GPU at its power limit lowers its clock: the mean clock and power during the
measured steps are written beside them. Of some a step is profiled: its largest parts, the time of all, and
how long the device idled meanwhile; for those not compiled there is the time of a forward pass as in
evaluation, without lesson and never captured. Where a recipe was measured at several lengths, a figure
beside --out shows how its time grows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import argparse
import gc
import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.batch import Batch
from data.config import ROOT, command_line
from eval.speed import save_growth
from model.build import build_decoder
from train.config import RunConfig, check_config
from train.engine import Engine, Ranks, start_process_group
from train.optimizer import build_optimizer
from train.telemetry import measurement, peak_flops

WARM_UP = 3  # steps after the first
DENSE = ["+experiment=full_8k"]
SMALL_PASS = ["train.micro_batch_tokens=8192"]
VARIANTS = {  # name: (overrides, bare loop?, profile?)
    "compiled": (DENSE, False, True),
    "compiled, bare loop": (DENSE, True, False),
    "compiled, one sequence a pass": ([*DENSE, *SMALL_PASS], False, False),
    "compiled, one sequence a pass, bare loop": ([*DENSE, *SMALL_PASS], True, False),
    "eager": ([*DENSE, "train.compile=false"], False, False),
    "nsa at 64k": (["+experiment=nsa_64k"], False, True),
    "nsa_fine at 64k": (["+experiment=nsa_64k", "attention=nsa_fine"], False, False),
    "full at 64k": (["+experiment=full_64k"], False, False),
    "sliding at 64k": (["+experiment=sliding_64k"], False, False),
    "nsa at 16k": (["+experiment=nsa_64k", "train.seq_len=16384"], False, False),
    "full at 16k": (["+experiment=full_64k", "train.seq_len=16384"], False, False),
    "nsa at 64k, selective": (
        ["+experiment=nsa_64k", "train.activation_checkpointing=selective"], False, False,
    ),
}  # fmt: skip
SMALL = ["+experiment=nsa_small_64k", "train.stages=[]"]
VARIANTS |= {
    "nsa small, 8 x 2k": (SMALL, False, True),
    "nsa small, 8 x 2k, without graphs": ([*SMALL, "train.cuda_graphs=false"], False, False),
    "nsa small, 8 x 2k, compiled": ([*SMALL, "train.compile=true"], False, False),
    "full small, 8 x 2k": (["+experiment=full_small_64k", "train.stages=[]"], False, False),
}


def _at_length(recipe: str, n: int, *overrides: str) -> tuple[list[str], bool, bool]:
    """A variant whose steps are one sequence of n * 1,024 tokens."""
    sizes = [
        f"train.{size}={n << 10}" for size in ("seq_len", "micro_batch_tokens", "batch_tokens")
    ]
    return [f"+experiment={recipe}", "train.stages=[]", *sizes, *overrides], False, False


def _stride(d: int) -> tuple[str, str]:
    return f"attention.compress_block={2 * d}", f"attention.compress_stride={d}"


LENGTHS = 32, 64, 128, 256
VARIANTS |= {f"nsa small at {n}k": _at_length("nsa_small_64k", n) for n in LENGTHS}
VARIANTS |= {
    f"{name} small at 64k": _at_length(f"{name}_small_64k", 64) for name in ("full", "sliding")
}
VARIANTS |= {  # as many compressed keys at any length
    f"nsa small, stride by length at {n}k": _at_length("nsa_small_64k", n, *_stride(n // 8))
    for n in LENGTHS[1:]
}


class BareLoop:
    """The same step without DeepSpeed: bf16 model, fp32 copies, clipping, fused AdamW."""

    def __init__(self, model, run: RunConfig, device: torch.device):
        self.model = model.to(device, run.dtype)
        self.optimizer = build_optimizer(self.model, run.optimizer, 0, device.type == "cuda")
        self.passes, self.clip, self.count = run.accumulation(1), run.train.grad_clip, 0
        if run.train.compile:
            for block in model.blocks:
                block.compile(fullgraph=True)

    def __call__(self, batch: Batch):
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        inputs = batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen
        return self.model(*inputs, targets=batch.targets)

    def backward(self, loss) -> None:
        (loss.objective / self.passes).backward()

    def step(self) -> None:
        self.count += 1
        if self.count % self.passes == 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.model.zero_grad()


def random_batch(run: RunConfig, device: torch.device) -> Batch:
    count, length = run.train.micro_batch_tokens // run.train.seq_len, run.train.seq_len
    vocabulary = run.raw["tokenizer"]["vocab_size"]
    tokens = torch.randint(vocabulary, (count * length + 1,), device=device)
    positions = torch.arange(length, device=device).repeat(count)
    cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
    answers = torch.zeros_like(positions, dtype=torch.float32)
    return Batch(tokens[:-1], tokens[1:], answers, positions, cu_seqlens, length)


def measure(overrides, bare: bool, profile: bool, ranks: Ranks, steps: int) -> dict:
    """One variant: a line of results."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        raw = OmegaConf.to_container(compose("config", command_line(overrides)), resolve=True)
    run, device = check_config(raw), ranks.device
    torch.manual_seed(0)
    model = build_decoder(raw["model"], raw["attention"], raw["tokenizer"]["vocab_size"])
    count = model.num_parameters()
    if bare:
        engine = BareLoop(model, run, device)
    else:
        engine = Engine(model, run, ranks)
        engine.begin_stage(run.stages[0])
    flops = model.flops_per_token(run.train.seq_len)
    batch, cuda = random_batch(run, device), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        for _ in range(run.accumulation(1)):
            engine.backward(engine(batch))
            engine.step()

    def forward() -> None:
        with torch.no_grad():
            model(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                batch.max_seqlen,
                targets=batch.targets,
            )

    def timed(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = timed(step)
    for _ in range(WARM_UP):
        timed(step)
    with GpuClock(device) as clock:
        times = [timed(step) for _ in range(steps)]
    seconds = sorted(times)[steps // 2]
    rate = run.train.batch_tokens / seconds
    result = {
        "parameters": count, "tokens_per_step": run.train.batch_tokens, "first_step_s": first,
        "step_s": seconds, "steps_s": times, "tokens_per_s": rate, "overrides": overrides,
        "mfu": rate * flops / peak if (peak := peak_flops(device)) else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None, **clock.means(),
    }  # fmt: skip
    if not run.train.compile:  # which would take a minute more
        model.eval()
        timed(forward)
        forward_s = sorted(timed(forward) for _ in range(steps))[steps // 2]
        result["forward_s"] = forward_s / (len(batch.cu_seqlens) - 1)  # of a sequence
        model.train()
    if profile:
        kinds = torch.profiler.ProfilerActivity  # on a GPU its own alone: the host would be slower
        with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as found:
            result["profiled_step_s"] = timed(step)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = [
            e for e in found.key_averages() if not cuda or "cuda" in str(e.device_type).lower()
        ]
        total = sum(getattr(e, key) for e in events)
        largest = sorted(events, key=lambda e: -getattr(e, key))[:12]
        result["profile"] = {e.key[:90]: getattr(e, key) / max(total, 1) for e in largest}
        result["profiled_s"] = total / 1e6
        if cuda:
            ranges = [e.time_range for e in found.events() if "cuda" in str(e.device_type).lower()]
            result["idle_s"] = uncovered((r.start, r.end) for r in ranges) / 1e6
    return result


class GpuClock:
    """The mean clock and power of a GPU while this context lasts, by nvidia-smi; nothing without it."""

    QUERY = {"clock_mhz": "clocks.sm", "power_w": "power.draw", "power_limit_w": "power.limit"}

    def __init__(self, device: torch.device):
        self.command = None
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            uuid = torch.cuda.get_device_properties(device).uuid
            query = f"--query-gpu={','.join(self.QUERY.values())}"
            form = "--format=csv,noheader,nounits"
            self.command = ["nvidia-smi", f"--id=GPU-{uuid}", query, form, "--loop-ms=100"]

    def __enter__(self) -> GpuClock:
        if self.command:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
            self.process.stdout.readline()  # from before, but now it runs
        return self

    def __exit__(self, *error) -> None:
        self.text = ""
        if self.command:
            self.process.terminate()
            self.text = self.process.communicate()[0]

    def means(self) -> dict[str, float]:
        rows = re.findall(r"^([\d.]+), ([\d.]+), ([\d.]+)\n", self.text, re.MULTILINE)
        columns = zip(*rows, strict=True)
        return {
            name: statistics.mean(map(float, column))
            for name, column in zip(self.QUERY, columns, strict=bool(rows))
        }


def uncovered(spans: Iterable[tuple[float, float]]) -> float:
    """The time that lies in no (start, end), between the first start and the last end."""
    spans = sorted(spans)
    reached = accumulate((end for _, end in spans), max)
    return sum(max(0.0, start - end) for (start, _), end in zip(spans[1:], reached, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="outputs/benchmark_step.json", help="results, a JSON file")
    parser.add_argument("--seconds", type=float, default=600, help="no variant starts after these")
    parser.add_argument("--steps", type=int, default=15, help="measured steps; the median counts")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    parser.add_argument("overrides", nargs="*", help="added to every variant")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in VARIANTS]:
        parser.error(f"--only: there is no {unknown[0]!r}; choose among {', '.join(VARIANTS)}")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = start_process_group(device)
    results = {"environment": measurement(ranks.device), "variants": {}}
    began = time.perf_counter()
    for name in options.only:
        if time.perf_counter() - began > options.seconds:
            break
        overrides, bare, profile = VARIANTS[name]
        overrides = [*overrides, *options.overrides]
        try:
            result = measure(overrides, bare, profile, ranks, options.steps)
        except (RuntimeError, ValueError) as error:
            result = {"error": str(error)[-600:]}
        results["variants"][name] = result | {"after_s": time.perf_counter() - began}
        print(name, json.dumps(result), flush=True)
        out.write_text(json.dumps(results, indent=1))
        save_growth(results["variants"], out.with_suffix(".png"))
        torch._dynamo.reset()  # or it would compile later variants for any shape
        gc.collect()
        torch.cuda.empty_cache()
    if not any("step_s" in result for result in results["variants"].values()):
        sys.exit("error: no variant was measured; see above.")


if __name__ == "__main__":
    main()
