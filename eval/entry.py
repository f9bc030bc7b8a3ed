"""What all evaluation scripts begin with, and how Ctrl-C ends them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.config import resolve_path
from model.checkpoint import Checkpoint, load_checkpoint


def open_checkpoint(config: DictConfig) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that config.checkpoint names, on config.device; and the rest of the config.

    Raises ValueError or FileNotFoundError with one sentence.
    """
    rest = OmegaConf.to_container(config, resolve=True)
    path, device = rest.pop("checkpoint"), rest.pop("device")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}; it must be auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU on this machine; take device=cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_checkpoint(resolve_path(path), device), rest


@contextlib.contextmanager
def stoppable(how: str) -> Iterator[None]:
    """Ctrl-C ends the script in one line, "stopped" and how it goes on, with a shell's status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {how}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
