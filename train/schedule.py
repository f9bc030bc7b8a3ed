"""Learning rate as a function of tokens seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one of: wsd (constant, linear decay at the end), cosine, linear.

    warmup and decay are numbers of tokens, or shares of the run's tokens if they are at most 1;
    final_fraction is of the peak learning rate.
    """

    kind: Literal["wsd", "cosine", "linear"]
    warmup: float
    final_fraction: float
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"schedule.final_fraction={self.final_fraction}; it is a share, 0 to 1."
            )
        for name in ("warmup", "decay"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"schedule.{name}={getattr(self, name)}; it is a share of the run (0 to 1) or "
                    "a number of tokens."
                )

    def scale(self, tokens: float, total: float) -> float:
        """Share of the peak learning rate after `tokens` of a run of `total` tokens."""
        warmup, decay = (x * total if x <= 1 else x for x in (self.warmup, self.decay))
        if tokens < warmup:
            return tokens / warmup
        start = max(warmup, total - decay) if self.kind == "wsd" else warmup
        if tokens <= start or start >= total:
            return 1.0
        remaining = 1 - min((tokens - start) / (total - start), 1.0)
        if self.kind == "cosine":
            remaining = (1 - math.cos(math.pi * remaining)) / 2
        return self.final_fraction + (1 - self.final_fraction) * remaining
