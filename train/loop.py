"""The training loop, top to bottom."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from data.batch import Batch, concatenate
from data.config import resolve_path
from data.loader import validation_batches
from data.prefetch import prefetch
from data.shards import TokenShards
from data.stages import Loader, Stage, fingerprint, open_stages
from data.tokenizer import end_of_text_id, load_tokenizer, token_bytes, vocab_size
from eval.in_training import check_needle_in_training, needle_in_training
from model.build import build_decoder
from model.checkpoint import init_from
from model.loss import IGNORED, Loss
from model.probe import NSAProbe
from train.checkpoint import (
    Checkpoints,
    TrainState,
    differences,
    load_checkpoint,
    newest_checkpoint,
)
from train.config import RunConfig
from train.engine import Engine, Ranks
from train.faults import WINDOW, SpikeError, StopSignal, spike
from train.telemetry import (
    Profiler,
    Stopwatch,
    Telemetry,
    code_fingerprint,
    environment,
    peak_flops,
)


def train(run: RunConfig, data_path: Path, ranks: Ranks) -> int:
    """Train to the end of the run, or until a signal, whose number is returned (0: the end).

    All ranks call it. Raises ValueError or FileNotFoundError at the start for data, or needle grids on
    the way, that are not possible; SpikeError after train.max_skipped refused steps in a row, and
    OSError when a checkpoint can't be written; in either case the last checkpoint is whole.
    """
    # -- what the run is made of
    device, folder, settings = ranks.device, run.folder, run.train
    tokenizer = load_tokenizer(data_path / "tokenizer.json")
    eot = end_of_text_id(tokenizer)
    validation = TokenShards.open(data_path / "validation")
    loaders = open_loaders(run, data_path)
    config = run.raw | {"data_path": str(data_path)}
    check_needle_in_training(config, tokenizer, run.needle, folder)
    torch.manual_seed(run.seed)  # the same weights on every rank
    model = build_decoder(run.raw["model"], run.raw["attention"], vocab_size(tokenizer))
    found = newest_checkpoint(folder)  # train.resume was checked before we came here
    origin = "fresh"
    if settings.init_from and not found:
        origin = init_from(model, resolve_path(settings.init_from), tokenizer)
    num_parameters = model.num_parameters()
    engine = Engine(model, run, ranks)
    accumulation = run.accumulation(ranks.world_size)
    checkpoints = Checkpoints(
        folder, settings.keep_checkpoints, settings.keep_every, settings.background_checkpoints
    )
    stop = StopSignal(device)

    # -- where it stands
    code = code_fingerprint()
    state = TrainState(data=fingerprint(data_path), code=code)
    changes = []
    if found:
        state = load_checkpoint(found, engine)
        trained_config = run.as_trained(state.step) | {"data_path": str(data_path)}
        changes = differences(found, trained_config, code)
        state.code = code
    if ranks.rank == 0:
        _write_records(folder, config, data_path, environment(device), state)
    telemetry = Telemetry(folder, config, run.log, run.num_steps, active=ranks.rank == 0)
    say = telemetry.say
    say(f"run         {folder}, {f'resumed at step {state.step}' if found else origin}")
    for change in changes:
        say(f"note        since the checkpoint, {change}")
    say(f"model       {num_parameters / 1e6:.1f}M parameters, {run.raw['attention']['_target_']}")
    say(f"step        {ranks.data_ranks} ranks x {accumulation} passes")
    for i, (stage, loader) in enumerate(zip(run.stages, loaders, strict=True)):
        steps = max(run.last_step(i) - stage.first_step, 0)
        say(
            f"data        from step {stage.first_step:,}: {stage.batch_tokens:,} tokens a step in "
            f"sequences of {stage.seq_len:,}, {loader.describe(steps * run.sequences_per_step(i))}, "
            f"padding {loader.padding_share:.1%}, rope base {stage.rope_base:,.0f}"
        )
    say(f"validation  {validation.num_tokens:,} tokens")
    say(f"length      {run.num_steps:,} steps, {run.num_tokens:,} tokens")
    dtype = str(run.dtype).removeprefix("torch.")
    say(f"precision   {dtype} on {device}, ZeRO-{run.parallel.zero_stage}")
    if state.step >= run.num_steps:
        say(f"Nothing left to do: {folder} has all its {run.num_steps} steps.")

    # Python's 5 ms are long beside a step, for which the thread that makes batches may hold this one up.
    sys.setswitchinterval(2e-5)

    # -- the loop: validate and save what is due, then take a step
    last = found
    peak = peak_flops(device)
    bytes_of = torch.from_numpy(token_bytes(tokenizer)).to(device)
    watch = Stopwatch(device)
    profiler = Profiler(folder / "profile", run.log.profile if ranks.rank == 0 else None)
    stage, length, stream = None, None, None
    while True:
        final = state.step >= run.num_steps
        now = {"step": state.step, "tokens": state.tokens, "time": round(state.seconds, 3)}

        if state.validated < state.step and (final or state.step % settings.validate_every == 0):
            limit = None if final else settings.validation_tokens
            trained = run.trained_stage(state.step)
            model.rotary.set_base(trained.rope_base)
            sequences = list(validation_batches(validation, trained.seq_len, eot, limit))
            # As many in a pass as training has, but something for every rank.
            at_once = trained.micro_batch_tokens // trained.seq_len
            at_once = min(at_once, -(-len(sequences) // ranks.data_ranks))
            batches = [
                concatenate(sequences[i : i + at_once]) for i in range(0, len(sequences), at_once)
            ]
            if scores := validate(engine, batches, bytes_of, ranks, stop):
                telemetry.record(now | scores)
                say(
                    f"step {state.step}  validation loss {scores['val/loss']:.4f} nats per token, "
                    f"{scores['val/bpb']:.4f} bits per byte"
                )
                state.validated = state.step

        taken = stage is not None  # a step, in this sitting
        if taken and run.needle.during.due(state.tokens - length.batch_tokens, state.tokens):
            lent = engine.weights()
            if ranks.rank == 0:
                trained_config = run.as_trained(state.step) | {"data_path": str(data_path)}
                scores, picture = needle_in_training(
                    lent, trained_config, tokenizer, run.needle, folder, state.step, device, say
                )
                telemetry.record(now | scores)
                telemetry.image("needle", picture, state.step)
            dist.barrier()

        stopped = stop.agreed()
        due = final or stopped or state.step % settings.checkpoint_every == 0
        if due and state.step:
            trained_config = run.as_trained(state.step) | {"data_path": str(data_path)}
            last = checkpoints.save(engine, state, trained_config, tokenizer)
        if final or stopped:
            break

        if stage != run.stage(state.step):  # the first, or one of other lengths
            if stream:
                stream.close()
                state.recent.clear()
            stage = run.stage(state.step)
            length = run.stages[stage]
            engine.begin_stage(length)
            stream = prefetch(micro_batches(run, stage, loaders[stage], state.step, ranks))

        # One optimizer step. A signal between two passes gives the half step up; it is repeated
        # when the run continues.
        watch.start()
        profiler.before(state.step + 1)
        engine.train()
        # The rate at the middle of the step's tokens, so that the first step already moves.
        lr = run.lr(state.tokens + length.batch_tokens / 2)
        engine.set_lr(lr)
        sums, flops = torch.zeros(len(Loss._fields) - 1, device=device), 0.0
        for i in range(accumulation):
            if stop.agreed():
                break
            batch = next(stream)
            documents, batch = batch.cu_seqlens.diff(), batch.to(device)
            watch.lap("data")
            loss = engine(batch)
            watch.lap("forward")
            engine.backward(loss)
            sums += torch.stack(loss[1:])
            loss = None  # and the graph behind it, before the next is made
            if peak:  # counted while the device works
                flops += model.flops(documents.tolist()) / ranks.sequence
            watch.lap("backward")
            if i < accumulation - 1:
                engine.step()
        else:
            dist.all_reduce(sums)
            # The device is asked for results when the engine has no more to queue before.
            step = engine.step(
                lambda norm, sums=sums: spike(
                    _mean(sums), norm, state.recent, settings.spike_sigma
                ),
                measure=(state.step + 1) % run.log.every == 0 or state.step + 1 == run.num_steps,
            )
            mean, (_, z_sum, count, answer_nll, answer_count, lesson) = _mean(sums), sums.tolist()
            watch.lap("optimizer")
            seconds = watch.stop()
            state.step += 1
            profiler.after(state.step)
            state.tokens += length.batch_tokens
            state.seconds += seconds["step"]
            if step.refused:
                state.skipped_in_row += 1
                say(f"step {state.step}  skipped: {step.refused}")
            else:
                state.updates += 1
                state.skipped_in_row = 0
                state.recent = [*state.recent, [mean, step.grad_norm]][-WINDOW:]

            metrics = {
                "step": state.step, "tokens": state.tokens, "time": round(state.seconds, 3),
                "loss": mean, "lr": lr, "grad_norm": step.grad_norm, "skipped": state.skipped,
                "tokens_per_s": length.batch_tokens / seconds["step"], "seq_len": length.seq_len,
                "data_wait": seconds["data"] / seconds["step"],
                **{f"seconds/{part}": value for part, value in seconds.items() if part != "step"},
            }  # fmt: skip
            if model.z_loss:
                metrics["z_loss"] = model.z_loss * z_sum / count
            if answer_count:
                metrics["answer_loss"] = answer_nll / answer_count
            if lesson:
                metrics["selection_kl"] = lesson / (accumulation * ranks.world_size)
            if step.update_norm is not None:
                metrics["update_norm"] = step.update_norm
            if peak:
                metrics["mfu"] = flops / seconds["step"] / peak
            if device.type == "cuda":
                metrics["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            telemetry.record(metrics)
            telemetry.progress(
                metrics, (run.num_tokens - state.tokens) * state.seconds / state.tokens
            )
            if state.skipped_in_row >= settings.max_skipped:
                raise SpikeError(
                    _save_batch(run, loaders[stage], stage, state, step.refused, ranks.rank)
                )

    if stream:
        stream.close()
    checkpoints.wait()
    telemetry.close()
    if stopped:
        say(f"stopped by signal {stopped} at step {state.step}; continue with train.resume=true")
    say(f"checkpoint  {last}")
    return 0 if final and state.validated == state.step else stopped


def _mean(sums: torch.Tensor) -> float:
    """The loss of a step, in nats per token."""
    nll, _, count, *_ = sums.tolist()
    return nll / count if count else math.nan


@torch.no_grad()
def validate(engine: Engine, batches: list, bytes_of: torch.Tensor, ranks: Ranks, stop: StopSignal):
    """val/loss in nats per token, val/bpb in bits per UTF-8 byte of the text that the targets stand
    for, and what NSA's gates and selection do on the first batch; None after a signal.

    bytes_of int64 [vocab] counts each token's bytes. Ranks share the batches.
    """
    engine.train(False)
    probe = NSAProbe()
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)
    for start in range(0, len(batches), ranks.data_ranks):
        if stop.agreed():
            return None
        # Every rank makes the same number of passes: ZeRO-3 gathers parameters in each.
        mine = start + ranks.data_rank
        batch = ranks.share(batches[min(mine, len(batches) - 1)]).to(ranks.device)
        with contextlib.nullcontext() if start else probe:
            loss = engine(batch)
        if mine < len(batches):
            num_bytes = bytes_of[batch.targets[batch.targets != IGNORED]].sum()
            sums += torch.stack([loss.nll_sum, loss.count, num_bytes])
    dist.all_reduce(sums)
    nll, count, num_bytes = sums.tolist()
    bits = nll / math.log(2) / num_bytes
    return {"val/loss": nll / count, "val/bpb": bits, **probe.metrics(engine.sequence_group)}


def open_loaders(run: RunConfig, data_path: Path) -> list[Loader]:
    """The loader of each length stage. Raises ValueError when the data does not allow it."""
    stages = []
    for i, stage in enumerate(run.stages):
        later = i + 1 < len(run.stages)
        steps = run.stages[i + 1].first_step - stage.first_step if later else None
        samples = steps and steps * run.sequences_per_step(i)
        stages.append(Stage(stage.seq_len, samples, stage.weights))
    return open_stages(data_path, stages, run.seed)


def micro_batches(
    run: RunConfig, stage: int, loader: Loader, step: int, ranks: Ranks
) -> Iterator[Batch]:
    """This rank's batches from the step after `step` to the end of the stage, in order.

    The global batch is the same however many ranks and passes share it.
    """
    per_step, length = run.sequences_per_step(stage), run.stages[stage]
    count = length.micro_batch_tokens // length.seq_len
    for i in range(step - length.first_step, run.last_step(stage) - length.first_step):
        for start in range(0, per_step, count * ranks.data_ranks):
            first = i * per_step + start + ranks.data_rank * count
            yield ranks.share(loader.batch(first, count))


def _save_batch(
    run: RunConfig, loader: Loader, stage: int, state: TrainState, reason: str, rank: int
) -> str:
    """The last step's tokens into skipped_step_<n>.pt; returns what to tell the person."""
    path = run.folder / f"skipped_step_{state.step:08d}.pt"
    if rank == 0:
        count = run.sequences_per_step(stage)
        first = (state.step - 1 - run.stages[stage].first_step) * count
        torch.save(loader.batch(first, count)._asdict(), path)
    return (
        f"{state.skipped_in_row} steps in a row were skipped, the last since {reason}. Its batch is "
        f"in {path}. Continue from the last checkpoint with train.resume=true and a lower "
        "optimizer.lr or a higher train.spike_sigma."
    )


def _write_records(folder: Path, config: dict, data_path: Path, env: dict, state: TrainState):
    """config.yaml, environment.json and the data's summary; drops records past the resumed step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(env, indent=1))
    shutil.copy(data_path / "summary.json", folder / "data_summary.json")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        kept = [
            line
            for line in metrics.read_text().splitlines(keepends=True)
            if line.endswith("\n") and _belongs(json.loads(line), state)
        ]
        metrics.write_text("".join(kept))


def _belongs(record: dict, state: TrainState) -> bool:
    """A record of what the checkpoint has behind it: the rest will be done again."""
    return record["step"] <= (state.validated if "val/loss" in record else state.step)
