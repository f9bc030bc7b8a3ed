"""Key/value caches for generation."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


class LayerCache:
    """Named buffers [B, rows, ...] of one layer, allocated at first use."""

    def __init__(self, cache: Cache):
        self._cache = cache
        self.buffers: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}

    @property
    def past(self) -> list[int]:
        """Each sequence's tokens before the current call."""
        return self._cache.past

    @property
    def max_length(self) -> int:
        return self._cache.max_length

    @property
    def positions(self) -> Tensor | None:
        """Set during a step of one new token for every sequence: see Cache."""
        return self._cache.positions

    def buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """The buffer [B, rows, *like.shape[1:]] under this name."""
        return self._allocate(self.buffers, name, rows, like)

    def append(self, name: str, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Store the new rows x [T, ...], delimited by cu_seqlens [B + 1]; returns the buffer."""
        buffer = self.buffer(name, self.max_length, x)
        self._write(buffer, x, cu_seqlens)
        return buffer

    def recent_rows(self, name: str, rows: int, like: Tensor) -> Tensor:
        """The buffer that append_recent writes, before the current call's tokens are in it."""
        return self._allocate(self.recent, name, rows, like)

    def append_recent(self, name: str, rows: int, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """As append, but only the last `rows` tokens are kept: token t lies in row t % rows."""
        buffer = self.recent_rows(name, rows, x)
        self._write(buffer, x, cu_seqlens)
        return buffer

    def _allocate(self, buffers, name, rows, like) -> Tensor:
        if name not in buffers:
            buffers[name] = like.new_zeros(len(self.past), rows, *like.shape[1:])
        return buffers[name]

    def _write(self, buffer: Tensor, x: Tensor, cu_seqlens: Tensor) -> None:
        rows = buffer.shape[1]
        if self.positions is not None:
            buffer[torch.arange(len(x), device=x.device), self.positions % rows] = x
            return
        for b, (low, high) in enumerate(pairwise(cu_seqlens.tolist())):
            kept = min(high - low, rows)
            end = self.past[b] + high - low
            buffer[b, torch.arange(end - kept, end, device=x.device) % rows] = x[high - kept : high]


class Cache:
    """Caches of all layers for a batch of sequences of at most max_length tokens each.

    While every sequence gets exactly one new token, `positions` int64 [B] holds their places on the
    model's device, and layers must not look at anything on the host, so that the step can be
    captured in a CUDA graph. Otherwise it is None.
    """

    def __init__(self, batch_size: int, num_layers: int, max_length: int):
        self.past = [0] * batch_size
        self.max_length = max_length
        self.positions: Tensor | None = None
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def check(self, new: list[int]) -> None:
        """Raise ValueError if that many new tokens of each sequence do not fit."""
        longest = max(p + n for p, n in zip(self.past, new, strict=True))
        if longest > self.max_length:
            raise ValueError(f"The cache holds {self.max_length} tokens; {longest} are needed.")

    def advance(self, new: list[int]) -> None:
        """Count the tokens that all layers have stored."""
        self.past[:] = [p + n for p, n in zip(self.past, new, strict=True)]

    def reset(self) -> None:
        """Forget all sequences; the buffers stay, and with them a CUDA graph that uses them."""
        self.past[:] = [0] * len(self.past)

    def mark(self) -> list:
        """Where the sequences stand, for rewind."""
        recent = [{k: v.clone() for k, v in layer.recent.items()} for layer in self.layers]
        return [list(self.past), recent]

    def rewind(self, mark: list) -> None:
        """Forget all tokens since mark(): rows beyond `past` are never read."""
        self.past[:], recent = mark
        for layer, saved in zip(self.layers, recent, strict=True):
            for name, rows in saved.items():
                layer.recent[name].copy_(rows)
