"""Sliding-window attention: the last `window` tokens."""

from __future__ import annotations

from kernels.dense import sliding_attention, sliding_cached
from kernels.nsa.decode import window_decode
from kernels.nsa.geometry import causal_pairs
from model.attention.base import Attention


class SlidingAttention(Attention):
    def __init__(self, dim: int, window: int = 512, **shared):
        super().__init__(dim, **shared)
        if window < 1:
            raise ValueError(f"attention.window={window}; it must be at least 1 token.")
        self.window = window
        self.kv = self.key_value(dim)

    def attend(self, q, keys_values, branch_gates, cu_seqlens, max_seqlen, cache):
        ((k, v),) = keys_values
        if cache is not None:
            ks, vs = cache.append(cu_seqlens, k=k, v=v)
            if cache.lengths is not None:
                return window_decode(q, ks, vs, cache.lengths, self.window, self.scale)
            if any(cache.past):
                return sliding_cached(q, ks, vs, cu_seqlens, cache.past, self.window, self.scale)
        q, k, v = self.to_heads(q, k, v)
        return self.to_tokens(
            sliding_attention(q, k, v, cu_seqlens, max_seqlen, self.window, self.scale)
        )

    def flops(self, tokens: int) -> int:
        return 4 * self.num_heads * self.head_dim * causal_pairs(tokens, self.window)
