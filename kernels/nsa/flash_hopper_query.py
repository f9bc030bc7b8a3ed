"""Query-major Gluon kernels for Hopper: forward and dQ of flash.py's problem.

One program per multiprocessor walks over the tiles of queries. A producer warp keeps TMA copies in
flight, across tiles too; two warpgroups compute on their own half of a tile's rows, so that one's
softmax overlaps with the other's matrix products, and each keeps a product of the last step running
under the softmax of this one. Barriers and slots: flash_hopper_common.py.
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
    load_parts,
    memory_rows,
    merged,
    query_steps,
    query_tile,
    stat_row,
    step_key,
    store_rows,
    visible,
)
from kernels.nsa.flash_triton import LN2, LOG2E


@gluon.jit
def _forward_load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
    tiles, cu_queries, cu_keys, num_tiles, window,
    HKV: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    done = 0
    tile_count = 0
    for work in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        h, first, token0, length, key0, document = query_tile(
            work, num_tiles, tiles, cu_queries, cu_keys, HKV
        )
        begin, masked, steps, full_begin = query_steps(
            first, length, window, STRIDE, OFFSET, WINDOWED, BQ, BN
        )
        if steps > 0:
            slot = tile_count % SLOTS
            mbarrier.wait(q_bars.index(SLOTS + slot), (tile_count // SLOTS & 1) ^ 1)
            mbarrier.expect(q_bars.index(slot), q_desc.block_type.nbytes)
            copy_tile(q_desc, [token0 + first, h * G, 0], q_bars.index(slot), q_smem.index(slot))
            tile_count += 1
            for i in range(0, steps):
                row = key0 + step_key(i, begin, masked, steps, full_begin, BN)
                slot = done % STAGES
                phase = (done // STAGES & 1) ^ 1
                mbarrier.wait(k_bars.index(STAGES + slot), phase)
                mbarrier.expect(k_bars.index(slot), k_desc.block_type.nbytes)
                copy_tile(k_desc, [row, h * DK], k_bars.index(slot), k_smem.index(slot))
                mbarrier.wait(v_bars.index(STAGES + slot), phase)
                mbarrier.expect(v_bars.index(slot), v_desc.block_type.nbytes)
                copy_tile(v_desc, [row, h * DV], v_bars.index(slot), v_smem.index(slot))
                done += 1


@gluon.jit
def _softmax(
    s, m, l, n0, t, window, scale,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr, BN: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    if MASK:
        n = n0 + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        seen = visible(n[None, :], t[:, None], window, STRIDE, OFFSET, WINDOWED)
        s = gl.where(seen, s, float("-inf"))
    new_m = gl.maximum(m, gl.max(s, 1) * scale)
    alpha = gl.exp2(m - new_m)
    p = gl.exp2(s * scale - new_m[:, None])
    return p, alpha, new_m, l * alpha + gl.sum(p, 1)


@gluon.jit
def _forward_step(
    p, acc, m, l, q, k_smem, v_smem, k_bars, v_bars, done, n0, t, window, scale,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    M: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    s_layout: gl.constexpr, acc_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Logits of this step while the last step's P V runs, then this step's softmax meanwhile."""
    slot = done % STAGES
    mbarrier.wait(k_bars.index(slot), done // STAGES & 1)
    zero = gl.zeros([M, BN], gl.float32, s_layout)
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    last = (done - 1) % STAGES
    mbarrier.wait(v_bars.index(last), (done - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    mbarrier.arrive(k_bars.index(STAGES + slot), count=1)
    p, alpha, m, l = _softmax(s, m, l, n0, t, window, scale, STRIDE, OFFSET, WINDOWED, BN, MASK)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_bars.index(STAGES + last), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))[:, None]
    p = gl.convert_layout(p.to(k_smem.dtype), p_layout)
    return p, acc, m, l


@gluon.jit
def _forward_compute(
    o, lse, gates, o_cmp, o_sel, out, q_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
    tiles, cu_queries, cu_keys, num_tiles, window, scale,
    H: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = BQ * GP // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    dtype: gl.constexpr = k_smem.dtype
    scale_log2 = scale * LOG2E
    done = 0
    tile_count = 0
    for work in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        h, first, token0, length, key0, document = query_tile(
            work, num_tiles, tiles, cu_queries, cu_keys, HKV
        )
        begin, masked, steps, full_begin = query_steps(
            first, length, window, STRIDE, OFFSET, WINDOWED, BQ, BN
        )
        r = gl.arange(0, M, gl.SliceLayout(1, s_layout))
        t0 = first + PART * M // GP
        t = t0 + r // GP
        row0 = (token0 + t0).to(gl.int64) * H + h * G
        row = row0 + r // GP * H + r % GP
        ok = (t < length) & (r % GP < G)
        m = gl.full([M], -1.0e30, gl.float32, gl.SliceLayout(1, s_layout))
        l = gl.zeros([M], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([M, DV], gl.float32, acc_layout)
        p = gl.zeros([M, BN], dtype, p_layout)
        if steps > 0:
            q_slot = tile_count % SLOTS
            q = q_smem.index(q_slot).reshape([2 * M, DK]).slice(PART * M, M)
            mbarrier.wait(q_bars.index(q_slot), tile_count // SLOTS & 1)
            slot = done % STAGES
            mbarrier.wait(k_bars.index(slot), done // STAGES & 1)
            zero = gl.zeros([M, BN], gl.float32, s_layout)
            k = k_smem.index(slot).permute((1, 0))
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_bars.index(STAGES + slot), count=1)
            n0 = step_key(0, begin, masked, steps, full_begin, BN)
            p, alpha, m, l = _softmax(
                s, m, l, n0, t, window, scale_log2, STRIDE, OFFSET, WINDOWED, BN, True
            )
            p = gl.convert_layout(p.to(dtype), p_layout)
            done += 1
            masked_end = gl.maximum(masked, 1)
            for i in range(1, masked_end):
                p, acc, m, l = _forward_step(
                    p, acc, m, l, q, k_smem, v_smem, k_bars, v_bars, done,
                    step_key(i, begin, masked, steps, full_begin, BN), t, window, scale_log2,
                    STRIDE, OFFSET, WINDOWED, M, BN, STAGES, True, s_layout, acc_layout, p_layout,
                )  # fmt: skip
                done += 1
            for _ in range(masked_end, steps):
                p, acc, m, l = _forward_step(
                    p, acc, m, l, q, k_smem, v_smem, k_bars, v_bars, done,
                    0, t, window, scale_log2,
                    STRIDE, OFFSET, WINDOWED, M, BN, STAGES, False, s_layout, acc_layout, p_layout,
                )  # fmt: skip
                done += 1
            mbarrier.arrive(q_bars.index(SLOTS + q_slot), count=1)
            tile_count += 1
        rows, exist, at = memory_rows(dtype, row0, H, length - t0, GP, G, M, DV)
        if out is not None:
            # Asked for before the last product, so that they arrive behind it.
            parts = load_parts(gates, o_cmp, o_sel, rows, exist, at, exist[:, None])
        if steps > 0:
            slot = (done - 1) % STAGES
            mbarrier.wait(v_bars.index(slot), (done - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_smem.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_bars.index(STAGES + slot), count=1)

        some = l > 0
        l = gl.where(some, l, 1.0)
        norm = gl.where(some, (m + gl.log2(l)) * LN2, float("-inf"))
        gl.store(lse + row, norm, mask=ok)
        acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, acc_layout))[:, None]
        acc = gl.convert_layout(acc.to(dtype), at.type.layout)
        gl.store(o + at, acc, mask=exist[:, None])
        if out is not None:
            gl.store(out + at, merged(parts, acc).to(dtype), mask=exist[:, None])


@gluon.jit(do_not_specialize=["num_tiles", "window"])
def forward_kernel(
    q_desc, k_desc, v_desc, o, lse, gates, o_cmp, o_sel, out,
    tiles, cu_queries, cu_keys, num_tiles, window, scale,
    H: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [SLOTS, BQ, GP, DK], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], v_desc.layout)
    q_bars = barriers(SLOTS)
    k_bars = barriers(STAGES)
    v_bars = barriers(STAGES)
    gl.warp_specialize(
        [
            (_forward_compute, (
                o, lse, gates, o_cmp, o_sel, out,
                q_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
                tiles, cu_queries, cu_keys, num_tiles, window, scale,
                H, HKV, G, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, SLOTS, STAGES, 0,
            )),
            (_forward_compute, (
                o, lse, gates, o_cmp, o_sel, out,
                q_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
                tiles, cu_queries, cu_keys, num_tiles, window, scale,
                H, HKV, G, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, SLOTS, STAGES, 1,
            )),
            (_forward_load, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
                tiles, cu_queries, cu_keys, num_tiles, window,
                HKV, G, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, SLOTS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _dq_load(
    q_desc, do_desc, k_desc, v_desc, q_smem, do_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
    tiles, cu_queries, cu_keys, num_tiles, window,
    HKV: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    done = 0
    tile_count = 0
    for work in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        h, first, token0, length, key0, document = query_tile(
            work, num_tiles, tiles, cu_queries, cu_keys, HKV
        )
        begin, masked, steps, full_begin = query_steps(
            first, length, window, STRIDE, OFFSET, WINDOWED, BQ, BN
        )
        if steps > 0:
            slot = tile_count % SLOTS
            mbarrier.wait(q_bars.index(SLOTS + slot), (tile_count // SLOTS & 1) ^ 1)
            mbarrier.expect(
                q_bars.index(slot), q_desc.block_type.nbytes + do_desc.block_type.nbytes
            )
            at = [token0 + first, h * G, 0]
            copy_tile(q_desc, at, q_bars.index(slot), q_smem.index(slot))
            copy_tile(do_desc, at, q_bars.index(slot), do_smem.index(slot))
            tile_count += 1
            for i in range(0, steps):
                row = key0 + step_key(i, begin, masked, steps, full_begin, BN)
                slot = done % STAGES
                phase = (done // STAGES & 1) ^ 1
                mbarrier.wait(k_bars.index(STAGES + slot), phase)
                mbarrier.expect(k_bars.index(slot), k_desc.block_type.nbytes)
                copy_tile(k_desc, [row, h * DK], k_bars.index(slot), k_smem.index(slot))
                mbarrier.wait(v_bars.index(STAGES + slot), phase)
                mbarrier.expect(v_bars.index(slot), v_desc.block_type.nbytes)
                copy_tile(v_desc, [row, h * DV], v_bars.index(slot), v_smem.index(slot))
                done += 1


@gluon.jit
def _dq_logits(
    q, do, k_smem, v_smem, k_bars, v_bars, done,
    M: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Start S = Q K^T and dP = dO V^T of a step."""
    slot = done % STAGES
    zero = gl.zeros([M, BN], gl.float32, s_layout)
    mbarrier.wait(k_bars.index(slot), done // STAGES & 1)
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_bars.index(slot), done // STAGES & 1)
    dp = warpgroup_mma(do, v_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _probability(
    s, n0, t, norm, window, scale,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr, BN: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    p = gl.exp2(s * scale - norm[:, None])
    if MASK:
        n = n0 + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        seen = visible(n[None, :], t[:, None], window, STRIDE, OFFSET, WINDOWED)
        p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def _dq_step(
    ds, acc, q, do, k_smem, v_smem, k_bars, v_bars, done, n0, t, norm, delta, window, scale,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    M: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    s_layout: gl.constexpr, ds_layout: gl.constexpr,
):  # fmt: skip
    """This step's logits, and the last step's dS K behind them while they turn into dS."""
    s, dp = _dq_logits(q, do, k_smem, v_smem, k_bars, v_bars, done, M, BN, STAGES, s_layout)
    last = (done - 1) % STAGES
    acc = warpgroup_mma(ds, k_smem.index(last), acc, is_async=True)
    s, dp, acc = warpgroup_mma_wait(2, deps=[s, dp, acc])
    p = _probability(s, n0, t, norm, window, scale, STRIDE, OFFSET, WINDOWED, BN, MASK)
    dp, acc = warpgroup_mma_wait(1, deps=[dp, acc])
    mbarrier.arrive(v_bars.index(STAGES + done % STAGES), count=1)
    new_ds = (p * (dp - delta[:, None])).to(k_smem.dtype)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(k_bars.index(STAGES + last), count=1)
    return gl.convert_layout(new_ds, ds_layout), acc


@gluon.jit
def _dq_compute(
    lse, delta_in, norms, deltas, dq, q_smem, do_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
    tiles, cu_queries, cu_keys, num_tiles, window, scale, num_stats,
    H: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = BQ * GP // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    scale_log2 = scale * LOG2E
    done = 0
    tile_count = 0
    for work in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        h, first, token0, length, key0, document = query_tile(
            work, num_tiles, tiles, cu_queries, cu_keys, HKV
        )
        begin, masked, steps, full_begin = query_steps(
            first, length, window, STRIDE, OFFSET, WINDOWED, BQ, BN
        )
        r = gl.arange(0, M, gl.SliceLayout(1, s_layout))
        t0 = first + PART * M // GP
        t = t0 + r // GP
        row0 = (token0 + t0).to(gl.int64) * H + h * G
        row = row0 + r // GP * H + r % GP
        ok = (t < length) & (r % GP < G)
        norm = gl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
        norm = gl.where(norm == float("-inf"), float("inf"), norm)
        delta = gl.load(delta_in + row, mask=ok, other=0.0)
        acc = gl.zeros([M, DK], gl.float32, acc_layout)
        if steps > 0:
            q_slot = tile_count % SLOTS
            q = q_smem.index(q_slot).reshape([2 * M, DK]).slice(PART * M, M)
            do = do_smem.index(q_slot).reshape([2 * M, DV]).slice(PART * M, M)
            mbarrier.wait(q_bars.index(q_slot), tile_count // SLOTS & 1)
            s, dp = _dq_logits(q, do, k_smem, v_smem, k_bars, v_bars, done, M, BN, STAGES, s_layout)
            s, dp = warpgroup_mma_wait(0, deps=[s, dp])
            mbarrier.arrive(v_bars.index(STAGES + done % STAGES), count=1)
            n0 = step_key(0, begin, masked, steps, full_begin, BN)
            p = _probability(s, n0, t, norm, window, scale_log2, STRIDE, OFFSET, WINDOWED, BN, True)
            ds = (p * (dp - delta[:, None])).to(k_smem.dtype)
            ds = gl.convert_layout(ds, ds_layout)
            done += 1
            masked_end = gl.maximum(masked, 1)
            for i in range(1, masked_end):
                ds, acc = _dq_step(
                    ds, acc, q, do, k_smem, v_smem, k_bars, v_bars, done,
                    step_key(i, begin, masked, steps, full_begin, BN), t, norm, delta, window,
                    scale_log2,
                    STRIDE, OFFSET, WINDOWED, M, BN, STAGES, True, s_layout, ds_layout,
                )  # fmt: skip
                done += 1
            for _ in range(masked_end, steps):
                ds, acc = _dq_step(
                    ds, acc, q, do, k_smem, v_smem, k_bars, v_bars, done,
                    0, t, norm, delta, window, scale_log2,
                    STRIDE, OFFSET, WINDOWED, M, BN, STAGES, False, s_layout, ds_layout,
                )  # fmt: skip
                done += 1
            mbarrier.arrive(q_bars.index(SLOTS + q_slot), count=1)
            tile_count += 1
            last = (done - 1) % STAGES
            acc = warpgroup_mma(ds, k_smem.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(k_bars.index(STAGES + last), count=1)

        stat = (stat_row(document, token0, h, num_stats) + t0).to(gl.int64) * GP + r
        gl.store(norms + stat, norm, mask=t < length)
        gl.store(deltas + stat, delta, mask=t < length)
        store_rows(dq, acc * scale, row0, H, length - t0, GP, G, M, DK, ADD)


@gluon.jit(do_not_specialize=["num_tiles", "window", "num_stats"])
def dq_kernel(
    q_desc, k_desc, v_desc, do_desc, lse, delta_in, norms, deltas, dq,
    tiles, cu_queries, cu_keys, num_tiles, window, scale, num_stats,
    H: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr,
    STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOWED: gl.constexpr,
    BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [SLOTS, BQ, GP, DK], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [SLOTS, BQ, GP, DV], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], v_desc.layout)
    q_bars = barriers(SLOTS)
    k_bars = barriers(STAGES)
    v_bars = barriers(STAGES)
    gl.warp_specialize(
        [
            (_dq_compute, (
                lse, delta_in, norms, deltas, dq, q_smem, do_smem, k_smem, v_smem,
                q_bars, k_bars, v_bars,
                tiles, cu_queries, cu_keys, num_tiles, window, scale, num_stats,
                H, HKV, G, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, SLOTS, STAGES, ADD, 0,
            )),
            (_dq_compute, (
                lse, delta_in, norms, deltas, dq, q_smem, do_smem, k_smem, v_smem,
                q_bars, k_bars, v_bars,
                tiles, cu_queries, cu_keys, num_tiles, window, scale, num_stats,
                H, HKV, G, GP, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, SLOTS, STAGES, ADD, 1,
            )),
            (_dq_load, (
                q_desc, do_desc, k_desc, v_desc, q_smem, do_smem, k_smem, v_smem,
                q_bars, k_bars, v_bars, tiles, cu_queries, cu_keys, num_tiles, window,
                HKV, G, DK, DV, STRIDE, OFFSET, WINDOWED, BQ, BN, SLOTS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
