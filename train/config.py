"""The run's settings, checked before anything costs time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data.config import TokenizerConfig, check_root, data_config, from_config, resolve_path
from eval.needle import NeedleSettings
from model.build import build_decoder
from train.optimizer import AdamWConfig
from train.schedule import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """conf/train; lengths and batches in tokens."""

    seq_len: int
    batch_tokens: int
    micro_batch_tokens: int
    max_tokens: int
    max_steps: int | None
    precision: Literal["auto", "bf16", "fp32"]
    activation_checkpointing: bool
    grad_clip: float
    validate_every: int
    validation_tokens: int | None
    checkpoint_every: int
    keep_checkpoints: int
    resume: bool | Literal["auto"]

    def __post_init__(self) -> None:
        if self.micro_batch_tokens % self.seq_len:
            raise ValueError(
                f"train.micro_batch_tokens={self.micro_batch_tokens} is not a multiple of "
                f"train.seq_len={self.seq_len}."
            )
        for name in ("validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class ParallelConfig:
    """conf/parallel"""

    zero_stage: Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class LogConfig:
    """conf/log"""

    every: int
    wandb: Literal["auto", "online", "offline", "disabled"]
    wandb_project: str


@dataclass(frozen=True)
class RunConfig:
    """Everything a run reads. `raw` is the resolved config as plain dicts, for the records."""

    name: str
    output_dir: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    train: TrainConfig
    optimizer: AdamWConfig
    schedule: Schedule
    parallel: ParallelConfig
    log: LogConfig
    raw: dict

    @property
    def folder(self) -> Path:
        """Where the run leaves everything; all ranks share it."""
        return self.output_dir / self.name

    @property
    def sequences_per_step(self) -> int:
        return self.train.batch_tokens // self.train.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps to train.max_tokens, or to train.max_steps if that comes first."""
        steps = self.train.max_tokens // self.train.batch_tokens
        return min(steps, self.train.max_steps or steps)

    def accumulation(self, world_size: int) -> int:
        """Forward passes per rank and optimizer step. Raises ValueError if they do not come out."""
        per_pass = self.train.micro_batch_tokens * world_size
        if self.train.batch_tokens % per_pass:
            raise ValueError(
                f"train.batch_tokens={self.train.batch_tokens} is not a multiple of "
                f"train.micro_batch_tokens x ranks = {self.train.micro_batch_tokens} x "
                f"{world_size} = {per_pass}."
            )
        return self.train.batch_tokens // per_pass


def check_config(raw: dict) -> RunConfig:
    """The checked run. Raises ValueError or FileNotFoundError with one sentence."""
    check_root(raw)
    device = _device(raw)
    train = from_config(TrainConfig, raw["train"], "train")
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
        optimizer=from_config(AdamWConfig, raw["optimizer"], "optimizer"),
        schedule=from_config(Schedule, raw["schedule"], "schedule"),
        parallel=from_config(ParallelConfig, raw["parallel"], "parallel"),
        log=from_config(LogConfig, raw["log"], "log"),
        raw=raw,
    )
    run.accumulation(world_size=1)
    if run.num_steps < 1:
        raise ValueError(
            f"train.max_tokens={train.max_tokens} is less than one step of "
            f"train.batch_tokens={train.batch_tokens}."
        )
    _check_blocks(raw["attention"], train.seq_len)
    data_config(raw["data"])
    from_config(TokenizerConfig, raw["tokenizer"], "tokenizer")
    from_config(NeedleSettings, raw["eval"], "eval")
    with torch.device("meta"):  # shapes only: a misfit shows before data is prepared
        build_decoder(raw["model"], raw["attention"], vocab_size=256)
    return run


def _device(raw: dict) -> torch.device:
    wanted = raw["device"]
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={wanted!r}; it must be auto, cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"The run '{raw['name']}' needs a CUDA GPU and torch sees none on this machine. "
            "For a first look on a CPU: python train/pretrain.py +experiment=quickstart. To try "
            "this recipe here, add: device=cpu data=austen model=tiny train.max_steps=2 "
            "train.batch_tokens=65536"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _check_blocks(attention: dict, seq_len: int) -> None:
    """A sequence must hold at least one block of each kind that the attention names."""
    for key in ("compress_block", "select_block"):
        if attention.get(key, 0) > seq_len:
            raise ValueError(
                f"train.seq_len={seq_len} is shorter than attention.{key}={attention[key]}; "
                "take longer sequences or smaller blocks."
            )
