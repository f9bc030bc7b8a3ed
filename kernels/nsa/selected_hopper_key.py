"""selected_backward.py's dK and dV for Hopper, scheduled by hand in Gluon.

One program per work item, two to a multiprocessor. A producer warp gathers the queries of the list:
the heads of a group lie side by side, so each query is one TMA tile at its own token. A warpgroup
holds dK and dV of the key block in registers. Barriers and slots: flash_hopper_common.py, except
that one warpgroup frees a slot, and that copies and stored row statistics both fill it.
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
from kernels.nsa.flash_hopper import tensor_tiles
from kernels.nsa.flash_hopper_common import copy_tile
from kernels.nsa.flash_triton import LOG2E

ROWS = gl.constexpr(64)  # (query, head of the group) of one step
STAGES = 2
REGISTERS = 128  # per thread at entry: two programs of eight warps fill a multiprocessor


def key_gradients(do, q, k, v, lse, delta, lists, common, constants, scale: float) -> None:
    """Launch key_gradient_kernel; `common` as in selected_backward."""
    group, keys, dim = constants["GROUP"], constants["KEYS"], q.shape[2]
    launch(
        key_gradient_kernel, (lists.item_lists.numel(),),
        tensor_tiles(q, 1, group, dim), tensor_tiles(do, 1, group, dim),
        tensor_tiles(k.flatten(1), keys, dim), tensor_tiles(v.flatten(1), keys, dim), lse, delta,
        lists.pairs, lists.starts, lists.item_lists, *common, q.shape[0], lists.blocks.shape[0],
        lists.item_ends.numel(), lists.item_pairs, scale,
        HEADS=constants["HEADS"], KV_HEADS=constants["KV_HEADS"], GROUP=group, D=dim,
        NUM_SELECTED=constants["NUM_SELECTED"], KEYS=keys, STAGES=STAGES,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


@gluon.jit
def _item(
    pairs, starts, item_lists, blocks, cu_seqlens, item_ends, num_tokens, num_blocks, num_lists,
    item_pairs, NUM_SELECTED: gl.constexpr,
):  # fmt: skip
    """The list of this program's item, and the pairs start .. end-1 it has of it; none: -1."""
    item = gl.program_id(0)
    list_id = gl.load(item_lists + item)
    real = list_id < num_lists
    list_id = gl.where(real, list_id, 0)
    head = list_id // num_blocks
    block = list_id % num_blocks
    document = gl.load(blocks + 2 * block)
    real = real & (document >= 0)
    document = gl.maximum(document, 0)
    first = gl.load(cu_seqlens + document) + gl.load(blocks + 2 * block + 1)
    before = gl.load(item_ends + list_id - 1, mask=list_id > 0, other=0)
    starts += head * (num_blocks + 1) + block
    list_start = gl.load(starts)
    start = list_start + (item - before) * item_pairs
    end = gl.minimum(start + item_pairs, gl.load(starts + 1))
    pairs += head.to(gl.int64) * num_tokens * NUM_SELECTED
    return gl.where(real, list_id, -1), head, document, first, list_start, start, end, pairs


@gluon.jit
def _load(
    q_desc, do_desc, k_desc, v_desc, lse, delta, q_smem, do_smem, norm_smem, delta_smem, token_smem,
    k_smem, v_smem, k_bar, bars, pairs, starts, item_lists, blocks, cu_seqlens, item_ends,
    num_tokens, num_blocks, num_lists, item_pairs,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, NUM_SELECTED: gl.constexpr,
    QUERIES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    list_id, head, document, first, list_start, start, end, pairs = _item(
        pairs, starts, item_lists, blocks, cu_seqlens, item_ends, num_tokens, num_blocks, num_lists,
        item_pairs, NUM_SELECTED,
    )  # fmt: skip
    if list_id >= 0:
        ROWS: gl.constexpr = QUERIES * GROUP
        layout: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [1], [0])
        row = gl.arange(0, ROWS, layout)
        mbarrier.expect(k_bar, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        copy_tile(k_desc, [first, head * D], k_bar, k_smem)
        copy_tile(v_desc, [first, head * D], k_bar, v_smem)
        done = 0
        for i in range(start, end, QUERIES):
            # Rows past the end read the last query and then count for nothing. What can be loaded
            # before the slot is free is.
            token = gl.load(pairs + gl.minimum(i + row // GROUP, end - 1)) // NUM_SELECTED
            at = token.to(gl.int64) * HEADS + head * GROUP + row % GROUP
            norm = gl.load(lse + at)
            row_delta = gl.load(delta + at)
            slot = done % STAGES
            full = bars.index(slot)
            mbarrier.wait(bars.index(STAGES + slot), (done // STAGES & 1) ^ 1)
            mbarrier.expect(full, QUERIES * (q_desc.block_type.nbytes + do_desc.block_type.nbytes))
            for j in gl.static_range(QUERIES):
                query = gl.load(pairs + gl.minimum(i + j, end - 1)) // NUM_SELECTED
                copy_tile(q_desc, [query, head * GROUP, 0], full, q_smem.index(slot).slice(j, 1))
                copy_tile(do_desc, [query, head * GROUP, 0], full, do_smem.index(slot).slice(j, 1))
            norm = gl.where(i + row // GROUP < end, norm * LOG2E, float("inf"))
            norm_smem.index(slot).store(norm)
            delta_smem.index(slot).store(row_delta)
            token_smem.index(slot).store(token)
            mbarrier.arrive(full, count=1)
            done += 1


@gluon.jit
def _step(
    done, dk, dv, k, v, q_smem, do_smem, norm_smem, delta_smem, token_smem, bars, key, scale,
    ROWS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    slot = done % STAGES
    q = q_smem.index(slot).reshape([ROWS, D])
    do = do_smem.index(slot).reshape([ROWS, D])
    zero = gl.zeros([key.shape[0], ROWS], gl.float32, s_layout)
    mbarrier.wait(bars.index(slot), done // STAGES & 1)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    norm = norm_smem.index(slot).load(gl.SliceLayout(0, s_layout))
    s, dp = warpgroup_mma_wait(1, deps=[s, dp])
    p = gl.exp2(s * scale - norm[None, :])
    if MASK:
        token = token_smem.index(slot).load(gl.SliceLayout(0, s_layout))
        p = gl.where(key[:, None] <= token[None, :], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    pt = gl.convert_layout(p.to(q_smem.dtype), p_layout)
    dv = warpgroup_mma(pt, do, dv, is_async=True)
    delta = delta_smem.index(slot).load(gl.SliceLayout(0, s_layout))
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(q_smem.dtype), p_layout)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(bars.index(STAGES + slot), count=1)
    return dk, dv


@gluon.jit
def _store(out, x, row, stride, count, N: gl.constexpr, D: gl.constexpr):
    """x [N, D] to the rows row, row + stride, ... of out [R, D], `count` at most.

    As the registers hold it: shared memory has no room to turn it into wider stores.
    """
    i = gl.arange(0, N, gl.SliceLayout(1, x.type.layout))
    d = gl.arange(0, D, gl.SliceLayout(0, x.type.layout))
    at = (row + i * stride)[:, None] * D + d[None, :]
    gl.store(out + at, x.to(out.dtype.element_ty), mask=(i < count)[:, None])


@gluon.jit
def _compute(
    q_smem, do_smem, norm_smem, delta_smem, token_smem, k_smem, v_smem, k_bar, bars,
    pairs, starts, item_lists, blocks, cu_seqlens, item_ends, split_ends, dk_split, dv_split,
    dk_out, dv_out, num_tokens, num_blocks, num_lists, item_pairs, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, NUM_SELECTED: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    list_id, head, document, first, list_start, start, end, pairs = _item(
        pairs, starts, item_lists, blocks, cu_seqlens, item_ends, num_tokens, num_blocks, num_lists,
        item_pairs, NUM_SELECTED,
    )  # fmt: skip
    if list_id >= 0:
        ROWS: gl.constexpr = QUERIES * GROUP
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
        p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
        key = first + gl.arange(0, KEYS, gl.SliceLayout(1, s_layout))
        dk = gl.zeros([KEYS, D], gl.float32, acc_layout)
        dv = gl.zeros([KEYS, D], gl.float32, acc_layout)
        scale_log2 = scale * LOG2E
        # As in selected_backward: the block's own queries lead its list.
        steps = gl.cdiv(gl.maximum(end - start, 0), QUERIES)
        masked = gl.cdiv(gl.maximum(gl.minimum(list_start + KEYS, end) - start, 0), QUERIES)
        mbarrier.wait(k_bar, 0)
        for i in range(0, masked):
            dk, dv = _step(
                i, dk, dv, k_smem, v_smem, q_smem, do_smem, norm_smem, delta_smem, token_smem, bars,
                key, scale_log2, ROWS, D, STAGES, True, s_layout, p_layout,
            )  # fmt: skip
        for i in range(masked, steps):
            dk, dv = _step(
                i, dk, dv, k_smem, v_smem, q_smem, do_smem, norm_smem, delta_smem, token_smem, bars,
                key, scale_log2, ROWS, D, STAGES, False, s_layout, p_layout,
            )  # fmt: skip
        before = gl.load(item_ends + list_id - 1, mask=list_id > 0, other=0)
        items_end = gl.load(item_ends + list_id)
        if items_end - before > 1:
            own = gl.load(split_ends + list_id) - items_end + gl.program_id(0)
            row = own.to(gl.int64) * KEYS
            _store(dk_split, dk, row, 1, KEYS, KEYS, D)
            _store(dv_split, dv, row, 1, KEYS, KEYS, D)
        else:
            row = first.to(gl.int64) * KV_HEADS + head
            count = gl.load(cu_seqlens + document + 1) - first
            _store(dk_out, dk * scale, row, KV_HEADS, count, KEYS, D)
            _store(dv_out, dv, row, KV_HEADS, count, KEYS, D)


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "num_lists", "item_pairs"])
def key_gradient_kernel(
    q_desc, do_desc, k_desc, v_desc, lse, delta, pairs, starts, item_lists, blocks, cu_seqlens,
    item_ends, split_ends, dk_split, dv_split, dk, dv, num_tokens, num_blocks, num_lists,
    item_pairs, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    NUM_SELECTED: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of one key block over one work item; all G heads of a query share a tile."""
    QUERIES: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, QUERIES, GROUP, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, QUERIES, GROUP, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [KEYS, D], v_desc.layout)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    norm_smem = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES * GROUP], row_layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES * GROUP], row_layout)
    token_smem = gl.allocate_shared_memory(gl.int32, [STAGES, QUERIES * GROUP], row_layout)
    k_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_bar, count=1)
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=2)
        mbarrier.init(bars.index(STAGES + i), count=1)
    gl.warp_specialize(
        [
            (_compute, (
                q_smem, do_smem, norm_smem, delta_smem, token_smem, k_smem, v_smem, k_bar, bars,
                pairs, starts, item_lists, blocks, cu_seqlens, item_ends, split_ends, dk_split,
                dv_split, dk, dv, num_tokens, num_blocks, num_lists, item_pairs, scale,
                KV_HEADS, GROUP, D, NUM_SELECTED, QUERIES, KEYS, STAGES,
            )),
            (_load, (
                q_desc, do_desc, k_desc, v_desc, lse, delta, q_smem, do_smem, norm_smem,
                delta_smem, token_smem, k_smem, v_smem, k_bar, bars, pairs, starts, item_lists,
                blocks, cu_seqlens, item_ends, num_tokens, num_blocks, num_lists, item_pairs,
                HEADS, GROUP, D, NUM_SELECTED, QUERIES, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
