"""DeepSpeed: start-up of the process group, and the engine around the model."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from data.batch import Batch
from model.decoder import Block, Decoder
from model.loss import Loss
from train.config import LengthStage, RunConfig
from train.cuda_graphs import CapturedPasses
from train.optimizer import build_optimizer


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Groups of `sequence` neighbouring ranks share sequences; what
    is said of data ranks counts a group as one."""

    device: torch.device
    rank: int
    world_size: int
    sequence: int = 1

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.sequence

    def share(self, batch: Batch) -> Batch:
        """This rank's stretch of the tokens; document borders stay those of the whole."""
        length = len(batch.tokens) // self.sequence
        own = slice(self.rank % self.sequence * length, (self.rank % self.sequence + 1) * length)
        names = ("tokens", "targets", "answers", "positions")
        return batch._replace(**{name: getattr(batch, name)[own] for name in names})

    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's sequences; None if it has them alone. All ranks call it."""
        if self.sequence == 1:
            return None
        group, _ = dist.new_subgroups(self.sequence)
        return group


def start_process_group(device: torch.device, sequence: int = 1) -> Ranks:
    """Join the other ranks. Raises ValueError if they do not divide into groups of `sequence`.

    Works under torchrun, deepspeed and srun, and alone: without a launcher the process is a world of
    one. Must run before deepspeed is imported, which picks its accelerator at import.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing here is compiled with nvcc
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({key: str(value) for key, value in alone.items()})
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    warnings.filterwarnings("ignore", message=r"barrier\(\)")  # the device is set above
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Compiled at first use, for inference only: training needs neither it nor a C++ compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # after the import, which sets it

    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
    )
    if dist.get_world_size() % sequence:
        raise ValueError(
            f"parallel.sequence={sequence} does not divide the {dist.get_world_size()} ranks."
        )
    return Ranks(device, dist.get_rank(), dist.get_world_size(), sequence)


def deepspeed_config(run: RunConfig, world_size: int) -> dict:
    """The config DeepSpeed reads; what it would default to in surprising ways is always set.

    All ranks are one data-parallel group to DeepSpeed, those of a sequence-parallel group too: each
    holds as many tokens, and the mean of their gradients is the gradient of the mean loss. Its
    batch sizes are only used for their ratio, the number of passes per step.
    """
    accumulation = run.accumulation(world_size)
    stage, offload = run.parallel.zero_stage, run.parallel.offload
    zero: dict = {"stage": stage}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": run.device.type == "cuda"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": run.device.type == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world_size,
        # Engine.step clips whole parameters itself: it has their norm already.
        "gradient_clipping": run.train.grad_clip if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
    if run.dtype == torch.bfloat16 and stage > 0:  # ZeRO-0's fp32 copies are our optimizer's
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class Engine:
    """DeepSpeed's engine around the model, with a step that can be refused."""

    def __init__(self, model: Decoder, run: RunConfig, ranks: Ranks):
        import deepspeed

        stage, device = run.parallel.zero_stage, ranks.device
        model.recompute(run.train.activation_checkpointing)
        self.sequence_group = ranks.sequence_group()
        if self.sequence_group:
            model.share_sequences(self.sequence_group)
        self.captured = None
        if run.train.cuda_graphs and device.type == "cuda":
            self.captured = model.forward = CapturedPasses(model)
        if stage == 0:
            model = model.to(device, run.dtype)
        if stage == 3:  # gathered a block at a time: layer by layer, the GPUs would wait for hosts
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        self.optimizer = build_optimizer(model, run.optimizer, stage, device.type == "cuda")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every turn
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(run, ranks.world_size),
            )
        self.stage, self.grad_clip = stage, run.train.grad_clip
        self.dense_until = run.train.dense_until
        self.module: Decoder = self.deepspeed.module
        self.parameters = list(self.module.parameters())
        if run.train.compile:
            for block in self.module.blocks:
                block.compile(fullgraph=True)

    def begin_stage(self, stage: LengthStage) -> None:
        """Train as this stage does from here on."""
        self.module.rotary.set_base(stage.rope_base)
        self.module.select_all(stage.seq_len <= self.dense_until)
        self.module.answer_share = stage.answer_share
        if self.captured:
            self.captured.begin_stage(stage.seq_len)

    def __call__(self, batch: Batch) -> Loss:
        """The loss of a batch; training or evaluation, as last said by train()."""
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)  # the number of documents varies
        inputs = batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen
        return self.deepspeed(*inputs, targets=batch.targets, answers=batch.answers)

    def train(self, on: bool = True) -> None:
        self.deepspeed.train(on)

    def backward(self, loss: Loss) -> None:
        self.deepspeed.backward(loss.objective)

    def set_lr(self, lr: float) -> None:
        """lr of the matrices; other kinds follow in their proportion."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def step(
        self, reason: Callable[[float], str | None] | None = None, measure: bool = False
    ) -> Step | None:
        """After each backward pass. The last one of a step updates the parameters and is reported.

        reason(gradient norm before clipping) names what speaks against the update; then nothing is
        changed, on any rank, since all know the same norm. measure adds the update's norm.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            return self.deepspeed.step()
        known: list[tuple[float, str | None]] = []  # DeepSpeed steps part by part; asked once
        measured = self._clip() if self.stage == 0 else None

        def refused() -> bool:
            if not known:
                norm = measured if self.stage == 0 else self.deepspeed.optimizer._global_grad_norm
                norm = float(norm)
                norm = norm if norm >= 0 and math.isfinite(norm) else math.inf
                known.append((norm, reason(norm) if reason else None))
            return known[0][1] is not None

        self.optimizer.veto, self.optimizer.measuring, self.optimizer.moved = refused, measure, 0.0
        self.deepspeed.step()
        refused()  # it may have seen a norm that is not finite, and not asked
        norm, why = known[0]
        moved = None
        if measure and why is None:
            moved = torch.as_tensor(self.optimizer.moved, device=self.deepspeed.device)
            if self.stage > 0:  # each rank moved its part
                dist.all_reduce(moved)
            moved = math.sqrt(float(moved))
        return Step(norm, why, moved)

    def _clip(self) -> torch.Tensor:
        """Clip whole gradients; their norm over all parameters before. Only queued on a GPU: it knows
        what to do next when the host learns the norm."""
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        return norm

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's parameters by name, whole on rank 0. All ranks call it."""
        if self.stage == 3:
            return self.deepspeed._zero3_consolidated_16bit_state_dict()
        return self.module.state_dict()


class Step(NamedTuple):
    """An update, or why there was none; norms over all parameters."""

    grad_norm: float
    refused: str | None
    update_norm: float | None
