"""The key-major Gluon kernel for Hopper: dK/dV of flash.py's problem.

One program per tile of keys and chunk of queries. A producer warp keeps TMA copies of query tiles
in flight; two warpgroups hold dK and dV of their half of the keys in registers. Barriers and slots:
flash_hopper_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.nsa.flash_hopper_common import (
    barriers,
    copy_tile,
    stat_row,
    step_key,
    store_rows,
    visible,
)
from kernels.nsa.flash_triton import ALIGN, LOG2E


@gluon.jit
def _chunk(
    tiles, cu_queries, cu_keys, chunk, window,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """This program's tile of keys, and the steps of BQ queries its chunk holds; 0 steps: none."""
    tile = gl.program_id(0)
    c = gl.program_id(2)
    document = gl.load(tiles + 2 * tile)
    first = gl.load(tiles + 2 * tile + 1)
    real = document >= 0
    document = gl.maximum(document, 0)
    token0 = gl.load(cu_queries + document)
    length = gl.load(cu_queries + document + 1) - token0
    key0 = gl.load(cu_keys + document)
    count = gl.load(cu_keys + document + 1) - key0
    last = gl.minimum(first + BN, count) - 1

    # As in flash_triton: queries begin .. end-1 see some key of the tile.
    begin = gl.maximum(first * STRIDE + OFFSET, c * chunk) // ALIGN * ALIGN
    end = gl.minimum(length, (c + 1) * chunk)
    full_end = end
    if WINDOWED:
        end = gl.minimum(end, last + window)
        full_end = gl.minimum(end, first + window)
    steps = gl.where(real, gl.cdiv(gl.maximum(end - begin, 0), BQ), 0)
    full_begin = gl.minimum(gl.cdiv(gl.maximum(last * STRIDE + OFFSET - begin, 0), BQ), steps)
    full_end = gl.minimum(gl.maximum(full_end - begin, 0) // BQ, steps)
    masked = steps - (gl.maximum(full_begin, full_end) - full_begin)
    return document, first, token0, key0, count, begin, end, masked, steps, full_begin


@gluon.jit
def _load(
    q_desc, do_desc, norm_desc, delta_desc, k_desc, v_desc,
    q_smem, do_smem, norm_smem, delta_smem, k_smem, v_smem, k_bars, q_bars,
    tiles, cu_queries, cu_keys, chunk, window, num_stats,
    G: gl.constexpr, GP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    document, first, token0, key0, count, begin, end, masked, steps, full_begin = _chunk(
        tiles, cu_queries, cu_keys, chunk, window, STRIDE, OFFSET, WINDOWED, BQ, BN
    )
    h = gl.program_id(1)
    if steps > 0:
        full = k_bars.index(0)
        mbarrier.expect(full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        copy_tile(k_desc, [key0 + first, h * DK], full, k_smem)
        copy_tile(v_desc, [key0 + first, h * DV], full, v_smem)
        stat0 = stat_row(document, token0, h, num_stats)
        for i in range(0, steps):
            t0 = step_key(i, begin, masked, steps, full_begin, BQ)
            slot = i % STAGES
            full = q_bars.index(slot)
            mbarrier.wait(q_bars.index(STAGES + slot), (i // STAGES & 1) ^ 1)
            num_bytes: gl.constexpr = q_desc.block_type.nbytes + do_desc.block_type.nbytes
            mbarrier.expect(full, num_bytes + 2 * norm_desc.block_type.nbytes)
            copy_tile(norm_desc, [(stat0 + t0) * GP], full, norm_smem.index(slot))
            copy_tile(delta_desc, [(stat0 + t0) * GP], full, delta_smem.index(slot))
            copy_tile(q_desc, [token0 + t0, h * G, 0], full, q_smem.index(slot))
            copy_tile(do_desc, [token0 + t0, h * G, 0], full, do_smem.index(slot))


@gluon.jit
def _step(
    i, dk, dv, k, v, q_smem, do_smem, norm_smem, delta_smem, q_bars, t0, end, n, window, scale,
    GP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    N: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr, ds_layout: gl.constexpr,
):  # fmt: skip
    slot = i % STAGES
    q = q_smem.index(slot).reshape([R, DK])
    do = do_smem.index(slot).reshape([R, DV])
    zero = gl.zeros([N, R], gl.float32, s_layout)
    mbarrier.wait(q_bars.index(slot), i // STAGES & 1)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    norm = norm_smem.index(slot).load(gl.SliceLayout(0, s_layout))
    s, dp = warpgroup_mma_wait(1, deps=[s, dp])
    if MASK:
        t = t0 + gl.arange(0, R, gl.SliceLayout(0, s_layout)) // GP
        norm = gl.where(t < end, norm, float("inf"))
    p = gl.exp2(s * scale - norm[None, :])
    if MASK:
        seen = visible(n[:, None], t[None, :], window, STRIDE, OFFSET, WINDOWED)
        p = gl.where(seen, p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    pt = gl.convert_layout(p.to(q_smem.dtype), p_layout)
    dv = warpgroup_mma(pt, do, dv, is_async=True)
    delta = delta_smem.index(slot).load(gl.SliceLayout(0, s_layout))
    if MASK:
        delta = gl.where(t < end, delta, 0.0)
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(q_smem.dtype), ds_layout)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(q_bars.index(STAGES + slot), count=1)
    return dk, dv


@gluon.jit
def _compute(
    dk_out, dv_out, q_smem, do_smem, norm_smem, delta_smem, k_smem, v_smem, k_bars, q_bars,
    tiles, cu_queries, cu_keys, chunk, window, scale, num_keys,
    HKV: gl.constexpr, GP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    N: gl.constexpr = BN // 2
    R: gl.constexpr = BQ * GP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    document, first, token0, key0, count, begin, end, masked, steps, full_begin = _chunk(
        tiles, cu_queries, cu_keys, chunk, window, STRIDE, OFFSET, WINDOWED, BQ, BN
    )
    scale_log2 = scale * LOG2E
    if steps > 0:
        first += PART * N
        k = k_smem.slice(PART * N, N)
        v = v_smem.slice(PART * N, N)
        n = first + gl.arange(0, N, gl.SliceLayout(1, s_layout))
        dk = gl.zeros([N, DK], gl.float32, dk_layout)
        dv = gl.zeros([N, DV], gl.float32, dv_layout)
        mbarrier.wait(k_bars.index(0), 0)
        for i in range(0, masked):
            dk, dv = _step(
                i, dk, dv, k, v, q_smem, do_smem, norm_smem, delta_smem, q_bars,
                step_key(i, begin, masked, steps, full_begin, BQ), end, n, window, scale_log2,
                GP, DK, DV, STRIDE, OFFSET, WINDOWED, N, R, STAGES, True,
                s_layout, p_layout, ds_layout,
            )  # fmt: skip
        for i in range(masked, steps):
            dk, dv = _step(
                i, dk, dv, k, v, q_smem, do_smem, norm_smem, delta_smem, q_bars,
                0, end, n, window, scale_log2,
                GP, DK, DV, STRIDE, OFFSET, WINDOWED, N, R, STAGES, False,
                s_layout, p_layout, ds_layout,
            )  # fmt: skip
        row = (gl.program_id(2).to(gl.int64) * num_keys + key0 + first) * HKV + gl.program_id(1)
        store_rows(dk_out, dk * scale, row, HKV, count - first, 1, 1, N, DK)
        store_rows(dv_out, dv, row, HKV, count - first, 1, 1, N, DV)


@gluon.jit(do_not_specialize=["window", "chunk", "num_stats", "num_keys"])
def dkv_kernel(
    q_desc, k_desc, v_desc, do_desc, norm_desc, delta_desc, dk, dv,
    tiles, cu_queries, cu_keys, window, scale, chunk, num_stats, num_keys,
    H: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BQ, GP, DK], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, BQ, GP, DV], do_desc.layout)
    norm_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BQ * GP], norm_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BQ * GP], delta_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [BN, DK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [BN, DV], v_desc.layout)
    k_bars = barriers(1)
    q_bars = barriers(STAGES)
    gl.warp_specialize(
        [
            (_compute, (
                dk, dv, q_smem, do_smem, norm_smem, delta_smem, k_smem, v_smem, k_bars, q_bars,
                tiles, cu_queries, cu_keys, chunk, window, scale, num_keys,
                HKV, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, STAGES, 0,
            )),
            (_compute, (
                dk, dv, q_smem, do_smem, norm_smem, delta_smem, k_smem, v_smem, k_bars, q_bars,
                tiles, cu_queries, cu_keys, chunk, window, scale, num_keys,
                HKV, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, STAGES, 1,
            )),
            (_load, (
                q_desc, do_desc, norm_desc, delta_desc, k_desc, v_desc,
                q_smem, do_smem, norm_smem, delta_smem, k_smem, v_smem, k_bars, q_bars,
                tiles, cu_queries, cu_keys, chunk, window, num_stats,
                G, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
