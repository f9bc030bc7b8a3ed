"""Selected blocks seen from the queries: what a tile of neighbouring queries needs, as one list.

One query with G heads is a [G, D] operand, far too small for Hopper's matrix unit, and neighbouring
queries choose mostly the same blocks. A tile therefore walks the union of its queries' blocks, and
a bit mask per block says which of the queries chose it: each key block is loaded once per tile, and
the result is exactly that of the separate sets.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import launch, next_power_of_2
from kernels.nsa.tiles import tile_map

# Rows (queries x heads of a group) of one tile. 64 is the smallest M of wgmma; the work grows with
# the union, so 64 beat 128 and 256 rows at 85 % overlap on an H100.
TILE_ROWS = 64


class Union(NamedTuple):
    """Lists of a launch over tiles of `queries` neighbouring queries; NT tiles at most.

    tiles: int32 [NT, 2], see tiles.tile_map. key_rows: int32 [Hkv, NT, U], first key row of each
    block, ascending. members: int32 or int64 [Hkv, NT, U], bit i set when query i of the tile chose
    the block. counts: int32 [Hkv, NT], length of each list, 0 for unused tiles. steps: the same
    for tiles of `queries // parts`: the sum over a tile's parts of the blocks each of them needs.
    """

    tiles: torch.Tensor
    key_rows: torch.Tensor
    members: torch.Tensor
    counts: torch.Tensor
    steps: torch.Tensor
    queries: int


def tile_queries(group: int) -> int:
    """Queries of a tile for G heads per KV head: as many as fit TILE_ROWS rows, at least one."""
    return max(TILE_ROWS // group, 1)


def block_unions(
    indices: torch.Tensor, cu_seqlens: torch.Tensor, block: int, queries: int, parts: int = 1
) -> Union:
    """Unions of indices int32 [Hkv, T, n]: document-relative blocks of `block` tokens, -1 none.

    A tile holds `queries` queries, at most 64; with 2 parts the steps count its halves.
    """
    kv_heads, num_tokens, num_selected = indices.shape
    tiles = tile_map(cu_seqlens, num_tokens, queries)
    shape = (kv_heads, tiles.shape[0], queries * num_selected)
    key_rows = indices.new_empty(shape)
    members = indices.new_empty(shape, dtype=torch.int64 if queries > 32 else torch.int32)
    counts, steps = indices.new_empty(2, *shape[:2])
    slots = next_power_of_2(num_selected)
    padded = next_power_of_2(queries)
    launch(
        _union_kernel, shape[1::-1],
        indices, cu_seqlens, tiles, key_rows, members, counts, steps, num_tokens,
        NUM_SELECTED=num_selected, BLOCK=block, QUERIES=queries, PARTS=parts,
        PADDED=padded, SLOTS=slots,
        num_warps=min(max(padded * slots // 128, 1), 8),
    )  # fmt: skip
    return Union(tiles, key_rows, members, counts, steps, queries)


@triton.jit
def _merge_members(block_a, bits_a, block_b, bits_b):
    """Segmented OR: a run of equal blocks accumulates its members."""
    return block_b, tl.where(block_a == block_b, bits_a | bits_b, bits_b)


@triton.jit
def _union_kernel(
    indices, cu_seqlens, tiles, key_rows, members, counts, steps, num_tokens,
    NUM_SELECTED: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr,
    PADDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sort the tile's (block, query) pairs; the last of each run of equal blocks holds its mask."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    list_id = head * tl.num_programs(0) + tile
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        tl.store(counts + list_id, 0)
        tl.store(steps + list_id, 0)
        return
    SIZE: tl.constexpr = PADDED * SLOTS
    INVALID: tl.constexpr = 0x7FFFFFFF
    begin = tl.load(cu_seqlens + document)
    length = tl.load(cu_seqlens + document + 1) - begin
    i = tl.arange(0, SIZE)
    query, slot = i // SLOTS, i % SLOTS
    position = tl.load(tiles + 2 * tile + 1) + query
    valid = (query < QUERIES) & (slot < NUM_SELECTED) & (position < length)
    token = head.to(tl.int64) * num_tokens + begin + position
    block = tl.load(indices + token * NUM_SELECTED + slot, mask=valid, other=-1)
    valid = valid & (block >= 0) & (block <= position // BLOCK)
    key = tl.sort(tl.where(valid, block * PADDED + query, INVALID))

    block = key // PADDED
    bit = tl.full([SIZE], 1, members.dtype.element_ty) << (key % PADDED)
    valid = key != INVALID
    first = ((i == 0) | (block != tl.gather(block, tl.maximum(i - 1, 0), 0))) & valid
    last = ((i == SIZE - 1) | (block != tl.gather(block, tl.minimum(i + 1, SIZE - 1), 0))) & valid
    rank = tl.cumsum(first.to(tl.int32), 0) - 1
    block, bits = tl.associative_scan((block, bit), 0, _merge_members)
    out = list_id.to(tl.int64) * (QUERIES * NUM_SELECTED) + rank
    tl.store(key_rows + out, begin + block * BLOCK, mask=last)
    tl.store(members + out, bits, mask=last)
    tl.store(counts + list_id, tl.sum(first.to(tl.int32), 0))
    needs = last.to(tl.int32)
    if PARTS == 2:
        lower = (bits & ((1 << QUERIES // 2) - 1)) != 0
        needs = tl.where(last, lower.to(tl.int32) + (bits >> QUERIES // 2 != 0).to(tl.int32), 0)
    tl.store(steps + list_id, tl.sum(needs, 0))
