"""Selected blocks seen from the keys: for each key block, the queries that chose it.

The lists are compressed rows (CSR), built by histogram, scan and stable scatter: queries ascend in
every list, so sums over a list are the same in every run. Memory is linear in T.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.nsa.tiles import tile_map

# Pairs sorted at once. Larger sorts cost more per pair, smaller ones need more histograms.
_SORT = 1024
# Parts of the sequence that count and scatter independently; each owns one histogram over all
# blocks, so a fixed number keeps the memory linear in T.
_PARTS = 256


class BlockLists(NamedTuple):
    """Queries of each key block; NB key blocks at most, numbered through all documents.

    blocks: int32 [NB, 2], see tiles.tile_map. pairs: int32 [Hkv, T*n], the pair t*n + slot, where
    token t chose the block in column `slot` of its indices. starts: int32 [Hkv, NB + 1]: the list
    of block b of a head is pairs[head, starts[head, b] : starts[head, b + 1]], ascending.
    """

    blocks: torch.Tensor
    pairs: torch.Tensor
    starts: torch.Tensor


class WorkItems(NamedTuple):
    """Lists cut into items of at most `length` pairs, so that no program has a hot list alone.

    lists: int32 [W], the list head*NB + block of each item, Hkv*NB for unused items. ends: int32
    [Hkv*NB], items up to and including each list's; every list has at least one.
    split_ends: int32 [Hkv*NB], the same count over lists of two or more items: an item of a split
    list puts its partial sum into a row of its own, of which there are at most `split_items`.
    """

    lists: torch.Tensor
    ends: torch.Tensor
    split_ends: torch.Tensor
    length: int
    split_items: int


def block_lists(indices: torch.Tensor, cu_seqlens: torch.Tensor, block: int) -> BlockLists:
    """CSR of indices int32 [Hkv, T, n] (document-relative blocks of `block` tokens, -1 = none)."""
    kv_heads, num_tokens, num_selected = indices.shape
    blocks = tile_map(cu_seqlens, num_tokens, block)
    num_blocks = blocks.shape[0]
    per_document = (cu_seqlens.diff() + block - 1) // block
    first_block = per_document.cumsum(0, dtype=torch.int32) - per_document
    slots = triton.next_power_of_2(num_selected)
    queries = max(_SORT // slots, 1)
    tiles = tile_map(cu_seqlens, num_tokens, queries)
    part_tiles = triton.cdiv(tiles.shape[0], _PARTS)
    parts = triton.cdiv(tiles.shape[0], part_tiles)

    counts = indices.new_zeros(kv_heads, parts, num_blocks)
    pairs = indices.new_empty(kv_heads, num_tokens * num_selected)
    sizes = dict(NUM_SELECTED=num_selected, BLOCK=block, QUERIES=queries, SLOTS=slots)
    args = (indices, cu_seqlens, first_block, tiles, tiles.shape[0], part_tiles, num_tokens)
    grid = (parts, kv_heads)
    _count_kernel[grid](*args, counts, num_blocks, **sizes, num_warps=4)
    ends = counts.cumsum(1, dtype=torch.int32)
    starts = torch.nn.functional.pad(ends[:, -1].cumsum(1, dtype=torch.int32), (1, 0))
    cursors = ends.sub_(counts).add_(starts[:, None, :-1])
    _scatter_kernel[grid](*args, cursors, pairs, num_blocks, **sizes, num_warps=4)
    return BlockLists(blocks, pairs, starts)


def work_items(lists: BlockLists, length: int) -> WorkItems:
    """Cut all lists into items of at most `length` pairs."""
    sizes = lists.starts.diff().flatten()
    total = lists.pairs.numel()
    items = ((sizes + length - 1) // length).clamp_(min=1)
    ends = items.cumsum(0, dtype=torch.int32)
    split_ends = torch.where(items > 1, items, 0).cumsum(0, dtype=torch.int32)
    numbers = torch.arange(sizes.numel() + total // length, dtype=torch.int32, device=sizes.device)
    of_item = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    # A list of more than `length` pairs has fewer than 2/length items per pair.
    return WorkItems(of_item, ends, split_ends, length, max(2 * total // length, 1))


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
    indices, cu_seqlens, first_block, tiles, num_tiles, part_tiles, num_tokens, counts, num_blocks,
    NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Histogram of one part; the atomics add integers, so their order does not matter."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    counts += (head * tl.num_programs(0) + part).to(tl.int64) * num_blocks
    for tile in range(part * part_tiles, tl.minimum((part + 1) * part_tiles, num_tiles)):
        block, _, valid = _tile_pairs(
            indices, cu_seqlens, first_block, tiles, tile, head, num_tokens,
            NUM_SELECTED, BLOCK, QUERIES, SLOTS,
        )  # fmt: skip
        tl.atomic_add(counts + block, 1, mask=valid, sem="relaxed")


@triton.jit
def _scatter_kernel(
    indices, cu_seqlens, first_block, tiles, num_tiles, part_tiles, num_tokens, cursors, pairs,
    num_blocks,
    NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Write one part's pairs to their lists; cursors are where the part's pairs of a block go."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    SIZE: tl.constexpr = QUERIES * SLOTS
    INVALID: tl.constexpr = 0x7FFFFFFF
    i = tl.arange(0, SIZE)
    cursors += (head * tl.num_programs(0) + part).to(tl.int64) * num_blocks
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
        tl.store(pairs + place, pair, mask=valid)
        tl.store(cursors + block, place + 1, mask=valid & last)
        tl.debug_barrier()
