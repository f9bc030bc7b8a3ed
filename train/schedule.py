"""Learning rate as a function of tokens seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one of: wsd (constant, linear decay at the end), cosine, linear.

    Fractions are shares of the run's tokens; final_fraction is of the peak learning rate.
    """

    kind: Literal["wsd", "cosine", "linear"]
    warmup_fraction: float
    final_fraction: float
    decay_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name}={getattr(self, name)}; it is a share, 0 to 1.")

    def scale(self, progress: float) -> float:
        """Share of the peak learning rate when `progress` (0 to 1) of the run's tokens are seen."""
        if progress < self.warmup_fraction:
            return progress / self.warmup_fraction
        start = self.warmup_fraction
        if self.kind == "wsd":
            start = max(start, 1 - self.decay_fraction)
        if progress <= start or start == 1:
            return 1.0
        remaining = 1 - min((progress - start) / (1 - start), 1.0)
        if self.kind == "cosine":
            remaining = (1 - math.cos(math.pi * remaining)) / 2
        return self.final_fraction + (1 - self.final_fraction) * remaining
