"""What the Gluon kernels of flash_hopper_query.py and flash_hopper_key.py share.

Barriers come in groups: the first half of a group says "full" and is set by the copies, the second
says "free" and is set by the computing warpgroups. A slot in its i-th use is full when phase i & 1
of its barrier is over.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.nsa import flash_triton, gates

# Triton 3.9 has only the new name, 3.6 only the old one.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
load_parts = gluon.jit(gates.load_parts.fn)
merged = gluon.jit(gates.merged.fn)
num_complete = gluon.jit(flash_triton.num_complete.fn)
stat_row = gluon.jit(flash_triton.stat_row.fn)
visible = gluon.jit(flash_triton.visible.fn)


@gluon.jit
def barriers(SLOTS: gl.constexpr, CONSUMERS: gl.constexpr = 2):
    """A group of barriers for SLOTS slots, each read by so many warpgroups."""
    bars = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(SLOTS + i), count=CONSUMERS)
    return bars


@gluon.jit
def memory_rows(
    dtype: gl.constexpr, row, stride, count, per_row: gl.constexpr, valid: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Where the rows of (i // per_row, i % per_row), i < N, are in memory [..., D] of `dtype`.

    They are the rows row + i // per_row * stride + i % per_row. Returns these, whether they exist,
    which takes i // per_row < count and i % per_row < valid, and the offsets [N, D], in a layout of
    16 bytes a thread.
    """
    WIDTH: gl.constexpr = 128 // dtype.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout(
        [1, WIDTH], [32 * WIDTH // D, D // WIDTH], [4, 1], [1, 0]
    )
    i = gl.arange(0, N, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    rows = row + i // per_row * stride + i % per_row
    exist = (i // per_row < count) & (i % per_row < valid)
    return rows, exist, rows[:, None] * D + d[None, :]


@gluon.jit
def store_rows(
    out, x, row, stride, count, per_row: gl.constexpr, valid: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, ADD: gl.constexpr = False,
):  # fmt: skip
    """x [N, D] to, or with ADD onto, the rows of out [..., D] that memory_rows says."""
    dtype: gl.constexpr = out.dtype.element_ty
    rows, exist, at = memory_rows(dtype, row, stride, count, per_row, valid, N, D)
    x = gl.convert_layout(x.to(dtype), at.type.layout)
    if ADD:
        old = gl.load(out + at, mask=exist[:, None], other=0.0)
        x = (x.to(gl.float32) + old.to(gl.float32)).to(dtype)
    gl.store(out + at, x, mask=exist[:, None])


@gluon.jit
def query_tile(work, num_tiles, tiles, cu_queries, cu_keys, HKV: gl.constexpr):
    """(KV head, first query, first token, length, first key) of a piece of work; length 0: none."""
    tile = gl.maximum(num_tiles - 1 - work // HKV, 0)
    document = gl.load(tiles + 2 * tile)
    first = gl.load(tiles + 2 * tile + 1)
    real = (document >= 0) & (work < num_tiles * HKV)
    document = gl.maximum(document, 0)
    token0 = gl.load(cu_queries + document)
    length = gl.where(real, gl.load(cu_queries + document + 1) - token0, 0)
    return work % HKV, first, token0, length, gl.load(cu_keys + document), document


@gluon.jit
def query_steps(
    first, length, window,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """(first key, masked steps, all steps, full_begin); masked steps run first."""
    last = gl.minimum(first + BQ, length) - 1
    begin = 0
    full_begin = 0
    if WINDOWED:
        begin = gl.maximum(first - window + 1, 0)
        full_begin = gl.cdiv(gl.maximum(last - window + 1, 0) - begin, BN)
    steps = gl.cdiv(gl.maximum(num_complete(last, STRIDE, OFFSET) - begin, 0), BN)
    full_end = gl.maximum(num_complete(first, STRIDE, OFFSET) - begin, 0) // BN
    full_end = gl.minimum(gl.maximum(full_begin, full_end), gl.maximum(steps, full_begin))
    return begin, steps - (full_end - full_begin), steps, full_begin


@gluon.jit
def step_key(i, begin, masked, steps, full_begin, BN: gl.constexpr):
    """First key of step i."""
    full = steps - masked
    i = gl.where(i < masked, gl.where(i < full_begin, i, i + full), full_begin + i - masked)
    return begin + i * BN
