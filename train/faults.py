"""What can go wrong in a long run: signals, steps that would hurt, full disks."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
from collections.abc import Iterator

import torch
import torch.distributed as dist

WINDOW = 128  # steps that the recent mean is taken over; half of them must be there


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1, on whichever rank they arrive.

    A signal only leaves a note; the loop asks for it between two forward passes, in training and in
    validation, and all ranks get the same answer. SIGQUIT (Ctrl-\\) still ends a process at once.
    """

    def __init__(self, device: torch.device):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)
        # A group of its own for CPU tensors: asking does not wait for the GPU.
        cpu = device.type == "cpu"
        self.group = None if cpu else dist.new_group(backend="gloo")

    def _note(self, number: int, frame) -> None:
        self.received = number

    def agreed(self) -> int:
        """The signal's number if any rank has received one, else 0. All ranks call it."""
        if dist.get_world_size() == 1:
            return self.received
        number = torch.tensor([self.received])
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return int(number)


def spike(loss: float, grad_norm: float, recent: list[list[float]], sigma: float) -> str | None:
    """Why a step must not be taken, or None.

    A loss or a gradient norm that is not finite, or more than `sigma` standard deviations above the
    mean of the `recent` (loss, norm) pairs; sigma 0 checks for finite numbers only.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    if not sigma or len(recent) < WINDOW // 2:
        return None
    columns = zip(*recent, strict=True)
    for name, value, past in zip(
        ("loss", "gradient norm"), (loss, grad_norm), columns, strict=True
    ):
        limit = statistics.fmean(past) + sigma * statistics.stdev(past)
        if value > limit:
            return f"the {name} {value:.4g} is above {limit:.4g}"
    return None


class SpikeError(RuntimeError):
    """Too many steps in a row were refused; the message says what to do."""


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """A collective that fails since another rank is gone becomes a ConnectionError in one sentence."""
    try:
        yield
    except RuntimeError as error:
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
        if isinstance(error, SpikeError) or not any(words in str(error) for words in lost):
            raise
        raise ConnectionError(
            "Another rank has ended, so this one can't go on; see what it said. Continue from the "
            "last checkpoint with train.resume=true."
        ) from None
