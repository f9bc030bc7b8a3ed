"""Key/value caches for generation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.nsa.append import append

T = TypeVar("T")


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
    def lengths(self) -> Tensor | None:
        """Set during a step of one new token for every sequence: see Cache."""
        return self._cache.lengths

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made by the first layer that asks for it in a step."""
        shared = self._cache.shared
        if name not in shared:
            shared[name] = make()
        return shared[name]

    def buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """The buffer [B, rows, *like.shape[1:]] under this name."""
        return self._allocate(self.buffers, name, rows, like)

    def recent_rows(self, name: str, rows: int, like: Tensor) -> Tensor:
        """The same for the last `rows` tokens of a sequence: token t lies in row t % rows."""
        return self._allocate(self.recent, name, rows, like)

    def append(self, cu_seqlens: Tensor, **tokens: Tensor) -> list[Tensor]:
        """Store new rows [T, Hkv, D] of each name, delimited by cu_seqlens [B + 1]; returns the
        buffers [B, max_length, Hkv, D]."""
        buffers = [self.buffer(name, self.max_length, x) for name, x in tokens.items()]
        self.write(buffers, list(tokens.values()), cu_seqlens)
        return buffers

    def write(self, buffers: list[Tensor], tokens: list[Tensor], cu_seqlens: Tensor) -> None:
        """Store new rows [T, ...] in a buffer each: token t in row t % rows, the last ones stay."""
        if self.lengths is not None:
            append(buffers, tokens, self.lengths)
            return
        for b, (low, high) in enumerate(pairwise(cu_seqlens.tolist())):
            end = self.past[b] + high - low
            for buffer, x in zip(buffers, tokens, strict=True):
                rows = buffer.shape[1]
                kept = min(high - low, rows)
                place = torch.arange(end - kept, end, device=x.device) % rows
                buffer[b, place] = x[high - kept : high]

    def _allocate(self, buffers, name, rows, like) -> Tensor:
        if name not in buffers:
            buffers[name] = like.new_zeros(len(self.past), rows, *like.shape[1:])
        return buffers[name]


class Cache:
    """Caches of all layers for a batch of sequences of at most max_length tokens each.

    While every sequence gets exactly one new token, `lengths` int32 [B] counts their tokens with it
    on the model's device, and layers must not look at anything on the host, so that the step can be
    captured in a CUDA graph. Otherwise it is None.
    """

    def __init__(self, batch_size: int, num_layers: int, max_length: int):
        self.past = [0] * batch_size
        self.max_length = max_length
        self.step(None)
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def step(self, lengths: Tensor | None) -> None:
        """What the coming new tokens are: see above."""
        self.lengths = lengths
        self.shared: dict[str, Any] = {}  # see LayerCache.once

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
