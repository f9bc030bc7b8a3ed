"""Norm and rotary positions of queries or keys as one operator without a gradient, for inference.

Composed of torch's own it is a dozen small launches, which is what a decode step would wait for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, heads, D] by cos and sin [T, D / 2]; fp32 inside, the result has x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@torch.library.custom_op("nsa::norm_rotate", mutates_args=())
def norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """rotate() of x [T, heads, D] after an RMSNorm of its rows with weight [D]; None is no norm.

    cos and sin are fp32 [T, D / 2]. Triton on CUDA, where the result is rounded once, while torch
    also rounds between norm and rotation; the plain torch twin on any other device.
    """
    if x.is_cuda:
        from kernels.rotary_triton import norm_rotate as step  # needs a working Triton

        return step(x.contiguous(), weight, cos, sin, eps)
    if weight is not None:
        x = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return rotate(x, cos, sin)


@norm_rotate.register_fake
def _(x, *rest):
    return x.new_empty(x.shape)
