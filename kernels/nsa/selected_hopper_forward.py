"""Forward of the selected branch for Hopper, in Gluon.

A step waits for one product, the softmax and another product; what hides this is other tiles at
work. One program per multiprocessor therefore holds three independent pipelines, each a producer
warp that copies the key blocks of a tile's union (union.py) and a warpgroup that computes; there
are registers and shared memory for three. Barriers and slots: flash_hopper_common.py.
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
from kernels.nsa.flash_hopper_common import barriers, copy_tile
from kernels.nsa.flash_triton import LN2, LOG2E

PIPES = gl.constexpr(3)
SLOTS = gl.constexpr(3)  # of keys and values in turn: a step and a half


def forward(q, k, v, o, lse, union, cu_seqlens, constants, scale: float) -> None:
    """Fill o and lse."""
    queries, group, keys, dim = union.queries, constants["GROUP"], constants["KEYS"], k.shape[2]
    launch(
        forward_kernel, (multiprocessors(k.device),),
        tensor_tiles(q, queries, group, dim), tensor_tiles(k.flatten(1), keys, dim),
        tensor_tiles(v.flatten(1), keys, dim), o, lse,
        union.tiles, union.key_rows, union.members, union.counts, cu_seqlens, len(union.tiles),
        scale,
        HEADS=constants["HEADS"], KV_HEADS=constants["KV_HEADS"], GROUP=group, D=dim,
        LIST=union.members.shape[2], KEYS=keys, QUERIES=queries, num_warps=4,
    )  # fmt: skip


@gluon.jit
def union_tile(work, tiles, counts, cu_seqlens, num_tiles, LIST: gl.constexpr):
    """(KV head, first token, tokens up to the document's end, list, its length) of a piece of work.

    0 tokens: none. One head after another, since the L2 cache holds the blocks of one, not of all.
    """
    tile = work % num_tiles
    head = work // num_tiles
    document = gl.load(tiles + 2 * tile)
    count = gl.load(counts + head * num_tiles + tile)
    real = document >= 0
    document = gl.maximum(document, 0)
    token = gl.load(cu_seqlens + document) + gl.load(tiles + 2 * tile + 1)
    left = gl.where(real, gl.load(cu_seqlens + document + 1) - token, 0)
    list_at = (head * num_tiles + tile).to(gl.int64) * LIST
    return head, token, left, list_at, gl.where(real, count, 0)


@gluon.jit
def _copy(desc, at, smem, bars, item, PIPE: gl.constexpr):
    slot = PIPE * SLOTS + item % SLOTS
    mbarrier.wait(bars.index(PIPES * SLOTS + slot), (item // SLOTS & 1) ^ 1)
    mbarrier.expect(bars.index(slot), desc.block_type.nbytes)
    copy_tile(desc, at, bars.index(slot), smem.index(slot))


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, smem, q_bars, bars,
    tiles, key_rows, counts, cu_seqlens, num_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, LIST: gl.constexpr,
    PIPE: gl.constexpr,
):  # fmt: skip
    item = 0
    tile_count = 0
    first = gl.program_id(0) * PIPES + PIPE
    for work in range(first, num_tiles * KV_HEADS, gl.num_programs(0) * PIPES):
        head, token, left, list_at, count = union_tile(
            work, tiles, counts, cu_seqlens, num_tiles, LIST
        )
        if count > 0:
            mbarrier.wait(q_bars.index(PIPES + PIPE), (tile_count & 1) ^ 1)
            mbarrier.expect(q_bars.index(PIPE), q_desc.block_type.nbytes)
            copy_tile(q_desc, [token, head * GROUP, 0], q_bars.index(PIPE), q_smem.index(PIPE))
            tile_count += 1
            for i in range(0, count):
                row = gl.load(key_rows + list_at + i)
                _copy(k_desc, [row, head * D], smem, bars, item, PIPE)
                _copy(v_desc, [row, head * D], smem, bars, item + 1, PIPE)
                item += 2


@gluon.jit
def _step(
    acc, m, l, q, smem, bars, item, first, chose, tile_token, token, scale,
    M: gl.constexpr, KEYS: gl.constexpr, PIPE: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """One block against all rows; those that did not choose it get nothing from it."""
    slot = PIPE * SLOTS + item % SLOTS
    mbarrier.wait(bars.index(slot), item // SLOTS & 1)
    zero = gl.zeros([M, KEYS], gl.float32, s_layout)
    s = warpgroup_mma(q, smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(bars.index(PIPES * SLOTS + slot), count=1)
    # Keys of the future, which only a tile's own blocks have. One loop with this branch, since
    # ptxas 12.8 set up a descriptor for two loops in the first alone, which may have no steps.
    if first + KEYS > tile_token:
        key = first + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        s = gl.where(key[None, :] <= token[:, None], s, float("-inf"))
    new_m = gl.where(chose, gl.maximum(m, gl.max(s, 1) * scale), m)
    alpha = gl.exp2(m - new_m)
    p = gl.exp2(s * scale - gl.where(chose, new_m, float("inf"))[:, None])
    l = l * alpha + gl.sum(p, 1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(p.to(smem.dtype), p_layout)
    item += 1
    slot = PIPE * SLOTS + item % SLOTS
    mbarrier.wait(bars.index(slot), item // SLOTS & 1)
    acc = warpgroup_mma(p, smem.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(bars.index(PIPES * SLOTS + slot), count=1)
    return acc, new_m, l


@gluon.jit
def _compute(
    o, lse, q_smem, smem, q_bars, bars,
    tiles, key_rows, members, counts, cu_seqlens, num_tiles, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr, PIPE: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = QUERIES * GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row = gl.arange(0, M, gl.SliceLayout(1, s_layout))
    query = row // GROUP
    scale_log2 = scale * LOG2E
    item = 0
    tile_count = 0
    q = q_smem.index(PIPE).reshape([M, D])
    first_work = gl.program_id(0) * PIPES + PIPE
    for work in range(first_work, num_tiles * KV_HEADS, gl.num_programs(0) * PIPES):
        head, tile_token, left, list_at, count = union_tile(
            work, tiles, counts, cu_seqlens, num_tiles, LIST
        )
        token = tile_token + query
        # A finite start keeps rows that have seen nothing free of inf - inf.
        m = gl.full([M], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
        l = gl.zeros([M], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([M, D], gl.float32, acc_layout)
        if count > 0:
            mbarrier.wait(q_bars.index(PIPE), tile_count & 1)
            for i in range(0, count):
                first = gl.load(key_rows + list_at + i)
                chose = (gl.load(members + list_at + i) >> query & 1) != 0
                acc, m, l = _step(
                    acc, m, l, q, smem, bars, item, first, chose, tile_token, token, scale_log2,
                    M, KEYS, PIPE, s_layout, p_layout,
                )  # fmt: skip
                item += 2
            mbarrier.arrive(q_bars.index(PIPES + PIPE), count=1)
            tile_count += 1
        some = l > 0
        l = gl.where(some, l, 1.0)
        norm = gl.where(some, (m + gl.log2(l)) * LN2, float("-inf"))
        row0 = tile_token.to(gl.int64) * HEADS + head * GROUP
        gl.store(lse + row0 + query * HEADS + row % GROUP, norm, mask=query < left)
        acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, acc_layout))[:, None]
        # Straight from the product's layout: another one costs the shared memory of two slots.
        out_row = gl.arange(0, M, gl.SliceLayout(1, acc_layout))
        column = gl.arange(0, D, gl.SliceLayout(0, acc_layout))
        at = o + (row0 + out_row // GROUP * HEADS + out_row % GROUP)[:, None] * D + column[None, :]
        gl.store(at, acc.to(o.dtype.element_ty), mask=(out_row // GROUP < left)[:, None])


@gluon.jit(do_not_specialize=["num_tiles"])
def forward_kernel(
    q_desc, k_desc, v_desc, o, lse, tiles, key_rows, members, counts, cu_seqlens, num_tiles, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [PIPES, QUERIES, GROUP, D], q_desc.layout)
    smem = gl.allocate_shared_memory(dtype, [PIPES * SLOTS, KEYS, D], k_desc.layout)
    q_bars = barriers(PIPES, 1)
    bars = barriers(PIPES * SLOTS, 1)
    gl.warp_specialize(
        [
            (_compute, (
                o, lse, q_smem, smem, q_bars, bars, tiles, key_rows, members, counts, cu_seqlens,
                num_tiles, scale, HEADS, KV_HEADS, GROUP, D, LIST, KEYS, QUERIES, 0,
            )),
            (_compute, (
                o, lse, q_smem, smem, q_bars, bars, tiles, key_rows, members, counts, cu_seqlens,
                num_tiles, scale, HEADS, KV_HEADS, GROUP, D, LIST, KEYS, QUERIES, 1,
            )),
            (_compute, (
                o, lse, q_smem, smem, q_bars, bars, tiles, key_rows, members, counts, cu_seqlens,
                num_tiles, scale, HEADS, KV_HEADS, GROUP, D, LIST, KEYS, QUERIES, 2,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_smem, smem, q_bars, bars, tiles, key_rows, counts,
                cu_seqlens, num_tiles, KV_HEADS, GROUP, D, LIST, 0,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_smem, smem, q_bars, bars, tiles, key_rows, counts,
                cu_seqlens, num_tiles, KV_HEADS, GROUP, D, LIST, 1,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_smem, smem, q_bars, bars, tiles, key_rows, counts,
                cu_seqlens, num_tiles, KV_HEADS, GROUP, D, LIST, 2,
            )),
        ],
        [4, 4, 1, 1, 1],
        [160, 160, 24, 24, 24],
    )  # fmt: skip
