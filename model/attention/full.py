"""Full causal attention: the control that every other design is compared with."""

from __future__ import annotations

from kernels.dense import full_attention, full_cached
from kernels.nsa.decode import window_decode
from model.attention.base import Attention


class FullAttention(Attention):
    def __init__(self, dim: int, **shared):
        super().__init__(dim, **shared)
        self.kv = self.key_value(dim)

    def attend(self, q, keys_values, branch_gates, cu_seqlens, max_seqlen, cache):
        ((k, v),) = keys_values
        if cache is not None:
            ks, vs = cache.append(cu_seqlens, k=k, v=v)
            if cache.lengths is not None:
                return window_decode(q, ks, vs, cache.lengths, cache.max_length, self.scale)
            if any(cache.past):
                return full_cached(q, ks, vs, cu_seqlens, cache.past, self.scale)
        q, k, v = self.to_heads(q, k, v)
        return self.to_tokens(full_attention(q, k, v, cu_seqlens, max_seqlen, self.scale))

    def flops(self, tokens: int) -> int:
        return 4 * self.num_heads * self.head_dim * tokens * (tokens + 1) // 2
