"""Sequence parallelism: each rank holds a stretch of every sequence, and attends with some heads.

Ulysses (arXiv 2309.14509): before the attention, ranks exchange their tokens' heads for all tokens
of their own heads, and back after it; everything else in the decoder works token by token. The
backward pass of an exchange is the opposite exchange, so each rank ends with the gradient of the
ranks' summed losses through its own tokens and heads; the mean over all ranks, as in plain data
parallelism, is the gradient of the mean loss. No factor is left over, under any ZeRO stage.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class HeadExchange:
    """Exchanges within one group of P ranks, which hold T / P consecutive tokens each, in order."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def own(self, num_heads: int) -> slice:
        """The heads that this rank attends with."""
        share = num_heads // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """[T / P, H_i, D_i] each -> [T, H_i / P, D_i], contiguous, in one exchange; of one dtype."""
        P, rows = self.size, tensors[0].shape[0]
        shapes = [(x.shape[1] // P, x.shape[2]) for x in tensors]
        by_rank = torch.cat([x.reshape(rows, P, -1) for x in tensors], -1)  # [T / P, P, n]
        received = self._exchange(by_rank.transpose(0, 1))  # [P, T / P, n], by sender
        parts = received.flatten(0, 1).split([heads * dim for heads, dim in shapes], -1)
        return [part.unflatten(-1, s).contiguous() for part, s in zip(parts, shapes, strict=True)]

    def rows_before(self, x: Tensor, rows: int) -> Tensor:
        """The `rows` rows [rows, ...] that come before this rank's x [T / P, ...], on the rank before
        it; on the first, where nothing comes before, the last rank's.

        Raises ValueError if x is shorter than that.
        """
        if len(x) < rows:
            raise ValueError(
                f"parallel.sequence={self.size} leaves a rank {len(x)} tokens, fewer than the {rows} "
                "before its own that model.kv_conv reads; take longer sequences."
            )
        sent = [torch.zeros_like(x[:rows])] * self.size
        sent[(self.rank + 1) % self.size] = x[-rows:]
        return self._exchange(torch.stack(sent))[self.rank - 1]

    def to_tokens(self, x: Tensor) -> Tensor:
        """[T, H / P, D] -> [T / P, H, D]"""
        received = self._exchange(x.unflatten(0, (self.size, -1)))  # [P, T / P, H / P, D]
        return received.transpose(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """x [P, ...]: row p goes to rank p; row p of the result came from rank p."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)


def check_heads(num_heads: int, num_kv_heads: int, size: int) -> None:
    """Raise ValueError if `size` ranks can't have equal shares of the heads."""
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if heads % size:
            raise ValueError(
                f"parallel.sequence={size} does not divide model.{name}={heads}: sequence "
                "parallelism gives each rank an equal share of the heads."
            )
