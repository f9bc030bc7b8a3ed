"""Norm and rotary positions of queries or keys as one operator.

Composed of torch's own they are a dozen small launches, which a decode step would wait for, and
compiled still several passes over queries and keys in each direction. Off CUDA torch's own it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, heads, D] by cos and sin [T, D / 2]; fp32 inside, the result has x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """rotate() of x [T, heads, D] after an RMSNorm of its rows with weight [D]; None is no norm.

    cos and sin are fp32 [T, D / 2]. Triton on CUDA, where the result is rounded once, while the plain
    torch twin of any other device also rounds between norm and rotation.
    """
    if x.is_cuda:
        return _norm_rotate(x, weight, cos, sin, eps)
    if weight is not None:
        x = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return rotate(x, cos, sin)


@torch.library.custom_op("nsa::norm_rotate", mutates_args=())
def _norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    from kernels.rotary_triton import forward  # needs a working Triton

    return forward(x, weight, cos, sin, eps)


@_norm_rotate.register_fake
def _(x, *rest):
    return x.new_empty(x.shape)


@torch.library.custom_op("nsa::norm_rotate_backward", mutates_args=())
def _norm_rotate_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dx and dweight, which has no elements without a norm."""
    from kernels.rotary_triton import backward

    return backward(dy, x, weight, cos, sin, eps)


@_norm_rotate_backward.register_fake
def _(dy, x, weight, *rest):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    x, weight, cos, sin = ctx.saved_tensors
    dx, dweight = _norm_rotate_backward(dy, x, weight, cos, sin, ctx.eps)
    return dx, None if weight is None else dweight, None, None, None


_norm_rotate.register_autograd(_backward, setup_context=_setup_context)
