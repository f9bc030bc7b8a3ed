"""Key/value caches for generation."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


class LayerCache:
    """Named buffers [B, rows, ...] of one layer, allocated at first use.

    `past` counts each sequence's tokens before the current call. `pending` is free for what a layer
    must remember about unfinished blocks; its tensors are replaced, never changed in place.
    """

    def __init__(self, past: list[int], max_length: int):
        self.past, self.max_length = past, max_length
        self.buffers: dict[str, Tensor] = {}
        self.pending: dict[tuple[str, int], Tensor] = {}

    def buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """The buffer [B, rows, *like.shape[1:]] under this name."""
        if name not in self.buffers:
            self.buffers[name] = like.new_zeros(len(self.past), rows, *like.shape[1:])
        return self.buffers[name]

    def append(self, name: str, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Store the new rows x [T, ...], delimited by cu_seqlens [B + 1]; returns the buffer."""
        buffer = self.buffer(name, self.max_length, x)
        for b, (low, high) in enumerate(pairwise(cu_seqlens.tolist())):
            buffer[b, self.past[b] : self.past[b] + high - low] = x[low:high]
        return buffer


class Cache:
    """Caches of all layers for a batch of sequences of at most max_length tokens each."""

    def __init__(self, batch_size: int, num_layers: int, max_length: int):
        self.past = [0] * batch_size  # shared with the layers
        self.max_length = max_length
        self.layers = [LayerCache(self.past, max_length) for _ in range(num_layers)]

    def check(self, cu_seqlens: Tensor) -> None:
        """Raise ValueError if the new tokens do not fit."""
        new = cu_seqlens.diff().tolist()
        longest = max(p + n for p, n in zip(self.past, new, strict=True))
        if longest > self.max_length:
            raise ValueError(f"The cache holds {self.max_length} tokens; {longest} are needed.")

    def advance(self, cu_seqlens: Tensor) -> None:
        """Count the tokens that all layers have stored."""
        for b, new in enumerate(cu_seqlens.diff().tolist()):
            self.past[b] += new

    def mark(self) -> list:
        """Where the sequences stand, for rewind."""
        return [list(self.past), [dict(layer.pending) for layer in self.layers]]

    def rewind(self, mark: list) -> None:
        """Forget all tokens since mark(): rows beyond `past` are never read."""
        past, pending = mark
        self.past[:] = past
        for layer, unfinished in zip(self.layers, pending, strict=True):
            layer.pending = dict(unfinished)
