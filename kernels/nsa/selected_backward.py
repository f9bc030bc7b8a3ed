"""Gradients of attention to the selected blocks (selected.py).

dK and dV are key-major: a program owns a key block and walks the queries that chose it (csr.py), so
nothing is added atomically and every run gives the same bits. Lists longer than a work item, such
as the initial block's, leave fp32 partial sums that a second kernel adds in order.
dQ is query-major over the unions of the forward when groups are large. With small groups the unions
are wide, and the key-major kernel has dS at hand: it leaves one partial row of dQ per pair instead.
Where dQ over unions is fast enough (on Hopper, in Gluon), the width decides, as in the forward.

With P = exp(S - lse):  dV = P^T dO,  dS = P * (dO V^T - sum(dO * O)),  dQ = dS K, dK = dS^T Q.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.nsa.csr import BlockLists, block_lists
from kernels.nsa.geometry import Geometry
from kernels.nsa.selected import LN2, Shape, load_rows
from kernels.nsa.tiles import tile_map

# Keys of a block whose partial sums one program adds: the initial block has many items.
JOIN_KEYS = 8


def selected_backward(
    do, q, k, v, lse, delta, indices, cu_seqlens, max_seqlen, geometry: Geometry, scale: float
):
    """Gradients dq, dk, dv of selected_forward in the inputs' dtypes; none reaches the indices.

    do [T, H, Dv], lse and delta = sum(dO * O), both fp32 [T, H], belong to the forward with the
    same indices [Hkv, T, n].
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not q.numel():
        return dq, dk, dv
    shape = Shape(q, k, v, geometry)
    lists = block_lists(indices, cu_seqlens, shape.block, shape.item_pairs())
    # Which KV heads get dQ from the key-major kernel: all, none, or those of a device's choice.
    fused = shape.may_be_key_major(q.shape[2])
    if not fused or shape.by_hand:
        # Two warpgroups of the Gluon kernel share a union.
        union = shape.unions(indices, cu_seqlens, 2 if shape.by_hand else 1)
        if fused:
            fused = shape.key_major(union)
            # Zeros for the fused heads, which the key-major kernel overwrites.
            union = union._replace(counts=union.counts * (1 - fused[:, None]))
        _query_gradient(do, q, k, v, lse, delta, dq, union, cu_seqlens, shape, scale)
    grads = (do, q, k, v, lse, delta, dq, dk, dv)
    _key_gradients(*grads, lists, indices, cu_seqlens, shape, scale, fused)
    return dq, dk, dv


def _query_gradient(do, q, k, v, lse, delta, dq, union, cu_seqlens, shape: Shape, scale):
    if shape.by_hand:
        from kernels.nsa import selected_hopper_query

        selected_hopper_query.query_gradient(
            do, q, k, v, lse, delta, dq, union, cu_seqlens, shape.constants, scale
        )
        return
    wide = shape.keys > 64 or shape.dim_pad > 128
    launch(
        _query_gradient_kernel, (union.tiles.shape[0], shape.kv_heads),
        do, q, shape.descriptor(k, shape.dim_pad), shape.descriptor(v, shape.value_pad), lse,
        delta, dq, union.tiles, union.key_rows, union.members, union.counts, cu_seqlens, scale,
        scale / LN2, **shape.constants,
        num_warps=8 if wide else 4,
        num_stages=shape.stages(shape.keys, 2 if shape.dim_pad > 64 else 3),
    )  # fmt: skip


def _key_gradients(
    do, q, k, v, lse, delta, dq, dk, dv, lists: BlockLists, indices, cu_seqlens, shape: Shape,
    scale, fused: bool | torch.Tensor,
):  # fmt: skip
    """dk and dv, and for the KV heads that are `fused` (all, none, int32 [Hkv]) dq as well."""
    dk_split = dk.new_empty(lists.split_items, shape.block, dk.shape[2], dtype=torch.float32)
    dv_split = dv.new_empty(lists.split_items, shape.block, dv.shape[2], dtype=torch.float32)
    num_blocks, num_lists = lists.blocks.shape[0], lists.item_ends.numel()
    ends = lists.item_ends, lists.split_ends
    common = (lists.blocks, cu_seqlens, *ends, dk_split, dv_split, dk, dv)
    inputs = do, q, k, v, lse, delta
    if shape.gathered and fused is False:
        from kernels.nsa import selected_hopper_key

        selected_hopper_key.key_gradients(*inputs, lists, common, shape.constants, scale)
    else:
        choice = fused if isinstance(fused, torch.Tensor) else None
        for with_dq in (False, True) if choice is not None else (fused,):
            _launch_key_gradients(
                *inputs, dq, lists, common, choice, indices, cu_seqlens, shape, scale, with_dq
            )
    launch(
        _join_kernel, (num_lists, cdiv(shape.block, JOIN_KEYS)),
        *common, num_blocks, scale, **shape.constants, JOIN_KEYS=JOIN_KEYS, num_warps=4,
    )  # fmt: skip


def _launch_key_gradients(
    do, q, k, v, lse, delta, dq, lists, common, choice, indices, cu_seqlens, shape, scale, with_dq
):
    """With dq, the KV heads take turns in one workspace."""
    k_desc, v_desc = shape.descriptor(k, shape.dim_pad), shape.descriptor(v, shape.value_pad)
    wide = shape.keys > 64 or shape.dim_pad > 128
    num_blocks, num_lists = lists.blocks.shape[0], lists.item_ends.numel()
    heads, partial = shape.kv_heads, None
    if with_dq:
        heads = shape.heads_at_once(q.shape[2])
        rows = heads * shape.tokens * shape.num_selected * shape.group
        partial = q.new_empty(rows, q.shape[2])
        sum_queries = max(shape.queries // 4, 1)
        sum_tiles = tile_map(cu_seqlens, shape.tokens, sum_queries)
        sum_constants = shape.constants | dict(
            QUERIES=sum_queries, ROWS=next_power_of_2(sum_queries * shape.group)
        )
    for head in range(0, shape.kv_heads, heads):
        end = min(head + heads, shape.kv_heads)
        launch(
            _key_gradient_kernel, (lists.item_lists.numel(),),
            do, q, k_desc, v_desc, lse, delta, partial, lists.pairs, lists.starts,
            lists.item_lists, *common, choice, head, end, shape.tokens, num_blocks, num_lists,
            lists.item_pairs, scale, scale / LN2, **shape.constants, HAS_PARTIAL=with_dq,
            CHOICE=choice is not None, num_warps=8 if wide else 4,
            # The third stage pays only beside small groups' shorter rows.
            num_stages=shape.stages(64, 3 if shape.group <= 4 else 2),
        )  # fmt: skip
        if with_dq:
            launch(
                _sum_query_gradient_kernel, (sum_tiles.shape[0], end - head),
                partial, indices, sum_tiles, cu_seqlens, choice, dq, head, shape.tokens,
                **sum_constants, CHOICE=choice is not None, num_warps=4,
            )  # fmt: skip


@triton.jit
def _query_gradient_kernel(
    do, q, k_desc, v_desc, lse, delta, dq, tiles, key_rows, members, counts, cu_seqlens, scale,
    scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries over the union of its blocks."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    row = tl.arange(0, ROWS)
    query = row // GROUP
    token = tl.load(cu_seqlens + document) + tl.load(tiles + 2 * tile + 1) + query
    valid = (query < QUERIES) & (token < tl.load(cu_seqlens + document + 1))
    q_row = token.to(tl.int64) * HEADS + head * GROUP + row % GROUP
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    key = tl.arange(0, KEYS)
    q_mask = valid[:, None] & (dk < DK)[None, :]
    o_mask = valid[:, None] & (dv < DV)[None, :]
    q_tile = tl.load(q + q_row[:, None] * DK + dk[None, :], mask=q_mask, other=0.0)
    do_tile = tl.load(do + q_row[:, None] * DV + dv[None, :], mask=o_mask, other=0.0)
    row_delta = tl.load(delta + q_row, mask=valid, other=0.0)
    lse_log2 = tl.load(lse + q_row, mask=valid, other=0.0) * 1.4426950408889634

    list_id = head * tl.num_programs(0) + tile
    key_rows += list_id.to(tl.int64) * (QUERIES * NUM_SELECTED)
    members += list_id.to(tl.int64) * (QUERIES * NUM_SELECTED)
    acc = tl.zeros([ROWS, DK_PAD], tl.float32)
    for i in range(0, tl.load(counts + list_id)):
        first = tl.load(key_rows + i)
        chose = (tl.load(members + i) >> query) & 1
        last = tl.where(chose != 0, token - first, -1)
        if KEYS != BLOCK:
            last = tl.minimum(last, BLOCK - 1)
        k_tile = k_desc.load([first, head * DK])
        v_tile = v_desc.load([first, head * DV])
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        dp = tl.dot(do_tile, v_tile.T, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        p = tl.where(key[None, :] <= last[:, None], p, 0.0)
        ds = (p * (dp - row_delta[:, None])).to(k_tile.dtype)
        acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
    acc = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + q_row[:, None] * DK + dk[None, :], acc, mask=q_mask)


@triton.jit
def _add_queries(
    do, q, lse, delta, partial, pairs, i, end, first, k_tile, v_tile, dk_acc, dv_acc, head,
    first_pair, scale, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, INT64: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries pairs[i : i + QUERIES] give to dK and dV of a block."""
    row = tl.arange(0, ROWS)
    query = row // GROUP
    dk_col = tl.arange(0, DK_PAD)
    key = tl.arange(0, KEYS)
    # Rows past the end read the last query and then count for nothing.
    valid = i + query < end
    if QUERIES * GROUP != ROWS:
        valid = valid & (query < QUERIES)
    pair = tl.load(pairs + tl.minimum(i + query, end - 1))
    token = pair // NUM_SELECTED
    q_row = token * HEADS + head * GROUP + row % GROUP
    q_tile = load_rows(q, q_row, DK, DK_PAD, INT64)
    do_tile = load_rows(do, q_row, DV, DV_PAD, INT64)
    lse_log2 = tl.load(lse + q_row) * 1.4426950408889634
    lse_log2 = tl.where(valid, lse_log2, float("inf"))
    row_delta = tl.load(delta + q_row)
    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")
    dp = tl.dot(v_tile, do_tile.T, input_precision="ieee")
    p = tl.exp2(s * scale_log2 - lse_log2[None, :])
    if MASKED:
        last = token - first
        if KEYS != BLOCK:
            last = tl.minimum(last, BLOCK - 1)
        p = tl.where(key[:, None] <= last[None, :], p, 0.0)
    dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
    ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
    dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision="ieee")
    if HAS_PARTIAL:
        dq_part = (tl.dot(ds.T, k_tile, input_precision="ieee") * scale).to(q_tile.dtype)
        out = (first_pair + pair) * GROUP + row % GROUP
        mask = valid[:, None] & (dk_col < DK)[None, :]
        tl.store(partial + out[:, None] * DK + dk_col[None, :], dq_part, mask=mask)
    return dk_acc, dv_acc


@triton.jit
def _key_gradient_kernel(
    do, q, k_desc, v_desc, lse, delta, partial, pairs, starts, item_lists, blocks, cu_seqlens,
    item_ends, split_ends, dk_split, dv_split, dk, dv, choice, first_head, end_head, num_tokens,
    num_blocks, num_lists, item_pairs, scale, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr, HAS_PARTIAL: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key block over one work item; all G heads of a query share a tile."""
    item = tl.program_id(0)
    list_id = tl.load(item_lists + item)
    if list_id >= num_lists:
        return
    head = list_id // num_blocks
    local_head = head - first_head
    if (head < first_head) | (head >= end_head):
        return
    if CHOICE:
        if (tl.load(choice + head) != 0) != HAS_PARTIAL:
            return
    block = list_id % num_blocks
    document = tl.load(blocks + 2 * block)
    if document < 0:
        return
    first = tl.load(cu_seqlens + document) + tl.load(blocks + 2 * block + 1)
    before = tl.load(item_ends + list_id - 1, mask=list_id > 0, other=0)
    starts += head * (num_blocks + 1) + block
    list_start = tl.load(starts)
    start = list_start + (item - before) * item_pairs
    end = tl.minimum(start + item_pairs, tl.load(starts + 1))
    head_pairs = tl.cast(num_tokens, tl.int64) * NUM_SELECTED
    pairs += head * head_pairs
    dk_col, dv_col = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    key = tl.arange(0, KEYS)
    k_tile = k_desc.load([first, head * DK])
    v_tile = v_desc.load([first, head * DV])
    dk_acc = tl.zeros([KEYS, DK_PAD], tl.float32)
    dv_acc = tl.zeros([KEYS, DV_PAD], tl.float32)
    # Queries ascend, so those inside the block, the only ones with keys in their future, come first
    # in the list and number at most BLOCK; they may fill several short items.
    masked_end = tl.maximum(tl.minimum(list_start + BLOCK, end), start)
    masked_end = start + tl.cdiv(masked_end - start, QUERIES) * QUERIES
    for i in range(start, masked_end, QUERIES):
        dk_acc, dv_acc = _add_queries(
            do, q, lse, delta, partial, pairs, i, end, first, k_tile, v_tile, dk_acc, dv_acc, head,
            local_head * head_pairs, scale, scale_log2, HEADS, GROUP, DK, DV, DK_PAD, DV_PAD,
            NUM_SELECTED, BLOCK, KEYS, QUERIES, ROWS, INT64, HAS_PARTIAL, True,
        )  # fmt: skip
    for i in range(masked_end, end, QUERIES):
        dk_acc, dv_acc = _add_queries(
            do, q, lse, delta, partial, pairs, i, end, first, k_tile, v_tile, dk_acc, dv_acc, head,
            local_head * head_pairs, scale, scale_log2, HEADS, GROUP, DK, DV, DK_PAD, DV_PAD,
            NUM_SELECTED, BLOCK, KEYS, QUERIES, ROWS, INT64, HAS_PARTIAL, KEYS != BLOCK,
        )  # fmt: skip

    split = tl.load(item_ends + list_id) - before > 1
    if split:
        # Partial sums keep the block's layout; rows past the document's end are never read.
        own = tl.load(split_ends + list_id) - tl.load(item_ends + list_id) + item
        out_row = own.to(tl.int64) * BLOCK + key
        in_block = key < BLOCK
        mask = in_block[:, None] & (dk_col < DK)[None, :]
        tl.store(dk_split + out_row[:, None] * DK + dk_col[None, :], dk_acc, mask=mask)
        mask = in_block[:, None] & (dv_col < DV)[None, :]
        tl.store(dv_split + out_row[:, None] * DV + dv_col[None, :], dv_acc, mask=mask)
    else:
        k_row = (first + key).to(tl.int64) * KV_HEADS + head
        in_block = (key < BLOCK) & (first + key < tl.load(cu_seqlens + document + 1))
        mask = in_block[:, None] & (dk_col < DK)[None, :]
        dk_out = (dk_acc * scale).to(dk.dtype.element_ty)
        tl.store(dk + k_row[:, None] * DK + dk_col[None, :], dk_out, mask=mask)
        mask = in_block[:, None] & (dv_col < DV)[None, :]
        dv_out = dv_acc.to(dv.dtype.element_ty)
        tl.store(dv + k_row[:, None] * DV + dv_col[None, :], dv_out, mask=mask)


@triton.jit
def _join_kernel(
    blocks, cu_seqlens, item_ends, split_ends, dk_split, dv_split, dk, dv, num_blocks, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr, JOIN_KEYS: tl.constexpr,
):  # fmt: skip
    """Add the partial dK and dV of JOIN_KEYS keys of a split list in the order of its items."""
    list_id = tl.program_id(0)
    before = tl.load(split_ends + list_id - 1, mask=list_id > 0, other=0)
    end = tl.load(split_ends + list_id)
    if before == end:
        return
    head = list_id // num_blocks
    block = list_id % num_blocks
    document = tl.load(blocks + 2 * block)
    first = tl.load(cu_seqlens + document) + tl.load(blocks + 2 * block + 1)
    key = tl.program_id(1) * JOIN_KEYS + tl.arange(0, JOIN_KEYS)
    dk_col, dv_col = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    in_block = (key < BLOCK) & (first + key < tl.load(cu_seqlens + document + 1))
    dk_mask = in_block[:, None] & (dk_col < DK)[None, :]
    dv_mask = in_block[:, None] & (dv_col < DV)[None, :]
    dk_acc = tl.zeros([JOIN_KEYS, DK_PAD], tl.float32)
    dv_acc = tl.zeros([JOIN_KEYS, DV_PAD], tl.float32)
    for i in range(before, end):
        row = (i * BLOCK + key).to(tl.int64)
        dk_acc += tl.load(dk_split + row[:, None] * DK + dk_col[None, :], mask=dk_mask, other=0.0)
        dv_acc += tl.load(dv_split + row[:, None] * DV + dv_col[None, :], mask=dv_mask, other=0.0)
    k_row = (first + key).to(tl.int64) * KV_HEADS + head
    dk_acc = (dk_acc * scale).to(dk.dtype.element_ty)
    tl.store(dk + k_row[:, None] * DK + dk_col[None, :], dk_acc, mask=dk_mask)
    dv_acc = dv_acc.to(dv.dtype.element_ty)
    tl.store(dv + k_row[:, None] * DV + dv_col[None, :], dv_acc, mask=dv_mask)


@triton.jit
def _sum_query_gradient_kernel(
    partial, indices, tiles, cu_seqlens, choice, dq, first_head, num_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries: the sum of the partial rows that its blocks left."""
    tile = tl.program_id(0)
    local_head = tl.program_id(1)
    head = first_head + local_head
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    if CHOICE:
        if tl.load(choice + head) == 0:
            return
    row = tl.arange(0, ROWS)
    query = row // GROUP
    position = tl.load(tiles + 2 * tile + 1) + query
    token = (tl.load(cu_seqlens + document) + position).to(tl.int64)
    valid = (query < QUERIES) & (token < tl.load(cu_seqlens + document + 1))
    dk_col = tl.arange(0, DK_PAD)
    pair = token * NUM_SELECTED
    head_pairs = tl.cast(num_tokens, tl.int64) * NUM_SELECTED
    indices += head * head_pairs
    source = (local_head * head_pairs + pair) * GROUP + row % GROUP
    acc = tl.zeros([ROWS, DK_PAD], tl.float32)
    for i in tl.static_range(NUM_SELECTED):
        block = tl.load(indices + pair + i, mask=valid, other=-1)
        chosen = (block >= 0) & (block <= position // BLOCK)
        mask = chosen[:, None] & (dk_col < DK)[None, :]
        part = tl.load(
            partial + (source + i * GROUP)[:, None] * DK + dk_col[None, :], mask=mask, other=0.0
        )
        acc += part.to(tl.float32)
    out = token * HEADS + head * GROUP + row % GROUP
    mask = valid[:, None] & (dk_col < DK)[None, :]
    tl.store(dq + out[:, None] * DK + dk_col[None, :], acc.to(dq.dtype.element_ty), mask=mask)
