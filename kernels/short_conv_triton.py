"""The kernels of short_conv.py: a program takes a tile of tokens and channels, and reads the rows
before it (backward: behind it) again from cache. The weight's gradient is summed by tile and then over
tiles, so nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch

TOKENS = 64  # of a program
CHANNELS = 64


def forward(x, weight, positions):
    """y [T, C]; x [T, C], weight [W, C], positions int64 [T], all contiguous."""
    y = torch.empty_like(x)
    if x.numel():
        launch(
            _forward_kernel, _grid(x),
            x, weight, positions, y, len(x),
            C=x.shape[1], W=len(weight), TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return y


def backward(dy, x, weight, positions):
    """dx [T, C] and dweight [W, C] in their inputs' dtypes."""
    grid, dx = _grid(x), torch.empty_like(x)
    partial = torch.empty(grid[0], *weight.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        launch(
            _backward_kernel, grid,
            dy, x, weight, positions, dx, partial, len(x),
            C=x.shape[1], W=len(weight), TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def step(x, weight, ring, lengths):
    """See kernels.short_conv.short_conv_step."""
    y, (batch, channels) = torch.empty_like(x), x.shape
    if x.numel():
        launch(
            _step_kernel, (batch, cdiv(channels, CHANNELS)),
            x, weight, ring, lengths, y, C=channels, W=len(weight), CHANNELS=CHANNELS, num_warps=1,
        )  # fmt: skip
    return y


def _grid(x):
    return cdiv(len(x), TOKENS), cdiv(x.shape[1], CHANNELS)


@triton.jit
def _forward_kernel(
    x, weight, positions, y, num_tokens,
    C: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.load(positions + t, mask=t < num_tokens, other=-1)
    at = t[:, None] * C + c[None, :]
    acc = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for j in tl.static_range(W):
        seen = ((position >= j) & (t >= j))[:, None] & (c < C)[None, :]
        tap = tl.load(weight + j * C + c, mask=c < C, other=0.0).to(tl.float32)
        acc += tap[None, :] * tl.load(x + at - j * C, mask=seen, other=0.0).to(tl.float32)
    inside = (t < num_tokens)[:, None] & (c < C)[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _step_kernel(
    x, weight, ring, lengths, y, C: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr
):
    b = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.load(lengths + b) - 1
    newest = tl.load(x + b * C + c, mask=c < C, other=0.0)
    rows = ring + b * (W - 1) * C + c
    acc = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * newest.to(tl.float32)
    for j in tl.static_range(1, W):
        tap = tl.load(weight + j * C + c, mask=c < C, other=0.0).to(tl.float32)
        # Plus W - 1: the remainder of a negative number would be negative.
        at = rows + (position - j + W - 1) % (W - 1) * C
        known = c < tl.where(position >= j, C, 0)
        acc += tap * tl.load(at, mask=known, other=0.0).to(tl.float32)
    tl.store(y + b * C + c, acc.to(y.dtype.element_ty), mask=c < C)
    # The oldest token's row, which this thread has read.
    tl.store(rows + position % (W - 1) * C, newest, mask=c < C)


@triton.jit
def _backward_kernel(
    dy, x, weight, positions, dx, partial, num_tokens,
    C: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = t[:, None] * C + c[None, :]
    inside = (t < num_tokens)[:, None] & (c < C)[None, :]
    # Of a tile's tokens as those that are read: x_t is in y_(t + j) with weight_j.
    rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for j in tl.static_range(W):
        position = tl.load(positions + t + j, mask=t + j < num_tokens, other=-1)
        reads = (position >= j)[:, None] & (c < C)[None, :]
        grad = tl.load(dy + at + j * C, mask=reads, other=0.0).to(tl.float32)
        tap = tl.load(weight + j * C + c, mask=c < C, other=0.0).to(tl.float32)
        acc += tap[None, :] * grad
        tl.store(partial + (tile * W + j) * C + c, tl.sum(grad * rows, 0), mask=c < C)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside)
