"""The training loop, top to bottom."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from data.loader import validation_batches
from data.shards import TokenShards
from data.stages import Stage, fingerprint, open_stages
from data.tokenizer import end_of_text_id, load_tokenizer, token_bytes, vocab_size
from model.build import build_decoder
from model.loss import IGNORED
from train.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from train.config import RunConfig
from train.engine import build_engine, optimizer_step
from train.telemetry import Telemetry, environment, peak_flops


def train(
    run: RunConfig, data_path: Path, device: torch.device, rank: int, world_size: int
) -> Path:
    """Train to the end of the run; returns the last checkpoint's folder. All ranks call it."""
    # -- what the run is made of
    tokenizer = load_tokenizer(data_path / "tokenizer.json")
    eot = end_of_text_id(tokenizer)
    validation = TokenShards.open(data_path / "validation")
    [loader] = open_stages(data_path, [Stage(run.train.seq_len)], run.seed)
    torch.manual_seed(run.seed)  # the same weights on every rank
    model = build_decoder(run.raw["model"], run.raw["attention"], vocab_size(tokenizer))
    model.activation_checkpointing = run.train.activation_checkpointing
    num_parameters = model.num_parameters()
    flops_per_token = model.flops_per_token(run.train.seq_len)
    engine = build_engine(model, run, world_size)
    accumulation = run.accumulation(world_size)
    sequences = run.train.micro_batch_tokens // run.train.seq_len
    config = {**run.raw, "data_path": str(data_path)}

    # -- where it stands
    state, folder = TrainState(data=fingerprint(data_path)), run.folder
    if found := newest_checkpoint(folder):  # train.resume was checked before we came here
        state = load_checkpoint(found, engine)
    if rank == 0:
        _write_records(folder, config, data_path, environment(device), state)
    telemetry = Telemetry(folder, config, run.log, run.num_steps, active=rank == 0)
    say = telemetry.say
    say(f"run         {folder}" + (f", resumed at step {state.step}" if state.step else ""))
    say(f"model       {num_parameters / 1e6:.1f}M parameters, {run.raw['attention']['_target_']}")
    samples = run.num_steps * run.sequences_per_step
    say(
        f"data        {loader.describe(samples)}; padding {loader.padding_share:.1%}; "
        f"validation {validation.num_tokens:,} tokens"
    )
    say(
        f"step        {run.train.batch_tokens:,} tokens = {world_size} ranks x {accumulation} passes"
        f" x {sequences} sequences x {run.train.seq_len:,}"
    )
    say(f"length      {run.num_steps:,} steps, {run.num_steps * run.train.batch_tokens:,} tokens")
    dtype = str(run.dtype).removeprefix("torch.")
    say(f"precision   {dtype} on {device}, ZeRO-{run.parallel.zero_stage}")
    if state.step == run.num_steps:
        say(f"Nothing left to do: {folder} has all its {run.num_steps} steps.")

    # -- the loop
    last = newest_checkpoint(folder)
    peak = peak_flops(device)
    bytes_of = torch.from_numpy(token_bytes(tokenizer)).to(device)
    while state.step < run.num_steps:
        started = time.perf_counter()
        engine.train()
        # The rate at the middle of the step's tokens, so that the first step already moves.
        progress = (state.tokens + run.train.batch_tokens / 2) / run.train.max_tokens
        lr = run.optimizer.lr * run.schedule.scale(progress)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(2, device=device)
        for i in range(accumulation):
            # The global batch is the same however many ranks and passes share it.
            first = state.samples + (i * world_size + rank) * sequences
            batch = loader.batch(first, sequences).to(device)
            loss = engine(*batch_inputs(batch), targets=batch.targets)
            engine.backward(loss.objective)
            grad_norm = optimizer_step(engine)
            sums += torch.stack([loss.nll_sum, loss.count])
        dist.all_reduce(sums)
        nll, count = sums.tolist()  # waits for the device
        seconds = time.perf_counter() - started
        state.step += 1
        state.samples += run.sequences_per_step
        state.tokens += run.train.batch_tokens
        state.seconds += seconds

        now = {"step": state.step, "tokens": state.tokens, "time": round(state.seconds, 3)}
        metrics = now | {
            "loss": nll / count,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": run.train.batch_tokens / seconds,
        }
        if peak:
            metrics["mfu"] = flops_per_token * metrics["tokens_per_s"] / peak / world_size
        if device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        telemetry.record(metrics)
        telemetry.progress(metrics, (run.num_steps - state.step) * state.seconds / state.step)

        final = state.step == run.num_steps
        if final or state.step % run.train.validate_every == 0:
            limit = None if final else run.train.validation_tokens
            batches = list(validation_batches(validation, run.train.seq_len, eot, limit))
            loss, bits = validate(engine, batches, bytes_of, device, rank, world_size)
            telemetry.record(now | {"val/loss": loss, "val/bpb": bits})
            say(
                f"step {state.step}  validation loss {loss:.4f} nats per token, "
                f"{bits:.4f} bits per byte"
            )
        if final or state.step % run.train.checkpoint_every == 0:
            keep = run.train.keep_checkpoints
            last = save_checkpoint(folder, engine, state, config, tokenizer, keep)
    telemetry.close()
    say(f"checkpoint  {last}")
    return last


def batch_inputs(batch) -> tuple:
    """A batch in the order of the decoder's arguments."""
    return batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen


@torch.no_grad()
def validate(engine, batches: list, bytes_of: torch.Tensor, device, rank: int, world_size: int):
    """Mean loss in nats per token, and bits per UTF-8 byte of the text that the targets stand for.

    bytes_of int64 [vocab] counts each token's bytes. Ranks share the batches.
    """
    engine.eval()
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    for start in range(0, len(batches), world_size):
        # Every rank makes the same number of passes: ZeRO-3 gathers parameters in each.
        mine = start + rank
        batch = batches[min(mine, len(batches) - 1)].to(device)
        loss = engine(*batch_inputs(batch), targets=batch.targets)
        if mine < len(batches):
            num_bytes = bytes_of[batch.targets[batch.targets != IGNORED]].sum()
            sums += torch.stack([loss.nll_sum, loss.count, num_bytes])
    dist.all_reduce(sums)
    nll, count, num_bytes = sums.tolist()
    return nll / count, nll / math.log(2) / num_bytes


def _write_records(folder: Path, config: dict, data_path: Path, env: dict, state: TrainState):
    """config.yaml, environment.json and the data's summary; drops records past the resumed step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(env, indent=1))
    shutil.copy(data_path / "summary.json", folder / "data_summary.json")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.step
        ]
        metrics.write_text("".join(kept))
