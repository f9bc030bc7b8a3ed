"""The pooling under phi: blocks of tokens to one compressed key or value (arXiv 2502.11089, Eq. 7)."""

from __future__ import annotations

import torch

from kernels.nsa.geometry import Geometry


def gather_blocks(x: torch.Tensor, cu_seqlens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Tokens of every compressed block: x [T, ...] -> [C, l, ...], zero in rows that are not used.

    Blocks never cross a document. C = geometry.capacity(T).
    """
    tokens, used = geometry.block_tokens(cu_seqlens, x.shape[0])
    blocks = x[tokens]
    return blocks * used.view(-1, *[1] * x.dim()).to(x.dtype)


def mean_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """x [T, Hkv, D] -> [C, Hkv, D], the plain mean of each block."""
    return gather_blocks(x, cu_seqlens, geometry).mean(1)


def gated_pool(
    x: torch.Tensor,
    score: torch.Tensor,
    position: torch.Tensor,
    cu_seqlens: torch.Tensor,
    geometry: Geometry,
) -> torch.Tensor:
    """x [T, Hkv, D] -> [C, Hkv, D], a softmax-weighted mean of each block.

    The weight of a token is the softmax over the block of score [T, Hkv] plus position [l, Hkv].
    A plain mean washes a rare token out; this can keep it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = gather_blocks(score, cu_seqlens, geometry).to(wide) + position.to(wide)
    weight = logits.softmax(1).to(x.dtype)
    return (gather_blocks(x, cu_seqlens, geometry) * weight[..., None]).sum(1)
