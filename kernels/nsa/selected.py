"""Attention to the selected blocks (arXiv 2502.11089, section 3.3.2), forward.

Two ways to the same sums. Query-major: a tile of neighbouring queries walks the union of its blocks
(union.py); the work grows with the union, so it is best when neighbours choose alike. Key-major:
each key block meets the queries that chose it (csr.py) and leaves normalised partial outputs, which
a second kernel merges; its time does not depend on the choice, but it moves T*n*G partial rows.
With large groups query-major always wins. With small ones the size of the unions decides, on the
device, per KV head.

Shapes as in reference.py. The softmax runs in base 2: scale_log2 = scale * log2(e).
"""

import math

import torch
import triton
import triton.language as tl

from kernels.launch import TileView, launch, next_power_of_2
from kernels.nsa.csr import BlockLists, block_lists
from kernels.nsa.flash import on_hopper
from kernels.nsa.geometry import Geometry
from kernels.nsa.tiles import tile_map
from kernels.nsa.union import Union, block_unions, tile_queries

# Largest G for which key-major can win.
KEY_MAJOR_GROUP = 4
# Key-major once the unions hold this many times the blocks that one query of the tile has.
KEY_MAJOR_UNION = 3.8
# Bytes of partial rows at a time; KV heads beyond that take turns.
WORKSPACE = 1 << 30
# A single head may take more, up to this; beyond it unions are walked.
LARGEST_WORKSPACE = 4 << 30
SHARED_MEMORY = 200 << 10
LN2 = math.log(2)


def selected_forward(q, k, v, indices, cu_seqlens, max_seqlen, geometry: Geometry, scale: float):
    """Attention to the visible tokens of the selected blocks, indices int32 [Hkv, T, n].

    q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv]; bf16, fp16 or fp32. Returns o [T, H, Dv] in q's
    dtype and lse fp32 [T, H], natural log; a query without blocks gets o = 0, lse = -inf.
    """
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if not q.numel():
        return o, lse
    shape = Shape(q, k, v, geometry)
    union = shape.unions(indices, cu_seqlens)
    key_major = None
    if shape.may_be_key_major(v.shape[2]):
        key_major = shape.key_major(union)
    _union_forward(q, k, v, o, lse, union, key_major, cu_seqlens, shape, scale)
    if key_major is not None:
        lists = block_lists(indices, cu_seqlens, shape.block, shape.item_pairs(), key_major)
        _list_forward(q, k, v, o, lse, indices, lists, key_major, cu_seqlens, shape, scale)
    return o, lse


class Shape:
    """Sizes of one call, and the compile-time ones that every kernel of this branch takes."""

    def __init__(self, q, k, v, geometry: Geometry):
        self.tokens, self.heads, dim = q.shape
        self.kv_heads, value_dim = v.shape[1:]
        self.group = self.heads // self.kv_heads
        self.num_selected = geometry.num_selected
        self.block = geometry.select_block
        self.queries = tile_queries(self.group)
        self.keys = max(next_power_of_2(self.block), 16)
        self.dim_pad = max(next_power_of_2(dim), 16)
        self.value_pad = max(next_power_of_2(value_dim), 16)
        self.element = q.element_size()
        # What the Gluon kernels are written for.
        self.by_hand = (
            on_hopper(q, k)
            and self.element == 2
            and dim == value_dim == 128
            and self.block == 64
            and self.group in (4, 8, 16, 32, 64)
        )
        self.gathered = self.by_hand and self.group >= 8  # a swizzled tile has 8 rows at least
        self.constants = dict(
            HEADS=self.heads, KV_HEADS=self.kv_heads, GROUP=self.group, DK=dim, DV=value_dim,
            DK_PAD=self.dim_pad, DV_PAD=self.value_pad, NUM_SELECTED=self.num_selected,
            BLOCK=self.block, KEYS=self.keys, QUERIES=self.queries,
            ROWS=next_power_of_2(self.queries * self.group),
            INT64=self.tokens * self.heads * max(dim, value_dim) >= 1 << 31,  # costs registers
        )  # fmt: skip

    def unions(self, indices, cu_seqlens, parts: int = 1) -> Union:
        """Of 64 rows a part."""
        return block_unions(indices, cu_seqlens, self.block, parts * self.queries, parts)

    def partial_bytes(self, dim: int) -> int:
        """Bytes of one KV head's partial rows, one of `dim` for each (token, block, head)."""
        return self.tokens * self.num_selected * self.group * dim * self.element

    def may_be_key_major(self, dim: int) -> bool:
        return self.group <= KEY_MAJOR_GROUP and self.partial_bytes(dim) <= LARGEST_WORKSPACE

    def key_major(self, union: Union) -> torch.Tensor:
        """int32 [Hkv], 1 for the KV heads whose unions are too wide for tiles of queries."""
        blocks = union.steps.sum(1) * self.queries
        return (blocks > KEY_MAJOR_UNION * self.tokens * self.num_selected).int()

    def heads_at_once(self, dim: int) -> int:
        return min(max(WORKSPACE // self.partial_bytes(dim), 1), self.kv_heads)

    def item_pairs(self) -> int:
        """Pairs per work item: about eight per multiprocessor, so that none is a straggler."""
        pairs = self.kv_heads * self.tokens * self.num_selected
        return max(next_power_of_2(pairs // 1024), 16 * self.queries)

    def descriptor(self, x: torch.Tensor, pad: int) -> TileView:
        """Blocks [KEYS, pad] of x [T, Hkv, D]; columns past D are other heads' and meet zeros."""
        return TileView(x.view(x.shape[0], -1), (self.keys, pad))

    def stages(self, rows: int, wanted: int) -> int:
        """Pipeline depth that fits shared memory beside the resident operands."""
        if self.element > 2:
            return 1
        width = (self.dim_pad + self.value_pad) * self.element
        return max(min(wanted, (SHARED_MEMORY - 64 * width) // (rows * width)), 1)


def _union_forward(q, k, v, o, lse, union: Union, key_major, cu_seqlens, shape: Shape, scale):
    if shape.by_hand:
        from kernels.nsa import selected_hopper_forward

        if key_major is not None:  # zeros, which the key-major kernels overwrite
            union = union._replace(counts=union.counts * (1 - key_major[:, None]))
        selected_hopper_forward.forward(q, k, v, o, lse, union, cu_seqlens, shape.constants, scale)
        return
    launch(
        _union_forward_kernel, (union.tiles.shape[0], shape.kv_heads),
        q, shape.descriptor(k, shape.dim_pad), shape.descriptor(v, shape.value_pad), o, lse,
        union.tiles, union.key_rows, union.members, union.counts, cu_seqlens, key_major,
        scale / LN2, **shape.constants, HAS_KEY_MAJOR=key_major is not None,
        # Narrow heads leave room for another program, which beats a third stage.
        num_warps=4, num_stages=shape.stages(shape.keys, 3 if shape.dim_pad > 64 else 2),
    )  # fmt: skip


def _list_forward(
    q, k, v, o, lse, indices, lists: BlockLists, key_major, cu_seqlens, shape: Shape, scale
):
    heads = shape.heads_at_once(v.shape[2])
    rows = heads * shape.tokens * shape.num_selected * shape.group
    partial = q.new_empty(rows, v.shape[2])
    partial_lse = q.new_empty(rows, dtype=torch.float32)
    merge_queries = max(tile_queries(shape.group) // 4, 1)
    merge_tiles = tile_map(cu_seqlens, shape.tokens, merge_queries)
    k_desc, v_desc = shape.descriptor(k, shape.dim_pad), shape.descriptor(v, shape.value_pad)
    merge_constants = shape.constants | dict(
        QUERIES=merge_queries, ROWS=next_power_of_2(merge_queries * shape.group)
    )
    for head in range(0, shape.kv_heads, heads):
        end = min(head + heads, shape.kv_heads)
        launch(
            _list_forward_kernel, (lists.item_lists.numel(),),
            q, k_desc, v_desc, partial, partial_lse, lists.blocks, lists.pairs, lists.starts,
            lists.item_lists, lists.item_ends, cu_seqlens, key_major, head, end, shape.tokens,
            lists.blocks.shape[0], lists.item_ends.numel(), lists.item_pairs, scale / LN2,
            **shape.constants, num_warps=4, num_stages=shape.stages(64, 3),
        )  # fmt: skip
        launch(
            _merge_kernel, (merge_tiles.shape[0], end - head),
            partial, partial_lse, indices, merge_tiles, cu_seqlens, key_major, o, lse, head,
            shape.tokens, **merge_constants, num_warps=4,
        )  # fmt: skip


@triton.jit
def load_rows(x, row, WIDTH: tl.constexpr, PAD: tl.constexpr, INT64: tl.constexpr):
    """Rows of x [R, WIDTH] as [len(row), PAD], zero past WIDTH."""
    column = tl.arange(0, PAD)
    if INT64:
        row = row.to(tl.int64)
    pointers = x + (row[:, None] * WIDTH + column[None, :])
    if WIDTH == PAD:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def _union_forward_kernel(
    q, k_desc, v_desc, o, lse, tiles, key_rows, members, counts, cu_seqlens, key_major, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr, HAS_KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """One tile of QUERIES queries x GROUP heads against the union of its blocks."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    if HAS_KEY_MAJOR:
        if tl.load(key_major + head) != 0:
            return
    row = tl.arange(0, ROWS)
    query = row // GROUP
    token = tl.load(cu_seqlens + document) + tl.load(tiles + 2 * tile + 1) + query
    valid = (query < QUERIES) & (token < tl.load(cu_seqlens + document + 1))
    q_row = token.to(tl.int64) * HEADS + head * GROUP + row % GROUP
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    key = tl.arange(0, KEYS)
    mask = valid[:, None] & (dk < DK)[None, :]
    q_tile = tl.load(q + q_row[:, None] * DK + dk[None, :], mask=mask, other=0.0)

    list_id = head * tl.num_programs(0) + tile
    key_rows += list_id.to(tl.int64) * (QUERIES * NUM_SELECTED)
    members += list_id.to(tl.int64) * (QUERIES * NUM_SELECTED)
    # A finite start keeps rows that have seen nothing free of inf - inf.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for i in range(0, tl.load(counts + list_id)):
        first = tl.load(key_rows + i)
        chose = (tl.load(members + i) >> query) & 1
        last = tl.where(chose != 0, token - first, -1)
        if KEYS != BLOCK:
            last = tl.minimum(last, BLOCK - 1)
        k_tile = k_desc.load([first, head * DK])
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        decay = tl.exp2((peak - new_peak) * scale_log2)
        p = tl.exp2(s * scale_log2 - (new_peak * scale_log2)[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v_tile = v_desc.load([first, head * DV])
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        peak = new_peak
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    mask = valid[:, None] & (dv < DV)[None, :]
    tl.store(o + q_row[:, None] * DV + dv[None, :], acc.to(o.dtype.element_ty), mask=mask)
    natural = (peak * scale_log2 + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    tl.store(lse + q_row, tl.where(empty, float("-inf"), natural), mask=valid)


@triton.jit
def _list_forward_kernel(
    q, k_desc, v_desc, partial, partial_lse, blocks, pairs, starts, item_lists, item_ends,
    cu_seqlens, key_major, first_head, end_head, num_tokens, num_blocks, num_lists, item_pairs,
    scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """One key block against the queries of a work item; a partial softmax row for every pair."""
    item = tl.program_id(0)
    list_id = tl.load(item_lists + item)
    if list_id >= num_lists:
        return
    head = list_id // num_blocks
    local_head = head - first_head
    if (head < first_head) | (head >= end_head):
        return
    block = list_id % num_blocks
    document = tl.load(blocks + 2 * block)
    if document < 0:
        return
    if tl.load(key_major + head) == 0:
        return
    first = tl.load(cu_seqlens + document) + tl.load(blocks + 2 * block + 1)
    before = tl.load(item_ends + list_id - 1, mask=list_id > 0, other=0)
    starts += head * (num_blocks + 1) + block
    start = tl.load(starts) + (item - before) * item_pairs
    end = tl.minimum(start + item_pairs, tl.load(starts + 1))
    head_pairs = tl.cast(num_tokens, tl.int64) * NUM_SELECTED
    pairs += head * head_pairs
    row = tl.arange(0, ROWS)
    dv = tl.arange(0, DV_PAD)
    key = tl.arange(0, KEYS)
    k_tile = k_desc.load([first, head * DK])
    v_tile = v_desc.load([first, head * DV])
    for i in range(start, end, QUERIES):
        # Rows past the end read the last query and are not stored.
        valid = i + row // GROUP < end
        if QUERIES * GROUP != ROWS:
            valid = valid & (row // GROUP < QUERIES)
        pair = tl.load(pairs + tl.minimum(i + row // GROUP, end - 1))
        token = pair // NUM_SELECTED
        q_tile = load_rows(q, token * HEADS + head * GROUP + row % GROUP, DK, DK_PAD, INT64)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        last = token - first
        if KEYS != BLOCK:
            last = tl.minimum(last, BLOCK - 1)
        s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        # Every pair sees at least the block's first key, so the maximum is finite.
        peak = tl.max(s, 1)
        p = tl.exp2(s * scale_log2 - (peak * scale_log2)[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee") / total[:, None]
        out = (local_head * head_pairs + pair) * GROUP + row % GROUP
        mask = valid[:, None] & (dv < DV)[None, :]
        acc = acc.to(partial.dtype.element_ty)
        tl.store(partial + out[:, None] * DV + dv[None, :], acc, mask=mask)
        tl.store(partial_lse + out, peak * scale_log2 + tl.log2(total), mask=valid)


@triton.jit
def _merge_kernel(
    partial, partial_lse, indices, tiles, cu_seqlens, key_major, o, lse, first_head, num_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, NUM_SELECTED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """Join the partial rows of each query by their log-sum-exp."""
    tile = tl.program_id(0)
    local_head = tl.program_id(1)
    head = first_head + local_head
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    if tl.load(key_major + head) == 0:
        return
    row = tl.arange(0, ROWS)
    query = row // GROUP
    position = tl.load(tiles + 2 * tile + 1) + query
    begin = tl.load(cu_seqlens + document)
    token = (begin + position).to(tl.int64)
    valid = (query < QUERIES) & (token < tl.load(cu_seqlens + document + 1))
    dv = tl.arange(0, DV_PAD)
    pair = token * NUM_SELECTED
    head_pairs = tl.cast(num_tokens, tl.int64) * NUM_SELECTED
    indices += head * head_pairs
    source = (local_head * head_pairs + pair) * GROUP + row % GROUP
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for i in tl.static_range(NUM_SELECTED):
        block = tl.load(indices + pair + i, mask=valid, other=-1)
        chosen = (block >= 0) & (block <= position // BLOCK)
        part_lse = tl.load(partial_lse + source + i * GROUP, mask=chosen, other=-1e30)
        mask = chosen[:, None] & (dv < DV)[None, :]
        part = tl.load(
            partial + (source + i * GROUP)[:, None] * DV + dv[None, :], mask=mask, other=0.0
        )
        new_peak = tl.maximum(peak, part_lse)
        decay = tl.exp2(peak - new_peak)
        weight = tl.where(chosen, tl.exp2(part_lse - new_peak), 0.0)
        total = total * decay + weight
        acc = acc * decay[:, None] + part.to(tl.float32) * weight[:, None]
        peak = new_peak
    empty = total == 0.0
    out = token * HEADS + head * GROUP + row % GROUP
    acc = (acc / tl.where(empty, 1.0, total)[:, None]).to(o.dtype.element_ty)
    mask = valid[:, None] & (dv < DV)[None, :]
    tl.store(o + out[:, None] * DV + dv[None, :], acc, mask=mask)
    natural = (peak + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    tl.store(lse + out, tl.where(empty, float("-inf"), natural), mask=valid)
