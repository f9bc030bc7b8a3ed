"""The run's settings, checked before anything costs time."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from data.config import TokenizerConfig, check_root, data_config, from_config, resolve_path
from eval.needle import NeedleSettings
from model.build import build_decoder
from model.checkpoint import find_checkpoint, matching_weights
from model.parallel import check_heads
from train.optimizer import OptimizerConfig
from train.schedule import Schedule


def _check_answer_share(where: str, share: float) -> None:
    if not 0 <= share < math.inf:
        raise ValueError(f"{where}answer_share={share}; it must be at least 0, and finite.")


@dataclass(frozen=True)
class TrainConfig:
    """conf/train; lengths and batches in tokens."""

    seq_len: int
    batch_tokens: int
    micro_batch_tokens: int
    max_tokens: int
    max_steps: int | None
    stages: list
    dense_until: int
    precision: Literal["auto", "bf16", "fp32"]
    compile: bool
    cuda_graphs: bool
    activation_checkpointing: Literal["none", "full", "selective"]
    answer_share: float
    grad_clip: float
    spike_sigma: float
    max_skipped: int
    validate_every: int
    validation_tokens: int | None
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int | None
    background_checkpoints: bool
    resume: bool | Literal["auto"]
    init_from: str | None

    def __post_init__(self) -> None:
        for name in (
            "seq_len", "batch_tokens", "micro_batch_tokens", "max_tokens", "max_steps",
            "validate_every", "validation_tokens", "checkpoint_every", "keep_checkpoints",
            "keep_every", "max_skipped",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must be at least 1.")
        if self.dense_until < 0:
            raise ValueError(f"train.dense_until={self.dense_until}; it must be at least 0.")
        _check_answer_share("train.", self.answer_share)


@dataclass(frozen=True)
class StageConfig:
    """An entry of train.stages: how a run goes on from a number of tokens."""

    from_tokens: float  # up to 1 a share of train.max_tokens, as in conf/schedule
    seq_len: int
    batch_tokens: int | None = None  # per step, and passes in proportion; None: as before
    rope_base: float | None = None  # None: as before
    weights: dict | None = None  # shares of the sources' tokens; None: the data config's
    answer_share: float | None = None  # None: as before

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.stages: {name}={value}; it must be at least 1.")
        if self.answer_share is not None:
            _check_answer_share("train.stages: ", self.answer_share)

    def start(self, max_tokens: int) -> float:
        """Tokens behind a run of max_tokens when the stage begins."""
        return self.from_tokens * max_tokens if self.from_tokens <= 1 else self.from_tokens


class LengthStage(NamedTuple):
    """The part of a run that begins after `first_step` steps, which took `first_tokens` tokens."""

    first_step: int
    first_tokens: int
    seq_len: int
    batch_tokens: int
    micro_batch_tokens: int  # in proportion to batch_tokens: every step has as many passes
    rope_base: float
    weights: dict | None
    answer_share: float


@dataclass(frozen=True)
class ParallelConfig:
    """conf/parallel"""

    zero_stage: Literal[0, 1, 2, 3]
    sequence: int
    offload: Literal["none", "optimizer", "parameters"]

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise ValueError(f"parallel.sequence={self.sequence}; it must be at least 1.")
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"parallel.offload={self.offload} needs ZeRO-{needed}: choose parallel=zero{needed}."
            )


@dataclass(frozen=True)
class LogConfig:
    """conf/log"""

    every: int
    wandb: Literal["auto", "online", "offline", "disabled"]
    wandb_project: str
    profile: list[int] | None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every}; it must be at least 1 step.")
        if self.profile is not None and not (
            len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
        ):
            raise ValueError(f"log.profile={self.profile}; give [first step, last step] or null.")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run reads. `raw` is the resolved config as plain dicts, for the records."""

    name: str
    output_dir: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: Schedule
    parallel: ParallelConfig
    log: LogConfig
    stages: tuple[LengthStage, ...]
    needle: NeedleSettings
    raw: dict

    @property
    def folder(self) -> Path:
        """Where the run leaves everything; all ranks share it."""
        return self.output_dir / self.name

    def stage(self, step: int) -> int:
        """The number of the length stage to which the step after `step` steps belongs."""
        return max(i for i, stage in enumerate(self.stages) if stage.first_step <= step)

    def last_step(self, stage: int) -> int:
        """Steps behind the run at the stage's end."""
        borders = [s.first_step for s in self.stages[stage + 1 :]]
        return min([*borders, self.num_steps])

    def trained_stage(self, step: int) -> LengthStage:
        """The stage that the first `step` steps end in."""
        return self.stages[self.stage(max(step - 1, 0))]

    def sequences_per_step(self, stage: int) -> int:
        return self.stages[stage].batch_tokens // self.stages[stage].seq_len

    def as_trained(self, step: int) -> dict:
        """The config with the lengths, batches and positions that the first `step` steps end with: what
        a checkpoint's model must be read with."""
        stage = self.trained_stage(step)
        model = {**self.raw["model"], "rope_base": stage.rope_base}
        sizes = {k: getattr(stage, k) for k in ("seq_len", "batch_tokens", "micro_batch_tokens")}
        return {**self.raw, "model": model, "train": {**self.raw["train"], **sizes}}

    @property
    def num_steps(self) -> int:
        """Optimizer steps to train.max_tokens, or to train.max_steps if that comes first."""
        tokens = self.train.max_tokens
        last = [stage for stage in self.stages if stage.first_tokens <= tokens][-1]
        steps = last.first_step + (tokens - last.first_tokens) // last.batch_tokens
        return min(steps, self.train.max_steps or steps)

    @property
    def num_tokens(self) -> int:
        """Of all steps."""
        last = self.trained_stage(self.num_steps)
        return last.first_tokens + (self.num_steps - last.first_step) * last.batch_tokens

    def lr(self, tokens: float) -> float:
        """Learning rate of the matrices after so many tokens."""
        return self.optimizer.lr * self.schedule.scale(tokens, self.train.max_tokens)

    def accumulation(self, world_size: int) -> int:
        """Forward passes per rank and optimizer step. Raises ValueError if they do not come out."""
        ranks = world_size // self.parallel.sequence
        per_pass = self.train.micro_batch_tokens * ranks
        if self.train.batch_tokens % per_pass:
            raise ValueError(
                f"train.batch_tokens={self.train.batch_tokens} is not a multiple of "
                f"train.micro_batch_tokens x ranks = {self.train.micro_batch_tokens} x "
                f"{ranks} = {per_pass}; train.batch_tokens={per_pass} would do."
            )
        return self.train.batch_tokens // per_pass


def check_config(raw: dict) -> RunConfig:
    """The checked run. Raises ValueError or FileNotFoundError with one sentence."""
    check_root(raw)
    train = from_config(TrainConfig, raw["train"], "train")
    device = _device(raw, train)
    if raw["name"] in ("", ".", "..", "data"):  # where all runs are, and their data
        raise ValueError(f"name={raw['name']}; a run needs a name of its own for its folder.")
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    run = RunConfig(
        name=raw["name"],
        output_dir=resolve_path(raw["output_dir"]),
        seed=raw["seed"],
        device=device,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[precision],
        train=train,
        optimizer=from_config(OptimizerConfig, raw["optimizer"], "optimizer"),
        schedule=from_config(Schedule, raw["schedule"], "schedule"),
        parallel=from_config(ParallelConfig, raw["parallel"], "parallel"),
        log=from_config(LogConfig, raw["log"], "log"),
        stages=_stages(train, raw["model"]["rope_base"]),
        needle=from_config(NeedleSettings, raw["eval"], "eval"),
        raw=raw,
    )
    run.accumulation(world_size=run.parallel.sequence)
    _check_parallel(run)
    if run.num_steps < 1:
        raise ValueError(
            f"train.max_tokens={train.max_tokens} is less than one step of "
            f"train.batch_tokens={train.batch_tokens}."
        )
    for stage in run.stages:
        _check_blocks(raw["attention"], stage.seq_len)
    data_config(raw["data"])
    from_config(TokenizerConfig, raw["tokenizer"], "tokenizer")
    with torch.device("meta"):  # shapes only: a misfit shows before data is prepared
        model = build_decoder(raw["model"], raw["attention"], vocab_size=256)
    if train.init_from and not any(run.folder.glob("checkpoints/step_*")):  # else it has its own
        try:
            matching_weights(
                model, find_checkpoint(resolve_path(train.init_from)), vocabulary=False
            )
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"train.init_from: {error} Give a run that fits, or null to start afresh."
            ) from None
    return run


def _stages(train: TrainConfig, rope_base: float) -> tuple[LengthStage, ...]:
    """Where each stage begins, rounded down to a step. Raises ValueError if borders don't fit."""
    if train.batch_tokens % train.micro_batch_tokens:
        raise ValueError(
            f"train.batch_tokens={train.batch_tokens} is not a multiple of train.micro_batch_tokens="
            f"{train.micro_batch_tokens}; "
            f"{-(-train.batch_tokens // train.micro_batch_tokens) * train.micro_batch_tokens} would do."
        )
    passes = train.batch_tokens // train.micro_batch_tokens
    sizes = train.batch_tokens, train.micro_batch_tokens
    begin = train.seq_len, *sizes, float(rope_base), None, train.answer_share
    stages = [LengthStage(0, 0, *begin)]
    for i, entry in enumerate(train.stages):
        stage, before = from_config(StageConfig, entry, f"train.stages.{i}"), stages[-1]
        tokens = stage.start(train.max_tokens) - before.first_tokens
        steps = int(tokens // before.batch_tokens)
        if steps < 1:
            raise ValueError(
                f"train.stages.{i}.from_tokens={stage.from_tokens} is not beyond the stage before it, "
                f"with train.max_tokens={train.max_tokens}; train.stages=[] trains without stages."
            )
        first = before.first_step + steps, before.first_tokens + steps * before.batch_tokens
        batch = stage.batch_tokens or before.batch_tokens
        base = before.rope_base if stage.rope_base is None else stage.rope_base
        sizes = stage.seq_len, batch, batch // passes
        answers = before.answer_share if stage.answer_share is None else stage.answer_share
        stages.append(LengthStage(*first, *sizes, base, stage.weights, answers))
    for stage in stages:
        if stage.batch_tokens % (passes * stage.seq_len):
            raise ValueError(_misfit(stage, train, passes))
    return tuple(stages)


def _misfit(stage: LengthStage, train: TrainConfig, passes: int) -> str:
    """Why the stage's passes do not hold whole sequences, and what would do."""
    whole = max(stage.micro_batch_tokens // stage.seq_len, 1) * stage.seq_len
    if stage.batch_tokens == train.batch_tokens:
        return (
            f"train.micro_batch_tokens={train.micro_batch_tokens} is not a multiple of "
            f"seq_len={stage.seq_len}; {whole} would do."
        )
    return (
        f"train.stages: batch_tokens={stage.batch_tokens} does not divide into {passes} passes, as "
        f"many as the run's first step has, of whole sequences of {stage.seq_len}; "
        f"{passes * whole} would do."
    )


def _device(raw: dict, train: TrainConfig) -> torch.device:
    wanted = raw["device"]
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={wanted!r}; it must be auto, cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"The run '{raw['name']}' needs a CUDA GPU and torch sees none on this machine. "
            "For a first look on a CPU: python train/pretrain.py +experiment=quickstart. To try "
            "this recipe here, add: device=cpu data=austen model=tiny train.max_steps=2 "
            f"train.stages=[] train.batch_tokens={train.micro_batch_tokens} train.compile=false"
            + (" train.init_from=null" if train.init_from else "")
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def missing_for_cpu_compile() -> str | None:
    """What torch's code generation for CPUs lacks on this machine, or None."""
    if not any(map(shutil.which, filter(None, ("g++", "clang++", os.environ.get("CXX"))))):
        return "a C++ compiler (g++)"
    if " " in torch.__file__:  # its linker call does not quote the path
        return f"torch at a path without spaces, not {Path(torch.__file__).parent}"
    return None


def _check_parallel(run: RunConfig) -> None:
    """What does not go together."""
    stage, sequence = run.parallel.zero_stage, run.parallel.sequence
    if run.optimizer.name == "muon" and stage > 0:
        raise ValueError(
            f"optimizer=muon works on whole matrices, and ZeRO-{stage} cuts them into flat pieces; "
            "choose parallel=zero0 or optimizer=adamw."
        )
    if run.train.compile and stage == 3:
        raise ValueError(
            "train.compile=true does not go with parallel=zero3, which gathers parameters in hooks "
            "inside the blocks; choose parallel=zero2 or train.compile=false."
        )
    if run.train.compile and run.device.type == "cpu" and (missing := missing_for_cpu_compile()):
        raise ValueError(f"train.compile=true on a CPU needs {missing}; leave it false here.")
    for length in run.stages:
        if length.micro_batch_tokens % sequence:
            raise ValueError(
                f"A pass of {length.micro_batch_tokens} tokens, from step {length.first_step} on, does "
                f"not divide into parallel.sequence={sequence} equal stretches; see "
                "train.micro_batch_tokens."
            )
    alone = stage < 3 and sequence == 1 and run.train.activation_checkpointing == "none"
    if run.train.cuda_graphs and run.device.type == "cuda" and not alone:
        raise ValueError(
            "train.cuda_graphs=true goes with ZeRO-0 to 2, parallel.sequence=1 and "
            "train.activation_checkpointing=none; choose these or train.cuda_graphs=false."
        )
    check_heads(run.raw["model"]["num_heads"], run.raw["model"]["num_kv_heads"], sequence)


def _check_blocks(attention: dict, seq_len: int) -> None:
    """A sequence must hold at least one block of each kind that the attention names."""
    for key in ("compress_block", "select_block"):
        if attention.get(key, 0) > seq_len:
            raise ValueError(
                f"train.seq_len={seq_len} is shorter than attention.{key}={attention[key]}; "
                "take longer sequences or smaller blocks."
            )
