"""A short causal convolution over packed tokens, channel by channel.

    y_t = sum_j weight_j * x_(t - j),  j < W, over tokens of t's document

Triton on CUDA (short_conv_triton.py), the plain torch twin here on any other device. It is one operator
because a composition of torch's own would hold a dozen fp32 copies of x for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def short_conv(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """x [T, C], weight [W, C], positions int64 [T] -> [T, C] in x's dtype; the arithmetic is fp32.

    positions count from each document's first token, before which are zeros; the tokens that they
    promise before t are the rows before t.
    """
    return _short_conv(x.contiguous(), weight.contiguous(), positions)


@torch.library.custom_op("nsa::short_conv_step", mutates_args=("ring",))
def short_conv_step(x: Tensor, weight: Tensor, ring: Tensor, lengths: Tensor) -> Tensor:
    """The convolution of one new token of every sequence, for inference: x [B, C] -> [B, C].

    weight [W, C]. ring [B, W - 1, C] holds the tokens before it, token t in row t % (W - 1), and
    gets it; lengths int32 [B], at least 1, counts each sequence's tokens with it. All contiguous.
    """
    if x.is_cuda:
        from kernels.short_conv_triton import step  # needs a working Triton

        return step(x, weight, ring, lengths)
    sequence, reach = torch.arange(len(x), device=x.device), ring.shape[1]
    wide, position = torch.promote_types(x.dtype, torch.float32), lengths - 1
    y = weight[0].to(wide) * x
    for j in range(1, reach + 1):
        earlier = ring[sequence, (position - j) % reach] * (position >= j)[:, None]
        y = y + weight[j].to(wide) * earlier
    ring[sequence, position % reach] = x
    return y.to(x.dtype)


@short_conv_step.register_fake
def _(x, *rest):
    return torch.empty_like(x)


def _shifted(x: Tensor, positions: Tensor, j: int) -> Tensor:
    """Row t is x_(t - j), or zero where that is not of t's document."""
    rows = torch.cat([x.new_zeros(min(j, len(x)), x.shape[1]), x[: max(len(x) - j, 0)]])
    return rows * (positions >= j)[:, None]


def _twin_forward(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = (weight[j].to(wide) * _shifted(x, positions, j) for j in range(len(weight)))
    return sum(taps).to(x.dtype)


def _twin_backward(dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor):
    """dx, dweight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, dweight = torch.zeros_like(x, dtype=wide), torch.zeros_like(weight, dtype=wide)
    for j in range(min(len(weight), len(x))):
        own = dy.to(wide) * (positions >= j)[:, None]
        dx[: len(x) - j] += weight[j] * own[j:]
        dweight[j] = (own * _shifted(x, positions, j)).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _backend(x: Tensor):
    """(forward, backward) for x's device."""
    if not x.is_cuda:
        return _twin_forward, _twin_backward
    from kernels import short_conv_triton

    return short_conv_triton.forward, short_conv_triton.backward


@torch.library.custom_op("nsa::short_conv", mutates_args=())
def _short_conv(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    return _backend(x)[0](x, weight, positions)


@_short_conv.register_fake
def _(x, weight, positions):
    return torch.empty_like(x)


@torch.library.custom_op("nsa::short_conv_backward", mutates_args=())
def _short_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    return _backend(x)[1](dy, x, weight, positions)


@_short_conv_backward.register_fake
def _(dy, x, weight, positions):
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return *_short_conv_backward(dy.contiguous(), *ctx.saved_tensors), None


_short_conv.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.nsa.short_conv)
def _forward_flops(x, weight, *rest, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.nsa.short_conv_backward)
def _backward_flops(dy, x, weight, *rest, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(x, weight)
