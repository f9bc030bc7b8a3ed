"""Native Sparse Attention (arXiv 2502.11089) as a module: projections, compression phi and gates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.nsa.append import append
from kernels.nsa.compress import gated_pool, gather_blocks, mean_pool
from kernels.nsa.decode import nsa_decode
from kernels.nsa.geometry import Geometry
from kernels.nsa.ops import attention_flops, nsa_attention
from kernels.nsa.reference import nsa_cached
from model.attention.base import Attention
from model.cache import LayerCache
from model.importance import selection_kl

ALL_HEADS = slice(None)


class MeanCompression(nn.Module):
    """phi as the plain mean of a block."""

    def __init__(self, num_kv_heads: int, head_dim: int, geometry: Geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, x: Tensor, cu_seqlens: Tensor, own: slice = ALL_HEADS) -> Tensor:
        """x [T, heads, D] of the layer's key/value heads `own` -> [C, heads, D]"""
        return mean_pool(x, cu_seqlens, self.geometry)

    def blocks(self, x: Tensor) -> Tensor:
        """x [C, l, heads, D] -> [C, heads, D]"""
        return x.mean(1)


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
        return self.blocks(gather_blocks(x, cu_seqlens, self.geometry))

    def blocks(self, x: Tensor) -> Tensor:
        """x [C, l, heads, D] -> [C, heads, D]"""
        x = (x + self.position).transpose(1, 2).flatten(2)
        return self.down_proj(F.gelu(self.up_proj(x)))


COMPRESSIONS = {
    "mean": MeanCompression,
    "gated_mean": GatedMeanCompression,
    "mlp": MLPCompression,
}


class NSAAttention(Attention):
    """Three branches with their own keys and values, joined by sigmoid gates of the input.

    The gates' layer starts at zero, so that training begins with every branch at one half.
    selection_kl > 0 weighs a lesson in what to select, for so many taught_queries of a pass
    (model/importance.py).
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
        selection_kl: float = 0.0,
        taught_queries: int = 256,
        **shared,
    ):
        super().__init__(dim, **shared)
        self.geometry = Geometry(
            compress_block, compress_stride, select_block, num_selected, window, num_initial,
            num_local,
        )  # fmt: skip
        self.training_geometry = self.geometry
        if num_selected < 1:
            raise ValueError(f"attention.num_selected={num_selected}; it must be at least 1.")
        if compression not in COMPRESSIONS:
            raise ValueError(
                f"attention.compression={compression}: choose one of {', '.join(COMPRESSIONS)}."
            )
        if selection_kl < 0:
            raise ValueError(f"attention.selection_kl={selection_kl}; it must be at least 0.")
        if taught_queries < 1:
            raise ValueError(f"attention.taught_queries={taught_queries}; it must be at least 1.")
        self.selection_kl, self.taught_queries = selection_kl, taught_queries
        phi = COMPRESSIONS[compression]
        self.compressed, self.selected, self.local = (self.key_value(dim) for _ in range(3))
        self.compress_k = phi(self.num_kv_heads, self.head_dim, self.geometry)
        self.compress_v = phi(self.num_kv_heads, self.head_dim, self.geometry)
        self.branch_gates = nn.Linear(dim, 3 * self.num_heads)

    def select_all(self, on: bool) -> None:
        chosen = 0 if on else self.geometry.num_selected
        self.training_geometry = replace(self.geometry, num_selected=chosen)

    @property
    def active_geometry(self) -> Geometry:
        """That of a pass over whole documents, which a dense warm-up changes in training."""
        return self.training_geometry if self.training else self.geometry

    def attend(self, q, keys_values, branch_gates, cu_seqlens, max_seqlen, cache):
        gates = torch.sigmoid(branch_gates).unflatten(-1, (self.num_heads, 3))
        (k_raw, v_raw), (k_sel, v_sel), (k_win, v_win) = keys_values
        if cache is not None:
            raw = dict(k_cmp=k_raw, v_cmp=v_raw)
            tokens = dict(k_sel=k_sel, v_sel=v_sel, k_win=k_win, v_win=v_win)
            if cache.lengths is not None:
                caches = self._append_step(cache, raw, tokens)
                return nsa_decode(q, *caches, gates, cache.lengths, self.geometry, self.scale)
            caches = self._append_blocks(cache, raw, cu_seqlens) + cache.append(
                cu_seqlens, **tokens
            )
            if any(cache.past):
                return nsa_cached(
                    q, *caches, gates, cu_seqlens, cache.past, self.geometry, self.scale
                )
        # Whole documents, in training or as prompts.
        q, gates, k_raw, v_raw, k_sel, v_sel, k_win, v_win = self.to_heads(
            q, gates, k_raw, v_raw, k_sel, v_sel, k_win, v_win
        )
        own = ALL_HEADS if self.exchange is None else self.exchange.own(self.num_kv_heads)
        k_cmp = self.compress_k(k_raw, cu_seqlens, own)
        v_cmp = self.compress_v(v_raw, cu_seqlens, own)
        out, _ = nsa_attention(
            q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, max_seqlen,
            self.active_geometry, self.scale,
        )  # fmt: skip
        out = self.to_tokens(out)
        if not (self.training and self.selection_kl):
            return out
        lesson = selection_kl(
            q, k_cmp, k_sel, cu_seqlens, self.geometry, self.scale, self.taught_queries
        )
        return out, self.selection_kl * lesson

    def _block_caches(self, cache: LayerCache, raw: dict[str, Tensor]) -> tuple[list[Tensor], ...]:
        """Of keys and values: compressed rows [B, capacity, Hkv, D], and the last l tokens, of which
        an unfinished block is made."""
        rows = self.geometry.capacity(cache.max_length)
        return (
            [cache.buffer(name, rows, x) for name, x in raw.items()],
            [cache.recent_rows(name, self.geometry.compress_block, x) for name, x in raw.items()],
        )

    def _append_blocks(self, cache, raw, cu_seqlens) -> list[Tensor]:
        """Compress the blocks that the new tokens complete, and only those; the compressed rows."""
        geometry, length = self.geometry, self.geometry.compress_block
        compressed, rings = self._block_caches(cache, raw)
        for b, (low, high) in enumerate(pairwise(cu_seqlens.tolist())):
            first, past = geometry.num_compressed(cache.past[b]), cache.past[b]
            begin = first * geometry.compress_stride
            old = torch.arange(begin, past, device=cu_seqlens.device) % length
            count = past - begin + high - low
            done = geometry.num_compressed(count)
            alone = torch.tensor([0, count], dtype=torch.int32, device=cu_seqlens.device)
            phis = self.compress_k, self.compress_v
            for phi, x, rows, ring in zip(phis, raw.values(), compressed, rings, strict=True):
                if done:
                    new = torch.cat([ring[b, old], x[low:high]])
                    rows[b, first : first + done] = phi(new, alone)[:done]
        cache.write(rings, list(raw.values()), cu_seqlens)
        return compressed

    def _append_step(self, cache, raw, tokens) -> list[Tensor]:
        """One new token of every sequence into all caches, without a look at the host."""
        compressed, rings = self._block_caches(cache, raw)
        buffers = [cache.buffer(name, cache.max_length, x) for name, x in tokens.items()]
        new = [rings + buffers, [*raw.values(), *tokens.values()], cache.lengths]
        phis = self.compress_k, self.compress_v
        if isinstance(self.compress_k, GatedMeanCompression):
            scores, positions = [phi.score for phi in phis], [phi.position for phi in phis]
            append(*new, compressed, scores, positions, self.geometry.compress_stride)
        else:
            append(*new)
            last, rows = cache.once("blocks", lambda: self._last_blocks(cache.lengths))
            blocks = [
                phi.blocks(ring.flatten(0, 1)[last]) for phi, ring in zip(phis, rings, strict=True)
            ]
            append(compressed, blocks, rows)
        return compressed + buffers

    def _last_blocks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Where the sequences' last l tokens lie in flat rings, oldest first, int64 [B, l]; and how
        many blocks there are with the one that they are, int32 [B], 0 where they are none."""
        length, stride = self.geometry.compress_block, self.geometry.compress_stride
        first = torch.arange(len(lengths), device=lengths.device)[:, None] * length
        place = (lengths[:, None] + torch.arange(length, device=lengths.device)) % length
        complete = (lengths >= length) & ((lengths - length) % stride == 0)
        return first + place, self.geometry.num_compressed(lengths) * complete

    def flops(self, tokens: int) -> int:
        return sum(
            attention_flops(
                tokens, self.num_heads, 2 * self.head_dim, self.active_geometry
            ).values()
        )
