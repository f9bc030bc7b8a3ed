"""Selected blocks seen from the keys: for each key block, the queries that chose it.

The lists are compressed rows (CSR), built by histogram, scan and stable scatter: queries ascend in
every list, so sums over a list are the same in every run. Memory is linear in T.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.nsa.tiles import first_tiles, tile_map

# Pairs sorted at once. Larger sorts cost more per pair, smaller ones need more histograms.
_SORT = 1024
# Parts of the sequence that count and scatter independently; each owns one histogram over all
# blocks, so a fixed number keeps the memory linear in T.
_PARTS = 256
_COLUMNS = 16  # blocks whose parts one program sums


class BlockLists(NamedTuple):
    """Queries of each key block; NB key blocks at most, numbered through all documents.

    blocks: int32 [NB, 2], see tiles.tile_map. pairs: int32 [Hkv, T*n], the pair t*n + slot, where
    token t chose the block in column `slot` of its indices. starts: int32 [Hkv, NB + 1]: the list
    of block b of a head is pairs[head, starts[head, b] : starts[head, b + 1]], ascending.

    Lists are cut into work items of at most `item_pairs` pairs, so that no program has a hot list
    alone. item_lists: int32 [W], the list head*NB + block of each item, Hkv*NB for unused items.
    item_ends: int32 [Hkv*NB], items up to and including each list's; every list has at least one.
    split_ends: int32 [Hkv*NB], the same count over lists of two or more items: an item of a split
    list puts its partial sum into a row of its own, of which there are at most `split_items`.
    """

    blocks: torch.Tensor
    pairs: torch.Tensor
    starts: torch.Tensor
    item_lists: torch.Tensor
    item_ends: torch.Tensor
    split_ends: torch.Tensor
    item_pairs: int
    split_items: int


def block_lists(
    indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    block: int,
    item_pairs: int,
    choice: torch.Tensor | None = None,
) -> BlockLists:
    """CSR of indices int32 [Hkv, T, n] (document-relative blocks of `block` tokens, -1 = none).

    With a choice, int32 [Hkv], the lists of the KV heads where it is 0 are empty.
    Few launches: at the head of a backward the GPU waits for them.
    """
    kv_heads, num_tokens, num_selected = indices.shape
    blocks = tile_map(cu_seqlens, num_tokens, block)
    num_blocks = blocks.shape[0]
    first_block = first_tiles(cu_seqlens, block)
    slots = next_power_of_2(num_selected)
    queries = max(_SORT // slots, 1)
    tiles = tile_map(cu_seqlens, num_tokens, queries)
    part_tiles = cdiv(tiles.shape[0], _PARTS)
    parts = cdiv(tiles.shape[0], part_tiles)

    counts = indices.new_zeros(kv_heads, parts, num_blocks)
    starts = indices.new_empty(kv_heads, num_blocks + 1)
    pairs = indices.new_empty(kv_heads, num_tokens * num_selected)
    item_ends, split_ends = indices.new_empty(2, kv_heads * num_blocks)
    item_lists = indices.new_empty(kv_heads * num_blocks + pairs.numel() // item_pairs)
    sizes = dict(NUM_SELECTED=num_selected, BLOCK=block, QUERIES=queries, SLOTS=slots)
    args = (indices, choice, cu_seqlens, first_block, tiles, len(tiles), part_tiles, num_tokens)
    chosen = dict(CHOICE=choice is not None)
    grid = (parts, kv_heads)
    launch(_count_kernel, grid, *args, counts, num_blocks, **sizes, **chosen, num_warps=4)
    launch(
        _prefix_kernel, (cdiv(num_blocks, _COLUMNS), kv_heads),
        counts, starts, parts, num_blocks, PARTS=next_power_of_2(parts),
        COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    launch(
        _starts_kernel, (1,),
        starts, item_ends, split_ends, item_lists, kv_heads, num_blocks, item_pairs,
        item_lists.numel(), CHUNK=1024, num_warps=8,
    )  # fmt: skip
    launch(
        _scatter_kernel, grid,
        *args, counts, starts, pairs, num_blocks, **sizes, **chosen, num_warps=4,
    )  # fmt: skip
    # A list of more than item_pairs pairs has fewer than 2/item_pairs items per pair.
    split_items = max(2 * pairs.numel() // item_pairs, 1)
    return BlockLists(
        blocks, pairs, starts, item_lists, item_ends, split_ends, item_pairs, split_items
    )


@triton.jit
def _tile_pairs(
    indices, cu_seqlens, first_block, tiles, tile, head, num_tokens,
    NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The pairs of one tile as vectors [QUERIES * SLOTS]: global block, pair number, validity."""
    i = tl.arange(0, QUERIES * SLOTS)
    query, slot = i // SLOTS, i % SLOTS
    document = tl.load(tiles + 2 * tile)
    used = document >= 0
    begin = tl.load(cu_seqlens + document, mask=used, other=0)
    end = tl.load(cu_seqlens + document + 1, mask=used, other=0)
    position = tl.load(tiles + 2 * tile + 1) + query
    valid = (slot < NUM_SELECTED) & (begin + position < end)
    pair = (begin + position) * NUM_SELECTED + slot
    head_pairs = head.to(tl.int64) * num_tokens * NUM_SELECTED
    block = tl.load(indices + head_pairs + pair, mask=valid, other=-1)
    valid = valid & (block >= 0) & (block <= position // BLOCK)
    return block + tl.load(first_block + document, mask=used, other=0), pair, valid


@triton.jit
def _count_kernel(
    indices, choice, cu_seqlens, first_block, tiles, num_tiles, part_tiles, num_tokens, counts,
    num_blocks,
    NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    CHOICE: tl.constexpr,
):  # fmt: skip
    """Histogram of one part; the atomics add integers, so their order does not matter."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    if CHOICE:
        if tl.load(choice + head) == 0:
            return
    counts += (head * tl.num_programs(0) + part).to(tl.int64) * num_blocks
    for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, num_tiles)):
        block, _, valid = _tile_pairs(
            indices, cu_seqlens, first_block, tiles, tile, head, num_tokens,
            NUM_SELECTED, BLOCK, QUERIES, SLOTS,
        )  # fmt: skip
        tl.atomic_add(counts + block, 1, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["num_parts"])
def _prefix_kernel(
    counts, starts, num_parts, num_blocks, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Counts become the pairs of a block in earlier parts; starts[block + 1] all its pairs."""
    head = tl.program_id(1)
    part = tl.arange(0, PARTS)[:, None]
    block = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = counts + ((head * num_parts + part).to(tl.int64) * num_blocks + block[None, :])
    mask = (part < num_parts) & (block < num_blocks)[None, :]
    count = tl.load(at, mask=mask, other=0)
    tl.store(at, tl.cumsum(count, 0) - count, mask=mask)
    tl.store(
        starts + head * (num_blocks + 1) + block + 1, tl.sum(count, 0), mask=block < num_blocks
    )


@triton.jit(do_not_specialize=["num_heads", "item_pairs", "num_items"])
def _starts_kernel(
    starts, item_ends, split_ends, item_lists, num_heads, num_blocks, item_pairs, num_items,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums over all lists by one program: starts from sizes, and the work items."""
    lane = tl.arange(0, CHUNK)
    items_before = 0
    splits_before = 0
    for head in range(0, num_heads):
        pairs_before = 0
        row = starts + head * (num_blocks + 1)
        tl.store(row, 0)
        for i in range(0, num_blocks, CHUNK):
            ok = i + lane < num_blocks
            list_id = head * num_blocks + i + lane
            size = tl.load(row + 1 + i + lane, mask=ok, other=0)
            items = tl.where(ok, tl.maximum(tl.cdiv(size, item_pairs), 1), 0)
            splits = tl.where(items > 1, items, 0)
            end = items_before + tl.cumsum(items, 0)
            tl.store(row + 1 + i + lane, pairs_before + tl.cumsum(size, 0), mask=ok)
            tl.store(item_ends + list_id, end, mask=ok)
            tl.store(split_ends + list_id, splits_before + tl.cumsum(splits, 0), mask=ok)
            for item in range(0, tl.max(items)):
                tl.store(item_lists + end - items + item, list_id, mask=item < items)
            pairs_before += tl.sum(size, 0)
            items_before += tl.sum(items, 0)
            splits_before += tl.sum(splits, 0)
    for i in range(items_before, num_items, CHUNK):
        tl.store(item_lists + i + lane, num_heads * num_blocks, mask=i + lane < num_items)


@triton.jit
def _scatter_kernel(
    indices, choice, cu_seqlens, first_block, tiles, num_tiles, part_tiles, num_tokens, cursors,
    starts, pairs, num_blocks,
    NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    CHOICE: tl.constexpr,
):  # fmt: skip
    """Write one part's pairs to their lists; cursors are the places in a list that are taken."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    if CHOICE:
        if tl.load(choice + head) == 0:
            return
    SIZE: tl.constexpr = QUERIES * SLOTS
    INVALID: tl.constexpr = 0x7FFFFFFF
    i = tl.arange(0, SIZE)
    cursors += (head * tl.num_programs(0) + part).to(tl.int64) * num_blocks
    starts += head * (num_blocks + 1)
    pairs += head.to(tl.int64) * num_tokens * NUM_SELECTED
    for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, num_tiles)):
        block, pair, valid = _tile_pairs(
            indices, cu_seqlens, first_block, tiles, tile, head, num_tokens,
            NUM_SELECTED, BLOCK, QUERIES, SLOTS,
        )  # fmt: skip
        # Sorting block and place together keeps the order of the queries inside a block.
        key = tl.sort(tl.where(valid, block * SIZE + i, INVALID))
        valid = key != INVALID
        block = key // SIZE
        pair = tl.gather(pair, key % SIZE, 0)
        first = (i == 0) | (block != tl.gather(block, tl.maximum(i - 1, 0), 0))
        last = (i == SIZE - 1) | (block != tl.gather(block, tl.minimum(i + 1, SIZE - 1), 0))
        # The first pair of a run turns the cursor into an offset from the run's place in the sort.
        cursor = tl.load(cursors + block, mask=valid & first, other=0)
        tl.store(cursors + block, cursor - i, mask=valid & first)
        tl.debug_barrier()
        place = tl.load(cursors + block, mask=valid, other=0) + i
        tl.debug_barrier()
        start = tl.load(starts + block, mask=valid, other=0)
        tl.store(pairs + start + place, pair, mask=valid)
        tl.store(cursors + block, place + 1, mask=valid & last)
        tl.debug_barrier()
