"""dQ of the selected branch over the unions of queries, in Gluon for Hopper.

One program per multiprocessor walks over tiles of queries. A producer warp copies the key blocks of
a tile's union (union.py). Two warpgroups compute, each for half of the tile's queries: they share
the copies, whose traffic from L2 is the limit of separate tiles, and each passes over the blocks
that none of its own queries chose. Barriers and slots: flash_hopper_common.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.launch import launch
from kernels.nsa.flash_hopper import multiprocessors, tensor_tiles
from kernels.nsa.flash_hopper_common import barriers, copy_tile, store_rows
from kernels.nsa.flash_triton import LOG2E
from kernels.nsa.selected_hopper_forward import union_tile

STAGES = 4


def query_gradient(do, q, k, v, lse, delta, dq, union, cu_seqlens, constants, scale) -> None:
    """Fill dq."""
    queries, group, keys, dim = union.queries, constants["GROUP"], constants["KEYS"], k.shape[2]
    launch(
        query_gradient_kernel, (multiprocessors(k.device),),
        *(tensor_tiles(x, queries, group, dim) for x in (q, do)),
        *(tensor_tiles(x.flatten(1), keys, dim) for x in (k, v)), lse, delta, dq,
        union.tiles, union.key_rows, union.members, union.counts, cu_seqlens, len(union.tiles),
        scale,
        HEADS=constants["HEADS"], KV_HEADS=constants["KV_HEADS"], GROUP=group, D=dim,
        LIST=union.members.shape[2], KEYS=keys, QUERIES=queries, STAGES=STAGES, num_warps=4,
    )  # fmt: skip


@gluon.jit
def _load(
    q_desc, do_desc, k_desc, v_desc, q_smem, do_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
    tiles, key_rows, counts, cu_seqlens, num_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, LIST: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    done = 0
    tile_count = 0
    for work in range(gl.program_id(0), num_tiles * KV_HEADS, gl.num_programs(0)):
        head, token, left, list_at, count = union_tile(
            work, tiles, counts, cu_seqlens, num_tiles, LIST
        )
        if count > 0:
            full = q_bars.index(0)
            mbarrier.wait(q_bars.index(1), (tile_count & 1) ^ 1)
            mbarrier.expect(full, 2 * q_desc.block_type.nbytes)
            copy_tile(q_desc, [token, head * GROUP, 0], full, q_smem.index(0))
            copy_tile(do_desc, [token, head * GROUP, 0], full, do_smem.index(0))
            tile_count += 1
            for i in range(0, count):
                row = gl.load(key_rows + list_at + i)
                slot = done % STAGES
                phase = (done // STAGES & 1) ^ 1
                mbarrier.wait(k_bars.index(STAGES + slot), phase)
                mbarrier.expect(k_bars.index(slot), k_desc.block_type.nbytes)
                copy_tile(k_desc, [row, head * D], k_bars.index(slot), k_smem.index(slot))
                mbarrier.wait(v_bars.index(STAGES + slot), phase)
                mbarrier.expect(v_bars.index(slot), v_desc.block_type.nbytes)
                copy_tile(v_desc, [row, head * D], v_bars.index(slot), v_smem.index(slot))
                done += 1


@gluon.jit
def _gradient_step(
    acc, q, do, k_smem, v_smem, k_bars, v_bars, done, first, bits, tile_token, token, query, norm,
    delta, scale,
    M: gl.constexpr, KEYS: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    slot = done % STAGES
    phase = done // STAGES & 1
    k = k_smem.index(slot)
    mbarrier.wait(k_bars.index(slot), phase)
    mbarrier.wait(v_bars.index(slot), phase)
    if (bits & ((1 << Q) - 1)) != 0:
        zero = gl.zeros([M, KEYS], gl.float32, s_layout)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        v = v_smem.index(slot).permute((1, 0))
        dp = warpgroup_mma(do, v, zero, use_acc=False, is_async=True)
        s, dp = warpgroup_mma_wait(1, deps=[s, dp])
        chose = (bits >> query & 1) != 0
        p = gl.exp2(s * scale - gl.where(chose, norm, float("inf"))[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(v_bars.index(STAGES + slot), count=1)
        if first + KEYS > tile_token:
            key = first + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
            p = gl.where(key[None, :] <= token[:, None], p, 0.0)
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(k_smem.dtype), p_layout)
        acc = warpgroup_mma(ds, k, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    else:
        mbarrier.arrive(v_bars.index(STAGES + slot), count=1)
    mbarrier.arrive(k_bars.index(STAGES + slot), count=1)
    return acc


@gluon.jit
def _gradient_compute(
    lse, delta, dq, q_smem, do_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
    tiles, key_rows, members, counts, cu_seqlens, num_tiles, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    Q: gl.constexpr = QUERIES // 2
    M: gl.constexpr = Q * GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row = gl.arange(0, M, gl.SliceLayout(1, s_layout))
    query = row // GROUP
    scale_log2 = scale * LOG2E
    done = 0
    tile_count = 0
    for work in range(gl.program_id(0), num_tiles * KV_HEADS, gl.num_programs(0)):
        head, tile_token, left, list_at, count = union_tile(
            work, tiles, counts, cu_seqlens, num_tiles, LIST
        )
        token = tile_token + PART * Q + query
        row0 = (tile_token + PART * Q).to(gl.int64) * HEADS + head * GROUP
        at = row0 + query * HEADS + row % GROUP
        valid = PART * Q + query < left
        acc = gl.zeros([M, D], gl.float32, acc_layout)
        if count > 0:
            norm = gl.load(lse + at, mask=valid, other=0.0) * LOG2E
            row_delta = gl.load(delta + at, mask=valid, other=0.0)
            q = q_smem.index(0).reshape([2 * M, D]).slice(PART * M, M)
            do = do_smem.index(0).reshape([2 * M, D]).slice(PART * M, M)
            mbarrier.wait(q_bars.index(0), tile_count & 1)
            for i in range(0, count):
                first = gl.load(key_rows + list_at + i)
                bits = gl.load(members + list_at + i) >> (PART * Q)
                acc = _gradient_step(
                    acc, q, do, k_smem, v_smem, k_bars, v_bars, done, first, bits, tile_token,
                    token, query, norm, row_delta, scale_log2,
                    M, KEYS, Q, STAGES, s_layout, p_layout,
                )  # fmt: skip
                done += 1
            mbarrier.arrive(q_bars.index(1), count=1)
            tile_count += 1
        store_rows(dq, acc * scale, row0, HEADS, left - PART * Q, GROUP, GROUP, M, D)


@gluon.jit(do_not_specialize=["num_tiles"])
def query_gradient_kernel(
    q_desc, do_desc, k_desc, v_desc, lse, delta, dq,
    tiles, key_rows, members, counts, cu_seqlens, num_tiles, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [1, QUERIES, GROUP, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [1, QUERIES, GROUP, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], v_desc.layout)
    q_bars = barriers(1)
    k_bars = barriers(STAGES)
    v_bars = barriers(STAGES)
    gl.warp_specialize(
        [
            (_gradient_compute, (
                lse, delta, dq, q_smem, do_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
                tiles, key_rows, members, counts, cu_seqlens, num_tiles, scale,
                HEADS, KV_HEADS, GROUP, D, LIST, KEYS, QUERIES, STAGES, 0,
            )),
            (_gradient_compute, (
                lse, delta, dq, q_smem, do_smem, k_smem, v_smem, q_bars, k_bars, v_bars,
                tiles, key_rows, members, counts, cu_seqlens, num_tiles, scale,
                HEADS, KV_HEADS, GROUP, D, LIST, KEYS, QUERIES, STAGES, 1,
            )),
            (_load, (
                q_desc, do_desc, k_desc, v_desc, q_smem, do_smem, k_smem, v_smem,
                q_bars, k_bars, v_bars, tiles, key_rows, counts, cu_seqlens, num_tiles,
                KV_HEADS, GROUP, D, LIST, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
