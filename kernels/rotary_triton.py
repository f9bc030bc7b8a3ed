"""The kernels of rotary.py: a program takes rows, each one head of one token, a few at a time."""

import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2

ROWS = 8
# Programs of a backward pass: each sums its rows' share of the norm's gradient.
PROGRAMS = 1024


def forward(x, weight, cos, sin, eps: float):
    """See kernels.rotary.norm_rotate; x's heads lie together, its tokens anywhere."""
    x, out = _heads_together(x), x.new_empty(x.shape)
    tokens, heads, dim = x.shape
    if x.numel():
        launch(
            _forward_kernel, (cdiv(tokens * heads, ROWS),),
            x, weight, cos.contiguous(), sin.contiguous(), out, x.stride(0), tokens * heads, eps,
            **_constants(heads, dim, weight), num_warps=4,
        )  # fmt: skip
    return out


def backward(dy, x, weight, cos, sin, eps: float):
    """dx [T, heads, D], contiguous, and dweight [D], or [0] without a norm."""
    x, dy, dx = _heads_together(x), _heads_together(dy), x.new_empty(x.shape)
    tokens, heads, dim = x.shape
    tiles = cdiv(tokens * heads, ROWS)
    programs = min(tiles, PROGRAMS)
    partial = None if weight is None else cos.new_empty(programs, dim)
    if x.numel():
        launch(
            _backward_kernel, (programs,),
            dy, x, weight, cos.contiguous(), sin.contiguous(), dx, partial, dy.stride(0),
            x.stride(0), tokens * heads, cdiv(tiles, programs), eps,
            **_constants(heads, dim, weight), num_warps=4,
        )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def _heads_together(x):
    """x, copied unless each token's heads are contiguous, as in a part of a wider projection."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _constants(heads, dim, weight) -> dict:
    padded = next_power_of_2(dim // 2)
    return dict(H=heads, HALF=dim // 2, PADDED=padded, NORM=weight is not None, ROWS=ROWS)


@triton.jit
def _load_halves(
    x, token, column, mask, stride,
    HALF: tl.constexpr,
):  # fmt: skip
    at = token.to(tl.int64)[:, None] * stride + column
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return a, tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, d, HALF: tl.constexpr):
    a = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)
    b = tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@triton.jit
def _forward_kernel(
    x, weight, cos, sin, out, stride, num_rows, eps,
    H: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    mask = (row < num_rows)[:, None] & (d < HALF)[None, :]
    token = row // H
    column = (row % H)[:, None] * (2 * HALF) + d[None, :]
    a, b = _load_halves(x, token, column, mask, stride, HALF)
    if NORM:
        weight_a, weight_b = _load_weight(weight, d, HALF)
        mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        a *= scale * weight_a
        b *= scale * weight_b
    turn = token[:, None] * HALF + d[None, :]
    c = tl.load(cos + turn, mask=mask, other=0.0)
    s = tl.load(sin + turn, mask=mask, other=0.0)
    out += row.to(tl.int64)[:, None] * (2 * HALF) + d[None, :]
    tl.store(out, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy, x, weight, cos, sin, dx, partial, dy_stride, x_stride, num_rows, num_tiles, eps,
    H: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """num_tiles tiles of ROWS rows; row of `partial`: this program's sum for the weight's gradient.

    With n = x r, r = (mean(x^2) + eps)^-1/2 and g the gradient before the rotation:
    dweight = sum g n, and dx = r (weight g - n mean(weight g n)).
    """
    program = tl.program_id(0)
    d = tl.arange(0, PADDED)
    if NORM:
        weight_a, weight_b = _load_weight(weight, d, HALF)
        sum_a = tl.zeros([ROWS, PADDED], tl.float32)
        sum_b = tl.zeros([ROWS, PADDED], tl.float32)
    for tile in range(program * num_tiles, (program + 1) * num_tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (d < HALF)[None, :]
        token = row // H
        column = (row % H)[:, None] * (2 * HALF) + d[None, :]
        turn = token[:, None] * HALF + d[None, :]
        c = tl.load(cos + turn, mask=mask, other=0.0)
        s = tl.load(sin + turn, mask=mask, other=0.0)
        dy_a, dy_b = _load_halves(dy, token, column, mask, dy_stride, HALF)
        a = dy_a * c + dy_b * s
        b = dy_b * c - dy_a * s
        if NORM:
            x_a, x_b = _load_halves(x, token, column, mask, x_stride, HALF)
            mean = (tl.sum(x_a * x_a, 1) + tl.sum(x_b * x_b, 1)) / (2 * HALF)
            scale = tl.rsqrt(mean + eps)[:, None]
            x_a *= scale
            x_b *= scale
            sum_a += a * x_a
            sum_b += b * x_b
            a *= weight_a
            b *= weight_b
            along = ((tl.sum(a * x_a, 1) + tl.sum(b * x_b, 1)) / (2 * HALF))[:, None]
            a = scale * (a - x_a * along)
            b = scale * (b - x_b * along)
        at = row.to(tl.int64)[:, None] * (2 * HALF) + d[None, :]
        tl.store(dx + at, a.to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + at + HALF, b.to(dx.dtype.element_ty), mask=mask)
    if NORM:
        partial += program * (2 * HALF) + d
        tl.store(partial, tl.sum(sum_a, 0), mask=d < HALF)
        tl.store(partial + HALF, tl.sum(sum_b, 0), mask=d < HALF)
