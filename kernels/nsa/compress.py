"""The pooling under phi: blocks of tokens to one compressed key or value (arXiv 2502.11089, Eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    score = x.new_zeros(x.shape[:2])
    position = x.new_zeros(geometry.compress_block, x.shape[1])
    return gated_pool(x, score, position, cu_seqlens, geometry)


def gated_pool(
    x: torch.Tensor,
    score: torch.Tensor,
    position: torch.Tensor,
    cu_seqlens: torch.Tensor,
    geometry: Geometry,
) -> torch.Tensor:
    """x [T, Hkv, D] -> [C, Hkv, D], a softmax-weighted mean of each block, zero in unused rows.

    The weight of a token is the softmax over the block of score [T, Hkv] plus position [l, Hkv].
    A plain mean washes a rare token out; this can keep it.
    """
    inputs = (t.contiguous() for t in (x, score, position))
    return _pool(*inputs, cu_seqlens, geometry.numbers())[0]


def _twin_forward(x, score, position, cu_seqlens, geometry: Geometry):
    """y [C, Hkv, D] and lse [C, Hkv] in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, used = geometry.block_tokens(cu_seqlens, x.shape[0])
    logits = score[tokens].to(wide) + position.to(wide)
    y = (x[tokens].to(wide) * logits.softmax(1)[..., None]).sum(1)
    return (y * used[:, None, None]).to(x.dtype), logits.logsumexp(1)


def _twin_backward(dy, x, score, position, y, lse, cu_seqlens, geometry: Geometry):
    """dx, dscore, dposition in plain torch; see pool.py."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, used = geometry.block_tokens(cu_seqlens, x.shape[0])
    dy = (dy * used[:, None, None]).to(wide)
    weight = (score[tokens].to(wide) + position.to(wide) - lse[:, None]).exp()
    delta = (dy * y).sum(-1)
    dlogits = weight * (torch.einsum("chd,clhd->clh", dy, x[tokens].to(wide)) - delta[:, None])
    dx = torch.zeros_like(x, dtype=wide)
    dx.index_put_((tokens,), weight[..., None] * dy[:, None], accumulate=True)
    dscore = torch.zeros_like(score, dtype=wide)
    dscore.index_put_((tokens,), dlogits, accumulate=True)
    return dx.to(x.dtype), dscore.to(score.dtype), dlogits.sum(0).to(position.dtype)


def _backend(x: torch.Tensor):
    """(forward, backward) for x's device."""
    if not x.is_cuda:
        return _twin_forward, _twin_backward
    from kernels.nsa import pool

    return pool.pool_forward, pool.pool_backward


@torch.library.custom_op("nsa::pool", mutates_args=())
def _pool(
    x: Tensor, score: Tensor, position: Tensor, cu_seqlens: Tensor, geometry: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _backend(x)[0](x, score, position, cu_seqlens, Geometry(*geometry))


@_pool.register_fake
def _(x, score, position, cu_seqlens, geometry):
    rows = Geometry(*geometry).capacity(x.shape[0])
    lse_dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(rows, *x.shape[1:]), x.new_empty(rows, x.shape[1], dtype=lse_dtype)


@torch.library.custom_op("nsa::pool_backward", mutates_args=())
def _pool_backward(
    dy: Tensor, x: Tensor, score: Tensor, position: Tensor, y: Tensor, lse: Tensor,
    cu_seqlens: Tensor, geometry: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backend(x)[1](dy, x, score, position, y, lse, cu_seqlens, Geometry(*geometry))


@_pool_backward.register_fake
def _(dy, x, score, position, *rest):
    return tuple(torch.empty_like(t) for t in (x, score, position))


def _setup_context(ctx, inputs, output) -> None:
    x, score, position, cu_seqlens, ctx.geometry = inputs
    ctx.save_for_backward(x, score, position, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    return *_pool_backward(dy.contiguous(), *ctx.saved_tensors, ctx.geometry), None, None


_pool.register_autograd(_backward, setup_context=_setup_context)
