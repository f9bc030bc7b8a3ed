"""Which attention learns to retrieve? Many small decoders, trained at once on one synthetic task.

    python scripts/retrieval_study.py --only 'full*' 'gated_mean 8/4 G4*' --seeds 0 1 2 --workers 8

The task is associative recall (MQAR, arXiv 2312.04927) in text that has something to learn by itself:
a second-order Markov chain in which `pairs` key tokens, each followed by its value, occur twice, at
all distances. A value of several tokens can't be read off a compressed block alone. A variant is a
list of overrides of conf/; each of its seeds gives one line of --out with settings, losses, accuracy
by distance and, with NSA, how often the block of the first occurrence is selected. Several processes
share one GPU. Runs that --out holds are not run again; none is begun that would not end within
--seconds, by the longest so far, and the next call goes on with the rest. At the end comes the table
of all runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import argparse
import itertools
import json
import math
import queue
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from torch import Tensor

from data.config import ROOT, check_root, command_line, from_config
from data.recall_chain import KEYS, VOCABULARY, Sequences, make_sequences
from eval.compare import mean_and_range
from model.build import build_decoder
from model.decoder import Decoder
from model.probe import BlockRecall
from train.cuda_graphs import PassGraph
from train.optimizer import OptimizerConfig, build_optimizer
from train.telemetry import measurement

QUERY_HEADS = 8
LEGEND = """\
accuracy    share of the values asked for whose tokens are all the likeliest; far: from half the length
            away
block       share of heads that select the first occurrence's block, in the layer where most do;
            chance: of as many blocks drawn at random; both from an eighth of the length away
chain loss  nats per token of the text around the pairs
(low .. high) is the range over seeds"""
# About four million parameters; heads as the kernels have them.
SIZES = [
    "model=tiny", "model.dim=256", "model.num_layers=4", f"model.num_heads={QUERY_HEADS}",
    "model.num_kv_heads=2", "model.head_dim=64", "model.ffn_dim=512", "optimizer.lr=2e-3",
    "optimizer.weight_decay=0",
]  # fmt: skip


def variants(selection_kl: float = 0.0) -> dict[str, list[str]]:
    """Overrides by name: the controls with and without the convolution, and for NSA
    `<phi> <l>/<d> G<query heads per key/value head>`, with and without."""
    found = {}
    for conv in (4, 0):
        end = f" conv{conv}" if conv else ""
        found[f"full{end}"] = ["attention=full", f"model.kv_conv={conv}"]
        found[f"sliding{end}"] = [
            "attention=sliding", "attention.window=128", f"model.kv_conv={conv}",
        ]  # fmt: skip
        phis, blocks = ("gated_mean", "mlp", "mean"), ((8, 4), (8, 8), (16, 8), (16, 16), (32, 16))
        for phi, (length, stride), group in itertools.product(phis, blocks, (1, 2, 4, 8)):
            found[f"{phi} {length}/{stride} G{group}{end}"] = [
                "attention=nsa_small", f"attention.compression={phi}",
                f"attention.compress_block={length}", f"attention.compress_stride={stride}",
                f"model.num_kv_heads={QUERY_HEADS // group}", f"model.kv_conv={conv}",
                f"attention.selection_kl={selection_kl}",
            ]  # fmt: skip
    return found


@dataclass(frozen=True)
class Settings:
    """Of every run in a study."""

    length: int
    pairs: int
    value_tokens: int
    batch: int
    steps: int
    warmup: int
    compile: bool
    selection_kl: float
    dense_warmup: float

    def __post_init__(self) -> None:
        for name in ("value_tokens", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1.")
        most = min(KEYS, self.length // (8 * (1 + self.value_tokens)))
        if not 1 <= self.pairs <= most:
            raise ValueError(
                f"--pairs {self.pairs}: sequences of {self.length} tokens take 1 to {most}."
            )


# ---------------------------------------------------------------------------------------------------
# One run


class Run(NamedTuple):
    name: str
    overrides: list[str]
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.seed


class Packed:
    """Batches of sequences of one length as the decoder takes them."""

    def __init__(self, settings: Settings, device: torch.device):
        count, length = settings.batch, settings.length
        self.length = length
        self.positions = torch.arange(length, device=device).repeat(count)
        ends = torch.arange(0, count * length + 1, length, dtype=torch.int32)
        self.cu_seqlens = ends.to(device)

    def run(self, model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor | float]:
        """tokens [batch, T] -> logits fp32 [batch, T, vocab], and the lesson in what to select"""
        inputs = tokens.flatten(), self.positions, self.cu_seqlens, self.length
        hidden, lesson = model.run(*inputs)
        logits = model.logits(hidden).float().view(*tokens.shape, -1)
        return logits, 0.0 if lesson is None else lesson


def losses(logits: Tensor, part: Sequences) -> tuple[Tensor, Tensor]:
    """Mean nats of the chain's tokens and of the values asked for."""
    nats = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), part.tokens[:, 1:].flatten(), reduction="none"
    )
    nats = nats.view(len(part.tokens), -1)
    plain, asked = part.plain[:, 1:], part.whole
    chain = (nats * plain).sum() / plain.sum()
    recall = part.asking(nats).mean(-1)
    return chain, (recall * asked).sum() / asked.sum()


def objective(model, packed: Packed, part: Sequences) -> Tensor:
    """What is minimised."""
    logits, lesson = packed.run(model, part.tokens)
    return sum(losses(logits, part)) + lesson


def build(run: Run) -> tuple[dict, Decoder, OptimizerConfig]:
    """The run's resolved config, its model and optimizer. Raises ValueError or HydraException."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = command_line([*SIZES, *run.overrides])
        raw = OmegaConf.to_container(compose("config", overrides), resolve=True)
    check_root(raw)
    config = from_config(OptimizerConfig, raw["optimizer"], "optimizer")
    torch.manual_seed(run.seed)
    return raw, build_decoder(raw["model"], raw["attention"], VOCABULARY), config


def train(run: Run, settings: Settings, device: torch.device) -> dict:
    """The run's results."""
    began = time.time()
    raw, model, config = build(run)
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if settings.compile:
        torch._dynamo.reset()  # blocks of the run before count as recompilations of these
        for block in model.blocks:
            block.compile(fullgraph=True)
    optimizer = build_optimizer(model, config, 0, fused=device.type == "cuda")
    rng = np.random.default_rng(run.seed + 1)
    task = settings.length, settings.pairs, settings.value_tokens
    held_out = make_sequences(8 * settings.batch, *task, np.random.default_rng(0))
    packed, curve = Packed(settings, device), []
    captured: dict[bool, PassGraph] = {}
    for step in range(settings.steps):
        if step % 64 == 0:
            data = make_sequences(64 * settings.batch, *task, rng)
        here = slice(step % 64 * settings.batch, (step % 64 + 1) * settings.batch)
        part = Sequences(*(x[here].to(device, non_blocking=True) for x in data))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"] * _schedule(step, settings)
        dense = step < settings.dense_warmup * settings.steps
        model.select_all(dense)
        model.zero_grad()
        if device.type == "cpu":
            objective(model, packed, part).backward()
        else:  # a model this small waits for its launches
            if dense not in captured:
                captured[dense] = PassGraph(
                    model, lambda *x: [objective(model, packed, Sequences(*x))], part
                )
            captured[dense](part)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step + 1 == settings.steps or (step + 1) % max(settings.steps // 6, 1) == 0:
            found = evaluate(model, packed, held_out, settings, device)
            curve.append({"step": step + 1, "accuracy": found["accuracy"]})
    return {
        **run._asdict(), **asdict(settings), **found, "curve": curve,
        "parameters": model.num_parameters(), "model": raw["model"], "attention": raw["attention"],
        "optimizer": raw["optimizer"], "seconds": round(time.time() - began, 1),
    }  # fmt: skip


def _schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine to a tenth."""
    rise = min(1.0, (step + 1) / settings.warmup)
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))


@torch.no_grad()
def evaluate(model, packed: Packed, held_out: Sequences, settings: Settings, device) -> dict:
    """Losses, accuracy overall and by distance (from a power of two to the next), and the block
    recall of pairs at least an eighth of the length apart, by layer."""
    chain, asked, right, distances, shares = [], [], [], [], []
    model.eval()
    for start in range(0, len(held_out.tokens), settings.batch):
        part = Sequences(*(x[start : start + settings.batch].to(device) for x in held_out))
        row = torch.arange(settings.batch, device=device)[:, None] * settings.length
        queries, values = (x[part.whole] for x in (row + part.second, row + part.first + 1))
        with BlockRecall(queries, values) as probe:
            logits, _ = packed.run(model, part.tokens)
        for total, loss in zip((chain, asked), losses(logits, part), strict=True):
            total.append(float(loss))
        hit = logits[:, :-1].argmax(-1) == part.tokens[:, 1:]
        right.append(part.asking(hit).all(-1)[part.whole].cpu())
        distances.append((part.second - part.first)[part.whole].cpu())
        if probe.found:
            shares.append(torch.stack([*probe.shares().values()]).cpu())
    model.train()
    correct, distance = torch.cat(right).float(), torch.cat(distances)
    bucket = distance.log2().int()
    result = {
        "chain_loss": round(statistics.fmean(chain), 4),
        "recall_loss": round(statistics.fmean(asked), 4),
        "accuracy": _mean(correct),
        "far_accuracy": _mean(correct[distance >= settings.length // 2]),
        "by_distance": {2 ** int(b): _mean(correct[bucket == b]) for b in bucket.unique()},
    }
    if shares:
        away = torch.cat(shares, 1)[:, distance >= settings.length // 8]
        *layers, chance = map(_mean, away)
        result |= {"block_recall": layers, "block_chance": chance}
    return result


def _mean(x: Tensor) -> float | None:
    return round(float(x.mean()), 4) if len(x) else None


# ---------------------------------------------------------------------------------------------------
# Many runs


def worker(jobs, results, settings: Settings, device: torch.device) -> None:
    """Runs from the queue `jobs` until None; (run, result or None, error or None) into `results`."""
    torch.set_num_threads(1)
    for run in iter(jobs.get, None):
        result, error = None, None
        try:
            result = train(run, settings, device)
        except Exception as problem:  # one that fails does not stop the others
            error = f"{type(problem).__name__}: {str(problem)[-600:]}"
        results.put((run, result, error))


def run_all(
    runs: list[Run], settings: Settings, options, device: torch.device
) -> Iterator[tuple[Run, dict | None]]:
    """Each run with its results as they come, or None if it failed; says why, and how many were not
    begun. The first of each worker are begun in any case: nothing is known of them."""
    deadline = time.time() + options.seconds
    spawn = mp.get_context("spawn")
    jobs, results = spawn.Queue(), spawn.Queue()
    count = min(options.workers, len(runs))
    arguments = jobs, results, settings, device
    workers = [spawn.Process(target=worker, args=arguments, daemon=True) for _ in range(count)]
    for process in workers:
        process.start()
    waiting, begun, longest = list(reversed(runs)), {}, 0.0
    for _ in workers:
        jobs.put(waiting[-1])
        begun[waiting.pop().key] = time.time()
    while begun:
        run, result, error = _next(results, workers)
        now = time.time()
        # Those that go on count too: their end is later still.
        longest = max(longest, *(now - began for began in begun.values()))
        del begun[run.key]
        if waiting and now + longest < deadline:
            jobs.put(waiting[-1])
            begun[waiting.pop().key] = now
        else:
            jobs.put(None)
        if error is not None:
            print(f"{run.name}, seed {run.seed} failed: {error}", flush=True)
        yield run, result
    for process in workers:
        process.join()
    if waiting:
        print(
            f"{len(waiting)} of {len(runs)} runs were not begun, to end within --seconds; the same "
            "command goes on with them."
        )


def _next(results, workers):
    while True:
        try:
            return results.get(timeout=5)
        except queue.Empty:
            if not any(process.is_alive() for process in workers):
                sys.exit("error: all workers ended early; is the memory enough for --workers?")


def table(results: list[dict]) -> str:
    """Mean and, over several seeds, range of each variant's results; the best accuracy first."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["name"], []).append(result)
    columns = {
        "accuracy": lambda r: r["accuracy"],
        "far": lambda r: r["far_accuracy"],
        "block": lambda r: max(r["block_recall"]) if "block_recall" in r else None,
        "chance": lambda r: r.get("block_chance"),
        "chain loss": lambda r: r["chain_loss"],
        "parameters": lambda r: r["parameters"],
        "seconds": lambda r: r["seconds"],
    }
    order = sorted(groups, key=lambda n: -statistics.fmean(r["accuracy"] for r in groups[n]))
    lines = [["variant", "seeds", *columns]]
    for name in order:
        cells = []
        for of in columns.values():
            values = [x for x in map(of, groups[name]) if x is not None]
            form = "{:,.0f}" if max(values, default=0) > 10 else "{:.3f}"
            cells.append(mean_and_range(values, form))
        lines.append([name, str(len(groups[name])), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="outputs/retrieval_study.jsonl", help="results, a line each")
    add("--only", nargs="*", default=["*"], help="variants by name; * and ? match anything")
    add("--list", action="store_true", help="print the names of those variants and stop")
    add("--seeds", type=int, nargs="*", default=[0], help="one run of every variant each")
    add("--workers", type=int, default=1, help="runs at a time")
    add("--seconds", type=float, default=math.inf, help="none is begun that would end later")
    add("--length", type=int, default=2048, help="tokens of a sequence")
    add("--pairs", type=int, default=48, help="keys asked for in a sequence")
    add("--value-tokens", type=int, default=1, help="of a key's value")
    add("--batch", type=int, default=8, help="sequences of a step")
    add("--steps", type=int, default=1200, help="of a run")
    add("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    add("--compile", action="store_true", help="torch.compile: half a minute each, then faster")
    add("--selection-kl", type=float, default=0.0, help="attention.selection_kl of all with NSA")
    add("--dense-warmup", type=float, default=0.0, help="share of steps in which NSA selects all")
    add("overrides", nargs="*", help="of conf/, added to every variant and its name")
    options = parser.parse_args()
    if any("=" in pattern for pattern in options.only):
        sys.exit("error: --only takes names of variants; overrides come first, before all options")
    every = variants(options.selection_kl)
    chosen = {n: o for n, o in every.items() if any(fnmatch(n, p) for p in options.only)}
    if options.list:
        return print("\n".join(chosen))
    if not chosen:
        sys.exit("error: --only matches no variant; --list names them")
    try:
        settings = Settings(*(getattr(options, f) for f in Settings.__dataclass_fields__))
        if options.workers < 1:
            raise ValueError(f"--workers {options.workers}: at least 1.")
    except ValueError as error:
        sys.exit(f"error: {error}")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = [r for r in known if all(r[k] == v for k, v in asdict(settings).items())]
    runs = [
        Run(" ".join([name, *options.overrides]), [*overrides, *options.overrides], seed)
        for seed in options.seeds
        for name, overrides in chosen.items()
    ]
    known = [r for r in known if r.get("step", r["steps"]) == r["steps"]]  # older files have parts
    done = {(r["name"], r["seed"]) for r in known}
    runs = [run for run in runs if run.key not in done]
    for run in {run.name: run for run in runs}.values() if options.overrides else ():
        try:
            with torch.device("meta"):  # shapes only
                build(run)
        except (ValueError, HydraException) as error:
            sys.exit(f"error: {run.name}: {str(error).splitlines()[0]}")
    failed = 0
    if runs:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        machine = {"environment": measurement(device)}
        with open(out, "a", buffering=1) as file:
            for run, result in run_all(runs, settings, options, device):
                if result is None:
                    failed += 1
                    continue
                file.write(json.dumps(result | machine) + "\n")
                known.append(result)
                print(
                    f"{run.name}, seed {run.seed}: accuracy {result['accuracy']:.3f}, "
                    f"{result['seconds']:.0f} s",
                    flush=True,
                )
    if known:
        print(f"\n{table(known)}\n\n{LEGEND}")
    if failed:
        sys.exit(f"error: {failed} of {len(runs)} runs failed, as said above; the same command "
                 "runs them again.")  # fmt: skip


if __name__ == "__main__":
    main()
