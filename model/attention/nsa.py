"""Native Sparse Attention (arXiv 2502.11089) as a module: projections, compression phi and gates."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.nsa.compress import gated_pool, gather_blocks, mean_pool
from kernels.nsa.decode import nsa_decode
from kernels.nsa.geometry import Geometry
from kernels.nsa.ops import attention_flops, nsa_attention
from kernels.nsa.reference import nsa_cached
from model.attention.base import Attention

ALL_HEADS = slice(None)


class MeanCompression(nn.Module):
    """phi as the plain mean of a block."""

    def __init__(self, num_kv_heads: int, head_dim: int, geometry: Geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, x: Tensor, cu_seqlens: Tensor, own: slice = ALL_HEADS) -> Tensor:
        """x [T, heads, D] of the layer's key/value heads `own` -> [C, heads, D]"""
        return mean_pool(x, cu_seqlens, self.geometry)


class GatedMeanCompression(nn.Module):
    """phi as a softmax-weighted mean: each token's learned score plus a bias by place in the block.

    Starts as the plain mean.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, geometry: Geometry):
        super().__init__()
        self.geometry = geometry
        self.score = nn.Parameter(torch.zeros(num_kv_heads, head_dim))
        self.position = nn.Parameter(torch.zeros(geometry.compress_block, num_kv_heads))

    def forward(self, x: Tensor, cu_seqlens: Tensor, own: slice = ALL_HEADS) -> Tensor:
        """x [T, heads, D] of the layer's key/value heads `own` -> [C, heads, D]"""
        score = (x * self.score[own]).sum(-1)
        return gated_pool(x, score, self.position[:, own], cu_seqlens, self.geometry)


class MLPCompression(nn.Module):
    """phi as the paper has it: an MLP over the block's tokens with a position encoding inside."""

    def __init__(self, num_kv_heads: int, head_dim: int, geometry: Geometry):
        super().__init__()
        self.geometry = geometry
        self.position = nn.Parameter(torch.zeros(geometry.compress_block, 1, head_dim))
        self.up_proj = nn.Linear(geometry.compress_block * head_dim, 4 * head_dim, bias=False)
        self.down_proj = nn.Linear(4 * head_dim, head_dim, bias=False)
        for layer in (self.up_proj, self.down_proj):  # applied to blocks, not to tokens
            layer.rows_per_token = num_kv_heads / geometry.compress_stride

    def forward(self, x: Tensor, cu_seqlens: Tensor, own: slice = ALL_HEADS) -> Tensor:
        """x [T, heads, D] of the layer's key/value heads `own` -> [C, heads, D]"""
        blocks = gather_blocks(x, cu_seqlens, self.geometry) + self.position  # [C, l, Hkv, D]
        return self.down_proj(F.gelu(self.up_proj(blocks.transpose(1, 2).flatten(2))))


COMPRESSIONS = {
    "mean": MeanCompression,
    "gated_mean": GatedMeanCompression,
    "mlp": MLPCompression,
}


class NSAAttention(Attention):
    """Three branches with their own keys and values, joined by sigmoid gates of the input.

    The gates' layer starts at zero, so that training begins with every branch at one half.
    """

    def __init__(
        self,
        dim: int,
        compress_block: int = 32,
        compress_stride: int = 16,
        select_block: int = 64,
        num_selected: int = 16,
        window: int = 512,
        num_initial: int = 1,
        num_local: int = 2,
        compression: str = "gated_mean",
        **shared,
    ):
        super().__init__(dim, **shared)
        self.geometry = Geometry(
            compress_block, compress_stride, select_block, num_selected, window, num_initial,
            num_local,
        )  # fmt: skip
        if compression not in COMPRESSIONS:
            raise ValueError(
                f"attention.compression={compression}: choose one of {', '.join(COMPRESSIONS)}."
            )
        phi = COMPRESSIONS[compression]
        self.compressed, self.selected, self.local = (self.key_value(dim) for _ in range(3))
        self.compress_k = phi(self.num_kv_heads, self.head_dim, self.geometry)
        self.compress_v = phi(self.num_kv_heads, self.head_dim, self.geometry)
        self.branch_gates = nn.Linear(dim, 3 * self.num_heads)

    def attend(self, q, keys_values, branch_gates, cu_seqlens, max_seqlen, cache):
        gates = torch.sigmoid(branch_gates).unflatten(-1, (self.num_heads, 3))
        (k_raw, v_raw), (k_sel, v_sel), (k_win, v_win) = keys_values
        if cache is not None:
            compressed = [
                self._append_blocks(cache, "k_cmp", k_raw, cu_seqlens, self.compress_k),
                self._append_blocks(cache, "v_cmp", v_raw, cu_seqlens, self.compress_v),
            ]
            tokens = dict(k_sel=k_sel, v_sel=v_sel, k_win=k_win, v_win=v_win)
            caches = [cache.append(name, t, cu_seqlens) for name, t in tokens.items()]
            if cache.positions is not None:
                lengths = (cache.positions + 1).int()
                return nsa_decode(
                    q, *compressed, *caches, gates, lengths, self.geometry, self.scale
                )
            if any(cache.past):
                return nsa_cached(
                    q, *compressed, *caches, gates, cu_seqlens, cache.past, self.geometry,
                    self.scale,
                )  # fmt: skip
        # Whole documents, in training or as prompts.
        q, gates, k_raw, v_raw, k_sel, v_sel, k_win, v_win = self.to_heads(
            q, gates, k_raw, v_raw, k_sel, v_sel, k_win, v_win
        )
        own = ALL_HEADS if self.exchange is None else self.exchange.own(self.num_kv_heads)
        k_cmp = self.compress_k(k_raw, cu_seqlens, own)
        v_cmp = self.compress_v(v_raw, cu_seqlens, own)
        out, _ = nsa_attention(
            q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, max_seqlen,
            self.geometry, self.scale,
        )  # fmt: skip
        return self.to_tokens(out)

    def _append_blocks(self, cache, name, x, cu_seqlens, phi) -> Tensor:
        """Compress the blocks that the new tokens complete, and only those.

        The last l tokens stay in the cache: an unfinished block needs no more of the past.
        Returns the cache of compressed rows [B, capacity, Hkv, D].
        """
        geometry, length = self.geometry, self.geometry.compress_block
        buffer = cache.buffer(name, geometry.capacity(cache.max_length), x)
        if cache.positions is not None:
            recent = cache.append_recent(name, length, x, cu_seqlens)
            return self._append_last_block(buffer, recent, cache.positions + 1, phi)
        for b, (low, high) in enumerate(pairwise(cu_seqlens.tolist())):
            first, new = geometry.num_compressed(cache.past[b]), x[low:high]
            if cache.past[b]:
                begin = first * geometry.compress_stride
                rows = torch.arange(begin, cache.past[b], device=x.device) % length
                new = torch.cat([cache.recent[name][b, rows], new])
            done = geometry.num_compressed(len(new))
            if done:
                alone = torch.tensor([0, len(new)], dtype=torch.int32, device=x.device)
                buffer[b, first : first + done] = phi(new, alone)[:done]
        cache.append_recent(name, length, x, cu_seqlens)
        return buffer

    def _append_last_block(self, buffer, recent, lengths, phi) -> Tensor:
        """One new token each, without a look at the host: the last l tokens are always compressed,
        but stored only where they are a block.
        """
        geometry, (batch, length) = self.geometry, recent.shape[:2]
        sequence = torch.arange(batch, device=recent.device)
        oldest_first = (lengths[:, None] + torch.arange(length, device=recent.device)) % length
        tokens = recent[sequence[:, None], oldest_first].flatten(0, 1)
        borders = torch.arange(batch + 1, dtype=torch.int32, device=recent.device) * length
        block = phi(tokens, borders)[:batch]
        complete = (lengths >= length) & ((lengths - length) % geometry.compress_stride == 0)
        row = (geometry.num_compressed(lengths) - 1).clamp(min=0)
        block = torch.where(complete[:, None, None], block, buffer[sequence, row])
        buffer[sequence, row] = block.to(buffer.dtype)
        return buffer

    def flops(self, tokens: int) -> int:
        return sum(
            attention_flops(tokens, self.num_heads, 2 * self.head_dim, self.geometry).values()
        )
