"""The kernel of rotary.py: a program takes a few rows, each one head of one token."""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2

ROWS = 8


def norm_rotate(x, weight, cos, sin, eps: float):
    """See kernels.rotary.norm_rotate; all contiguous."""
    out, (tokens, heads, dim) = torch.empty_like(x), x.shape
    if x.numel():
        launch(
            _norm_rotate_kernel, (cdiv(tokens * heads, ROWS),),
            x, weight, cos, sin, out, tokens * heads, eps, H=heads, HALF=dim // 2,
            PADDED=next_power_of_2(dim // 2), NORM=weight is not None, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _norm_rotate_kernel(
    x, weight, cos, sin, out, num_rows, eps,
    H: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    mask = (row < num_rows)[:, None] & (d < HALF)[None, :]
    at = row[:, None] * (2 * HALF) + d[None, :]
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        a *= scale * tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        b *= scale * tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    turn = (row // H)[:, None] * HALF + d[None, :]
    c = tl.load(cos + turn, mask=mask, other=0.0)
    s = tl.load(sin + turn, mask=mask, other=0.0)
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=mask)
