"""Runs as a user starts them, on any number of ranks, without paying for the imports each time.

A fork server imports torch and DeepSpeed once; every rank of every run is a fork of it.
"""

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.config import command_line

ROOT = Path(__file__).resolve().parents[2]
# The quickstart, shrunk: the same parts but for the optimizer, which ZeRO can divide; a few seconds.
SMALL = [
    "+experiment=quickstart", "tokenizer.vocab_size=512", "model.dim=32", "model.num_layers=2",
    "model.num_heads=4", "model.head_dim=16", "model.ffn_dim=64", "train.seq_len=256",
    "train.batch_tokens=1024", "train.micro_batch_tokens=256", "train.max_tokens=6144",
    "train.validation_tokens=1024", "train.validate_every=3", "log.wandb=disabled", "device=cpu",
    "data.path=data/austen/northanger_abbey.txt", "data.validation.path=null",
    "data.validation.fraction=0.02", "optimizer=adamw", "optimizer.lr=3e-3", "parallel=zero1",
]  # fmt: skip

os.environ["DS_ACCELERATOR"] = "cpu"
forks = mp.get_context("forkserver")
forks.set_forkserver_preload(
    ["train.pretrain", "deepspeed.runtime.zero.muon.original_muon", "torch._inductor.compile_fx"]
)


def config(*overrides) -> dict:
    """The resolved config of the command line `train/pretrain.py <SMALL> <overrides>`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(
            compose("config", command_line([*SMALL, *overrides])), resolve=True
        )


def _rank(target, argument, environment: dict, output: str) -> None:
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        code = target(argument)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run:
    """A target(argument) on `world_size` ranks; its output is one file."""

    def __init__(self, target, argument, output: Path, world_size: int = 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.output = output
        common = dict(WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        self.ranks = []
        for rank in range(world_size):
            environment = {k: str(v) for k, v in (common | dict(RANK=rank, LOCAL_RANK=0)).items()}
            process = forks.Process(target=_rank, args=(target, argument, environment, str(output)))
            process.start()
            self.ranks.append(process)

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until the output holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < deadline and self.ranks[0].is_alive(), self.text()
            time.sleep(0.02)

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes of the ranks, negative for a signal."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0))
        if any(process.is_alive() for process in self.ranks):
            self.kill()
            raise TimeoutError(self.text())
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def _pretrain(raw: dict) -> int:
    from train.pretrain import pretrain

    return pretrain(raw)


def start(folder: Path, *overrides, world_size: int = 1) -> Run:
    """A run of the small quickstart into `folder`, begun."""
    raw = config(f"output_dir={folder}", *overrides)
    output = folder / f"{raw['name']}.log"
    output.unlink(missing_ok=True)
    return Run(_pretrain, raw, output, world_size)


def pretrain(folder: Path, *overrides, world_size: int = 1) -> str:
    """The same to its end; returns what it printed."""
    run = start(folder, *overrides, world_size=world_size)
    assert run.wait() == [0] * world_size, run.text()
    return run.text()
