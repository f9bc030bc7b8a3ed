"""DeepSpeed: start-up of the process group, and the engine around the model."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from model.decoder import Decoder
from train.config import RunConfig
from train.optimizer import build_optimizer


def start_process_group(device: torch.device) -> tuple[torch.device, int, int]:
    """This rank's device, its rank and the number of ranks.

    Works under torchrun and deepspeed, and alone: without a launcher the process is a world of one.
    Must run before deepspeed is imported, which picks its accelerator at import.
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
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # after the import, which sets it

    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
    )
    return device, dist.get_rank(), dist.get_world_size()


def deepspeed_config(run: RunConfig, world_size: int) -> dict:
    """The config DeepSpeed reads; what it would default to in surprising ways is always set."""
    accumulation = run.accumulation(world_size)
    config = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_tokens // run.train.seq_len,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": run.sequences_per_step,
        "gradient_clipping": run.train.grad_clip,
        "zero_optimization": {"stage": run.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
    if run.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build_engine(model: Decoder, run: RunConfig, world_size: int):
    """The DeepSpeed engine; the model moves to its device and precision."""
    import deepspeed

    optimizer = build_optimizer(model, run.optimizer, fused=run.device.type == "cuda")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every turn
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(run, world_size)
        )
    return engine


def optimizer_step(engine) -> float | None:
    """engine.step(); after the last pass of a step, the gradient norm before clipping."""
    norm = None
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        # Plain data parallelism in fp32 clips, but does not tell.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
    engine.step()
    norm = engine.get_global_grad_norm() or norm
    return None if norm is None else float(norm)
