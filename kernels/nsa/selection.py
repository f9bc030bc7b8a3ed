"""Importance of selection blocks from the compressed branch's softmax, and the n best (Eq. 8-12).

Two passes over a chunk of queries. `_scores` recomputes p_cmp = exp(S - lse), sums it over the
query heads of a KV head and folds the compressed blocks of each selection block into one number;
what reaches over into the next selection blocks is handed from step to step. `_top_blocks` picks.
Chunks keep the scores, the only memory that is quadratic in the sequence length, under a fixed
size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.nsa.flash_triton import (
    LOG2E,
    key_steps,
    key_tiles,
    load_keys,
    padded,
    visible,
)
from kernels.nsa.geometry import Geometry
from kernels.nsa.tiles import compressed_offsets, tile_map

SCORE_BYTES = 512 << 20
# Queries up to which one chunk serves all lengths; beyond, a chunk ends where the length of its
# rows has doubled, so that short rows are not searched at the width of long ones. A multiple of any
# tile's queries: a row has room for its chunk's positions.
FIRST_CHUNK = 16384
SIDE_BY_SIDE = tl.constexpr(4)  # heads of a group that `_scores` holds as rows of a product
TOP_WIDTH = 1024  # scores that one warp of `_top_blocks` searches


def select_blocks(q, k_cmp, lse, cu_seqlens, max_seqlen: int, geometry: Geometry, scale: float):
    """The n most important blocks of each token and KV head.

    q [T, H, Dk], k_cmp [C, Hkv, Dk] and lse [T, H] as compressed_forward takes and returns them.
    Returns int32 [Hkv, T, n]: document-relative block numbers in ascending order, -1 after the
    last. The initial and local blocks are always in; equal importance goes to the lower number.
    """
    tokens, heads, dim = q.shape
    kv_heads, n = k_cmp.shape[1], geometry.num_selected
    group = next_power_of_2(heads // kv_heads)
    rows, keys, warps, stages = _tile(q, k_cmp)
    ratio = geometry.select_block // geometry.compress_stride
    # Selection blocks past its own into which a compressed block reaches: no more than a step has.
    spill = cdiv(geometry.compress_block // geometry.compress_stride - 1, ratio)
    keys = max(keys, next_power_of_2(ratio) * next_power_of_2(max(spill, 1)))
    queries = max(rows // group, 1)

    indices = torch.empty(kv_heads, tokens, n, dtype=torch.int32, device=q.device)
    cu_keys = compressed_offsets(cu_seqlens, geometry)
    tiles = tile_map(cu_seqlens, tokens, queries)
    keys_desc = key_tiles(k_cmp, keys)
    for begin, end, blocks in _chunks(len(tiles), queries, max_seqlen, geometry, 4 * kv_heads):
        scores = torch.empty(
            kv_heads, (end - begin) * queries, blocks, dtype=torch.float32, device=q.device
        )
        launch(
            _scores, (end - begin, kv_heads),
            q, k_cmp, keys_desc, lse, scores,
            tiles[begin:], cu_seqlens, cu_keys, scale, blocks,
            H=heads, HKV=kv_heads, G=heads // kv_heads, GP=group,
            DK=dim, DKP=padded(dim), L=geometry.compress_block, STRIDE=geometry.compress_stride,
            SELECT=geometry.select_block, LOCAL=geometry.num_local, SPILL=spill,
            BQ=queries, BN=keys,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        width = next_power_of_2(blocks)
        top_warps = 1 if width <= TOP_WIDTH else 4
        launch(
            _top_blocks, ((end - begin) * queries, kv_heads),
            scores, indices, tiles[begin:], cu_seqlens, tokens, blocks,
            N=n, INITIAL=geometry.num_initial, LOCAL=geometry.num_local, WIDTH=width,
            SELECT=geometry.select_block, BQ=queries, GROUPS=min(128 * top_warps, width),
            num_warps=top_warps,
        )  # fmt: skip
    return indices


def _tile(q, k_cmp) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages of `_scores`.

    Measured on an H100 (Triton 3.6, bf16, 65,536 tokens): 4 warps were 1.5 to 2 times faster than
    8, whose two warpgroups run in lockstep, and 128 rows a little faster than 64. A third stage
    pays at dimension 64; at 128 it leaves room for two programs on a multiprocessor, not three.
    """
    if q.dtype == torch.float32:
        return 32, 32, 4, 1
    dim = padded(q.shape[2])
    return (64, 64, 4, 2) if dim > 128 else (128, 64, 4, 2 if dim == 128 else 3)


def _chunks(num_tiles: int, queries: int, max_seqlen: int, geometry: Geometry, score_bytes: int):
    """Yields (first tile, end tile, selection blocks its rows may have).

    A query of tile i has a position under (i + 1) * queries, whatever the documents are.
    """
    begin = 0
    while begin < num_tiles:
        reach = min(max_seqlen, max(2 * begin * queries, FIRST_CHUNK))
        end = num_tiles if reach == max_seqlen else max(reach // queries, begin + 1)
        end = min(end, num_tiles)
        blocks = cdiv(cdiv(reach, geometry.select_block), 16) * 16
        fit = max(SCORE_BYTES // (score_bytes * blocks * queries), 1)
        size = cdiv(end - begin, cdiv(end - begin, fit))
        for part in range(begin, end, size):
            yield part, min(part + size, end), blocks
        begin = end


@triton.jit
def _score_step(
    q, k_cmp, k_desc, norm, carry, n0, t, key0, count, h, out, blocks, scale,
    HKV: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, SPILL: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Importance of BN // RP selection blocks from n0 // R on, given the keys from n0 on.

    carry [BN // RP, BQ] is what earlier keys give to these blocks; returns what these and earlier
    keys give to the next step's. A query's heads must lie in the registers of one thread, to be
    summed there: as columns of the product they do when they are outermost. So do up to 4 as rows,
    see _scores, and then most of a block's keys do so too, whose sum is the costlier the smaller
    the group.
    """
    BJ: tl.constexpr = BN // RP
    if R == RP:
        n = n0 + tl.arange(0, BN)
        k = load_keys(k_desc, key0 + n0, h, BN, DK, DKP)
        there = n < count
    else:
        # R keys of each selection block and padding after them.
        i = tl.arange(0, BN)
        n = n0 + i // RP * R + i % RP
        there = (i % RP < R) & (n < count)
        d = tl.arange(0, DKP)
        at = ((key0 + n).to(tl.int64) * HKV + h)[:, None] * DK + d[None, :]
        k = tl.load(k_cmp + at, mask=there[:, None] & (d < DK)[None, :], other=0.0)
    if GP <= SIDE_BY_SIDE:
        s = tl.dot(q, k.T, input_precision="ieee").T
    else:
        s = tl.dot(k, q.T, input_precision="ieee")
    p = tl.exp2(s * scale - norm[None, :])
    if MASK:
        p = tl.where(visible(n[:, None], t[None, :], 0, STRIDE, L - 1, False), p, 0.0)
    if R != RP:
        p = tl.where(there[:, None], p, 0.0)
    if GP <= SIDE_BY_SIDE:
        HALVES: tl.constexpr = min(GP, 2)
        p = tl.sum(p.reshape(BN, GP // HALVES, BQ // 8, HALVES, 8), 3)
    else:
        p = p.reshape(BN, GP, BQ)
    p = tl.sum(p, 1).reshape(BJ, RP, BQ)
    j = tl.arange(0, BJ)[:, None]
    start = tl.arange(0, RP) * STRIDE
    total, carried = carry, tl.zeros_like(carry)
    for s in tl.static_range(SPILL + 1):
        shared = tl.minimum(start + L, (s + 1) * SELECT) - tl.maximum(start, s * SELECT)
        weight = (tl.maximum(shared, 0) // STRIDE).to(tl.float32)
        folded = tl.sum(p * weight[None, :, None], 1)
        if s == 0:
            total += folded
        else:
            # Down by s blocks; the last s come out on top, where the next step's first ones are.
            source = tl.broadcast_to((j + BJ - s) % BJ, BJ, BQ)
            folded = tl.gather(folded, source, 0)
            total += tl.where(j >= s, folded, 0.0)
            carried += tl.where(j < s, folded, 0.0)
    block = n0 // R + j
    tl.store(out[None, :] + block, total, mask=block < blocks)
    return carried


@triton.jit
def _scores(
    q, k_cmp, k_desc, lse, scores, tiles, cu_queries, cu_keys, scale, blocks,
    H: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, LOCAL: tl.constexpr,
    SPILL: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scores fp32 [Hkv, rows, blocks], written where a block competes for its query's choice."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    token0 = tl.load(cu_queries + document)
    length = tl.load(cu_queries + document + 1) - token0
    key0 = tl.load(cu_keys + document)
    count = tl.load(cu_keys + document + 1) - key0
    scale_log2 = scale * LOG2E

    r = tl.arange(0, GP * BQ)
    if GP <= SIDE_BY_SIDE:
        # One thread holds rows i, i + 8, i + 64 and i + 72 of a product.
        HALVES: tl.constexpr = min(GP, 2)
        g = r // (BQ * HALVES) * HALVES + r // 8 % HALVES
        t = first + r // (8 * HALVES) * 8 % BQ + r % 8
    else:
        g = r // BQ
        t = first + r % BQ
    ok = (t < length) & (g < G)
    row = (token0 + t).to(tl.int64) * H + h * G + g
    d = tl.arange(0, DKP)
    at = row[:, None] * DK + d[None, :]
    qt = tl.load(q + at, mask=ok[:, None] & (d < DK)[None, :], other=0.0)
    norm = tl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
    norm = tl.where(norm == float("-inf"), float("inf"), norm)

    num_rows = tl.num_programs(0) * BQ
    out_row = h.to(tl.int64) * num_rows + tile * BQ + tl.arange(0, BQ)
    out = scores + out_row * blocks

    R: tl.constexpr = SELECT // STRIDE
    RP: tl.constexpr = triton.next_power_of_2(R)
    STEP: tl.constexpr = BN // RP * R
    last = tl.minimum(first + BQ, length) - 1
    _, steps, _, full_end = key_steps(first, last, 0, STRIDE, L - 1, False, STEP)
    # A compressed block much longer than a selection block reaches blocks that have no keys yet.
    steps = tl.maximum(steps, tl.cdiv(last // SELECT - LOCAL + 1, BN // RP))
    carry = tl.zeros([BN // RP, BQ], tl.float32)
    for i in range(0, full_end):
        carry = _score_step(
            qt, k_cmp, k_desc, norm, carry, i * STEP, t, key0, count, h, out, blocks, scale_log2,
            HKV, GP, DK, DKP, L, STRIDE, SELECT, SPILL, BQ, BN, R, RP, False,
        )  # fmt: skip
    for i in range(full_end, steps):
        carry = _score_step(
            qt, k_cmp, k_desc, norm, carry, i * STEP, t, key0, count, h, out, blocks, scale_log2,
            HKV, GP, DK, DKP, L, STRIDE, SELECT, SPILL, BQ, BN, R, RP, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _top_blocks(
    scores, indices, tiles, cu_queries, num_tokens, blocks,
    N: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr,
    SELECT: tl.constexpr, BQ: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The chosen blocks of one query for one KV head."""
    out_row = tl.program_id(0)
    h = tl.program_id(1)
    tile = out_row // BQ
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    token0 = tl.load(cu_queries + document)
    length = tl.load(cu_queries + document + 1) - token0
    t = tl.load(tiles + 2 * tile + 1) + out_row % BQ
    if t >= length:
        return

    own = t // SELECT
    j = tl.arange(0, WIDTH)
    row = h.to(tl.int64) * tl.num_programs(0) + out_row
    # What was never written is loaded too, up to a multiple of 16, to keep the loads wide.
    limit = tl.minimum((own - LOCAL + 16) // 16 * 16, blocks)
    importance = tl.load(scores + row * blocks + j, mask=j < limit, other=0.0)
    # Non-negative floats order like the integers with the same bits, which reduce in one step.
    FORCED: tl.constexpr = 0x7FFFFFFF
    key = tl.where(j <= own, FORCED, -1)
    key = tl.where((j >= INITIAL) & (j <= own - LOCAL), importance.to(tl.int32, bitcast=True), key)

    # least: the lowest key to choose. It is at least as high as the best groups' lowest maximum,
    # and seldom higher: from there it is raised until no more than N blocks reach it.
    least = tl.full([], FORCED, tl.int32)
    group_max = tl.max(key.reshape(WIDTH // GROUPS, GROUPS), 0)
    for _ in tl.static_range(N - INITIAL - LOCAL):
        least = tl.max(tl.where(group_max < least, group_max, -1), 0)
    least = tl.maximum(least, 0)
    found = tl.sum((key >= least).to(tl.int32), 0)
    rising = found > N
    for _ in range(N, found):
        if rising:
            higher = tl.min(tl.where(key > least, key, FORCED), 0)
            reach = tl.sum((key >= higher).to(tl.int32), 0)
            rising = reach > N
            least = tl.where(reach >= N, higher, least)
            found = tl.where(reach >= N, reach, found)
    # Of equal ones the first are chosen.
    if found > N:
        rank = tl.cumsum((key == least).to(tl.int32), 0)
        count = tl.max(rank, 0)
        key = tl.where((key == least) & (rank > count - (found - N)), -1, key)

    # The chosen as bits of one word per lane: they are few, and a word's come out one by one.
    BITS: tl.constexpr = min(32, WIDTH)
    bit = tl.full([1], 1, tl.uint32) << (j % BITS).to(tl.uint32)
    word = tl.sum(tl.where(key >= least, bit, 0).reshape(WIDTH // BITS, BITS), 1)
    count = _num_bits(word)
    indices += (h.to(tl.int64) * num_tokens + token0 + t) * N
    slot = tl.cumsum(count, 0) - count
    first = tl.arange(0, WIDTH // BITS) * BITS
    for i in range(0, tl.max(count, 0)):
        rest = word & (word - 1)
        block = first + _num_bits((word ^ rest) - 1)
        tl.store(indices + slot + i, block, mask=word != 0)
        word = rest
    slot = tl.arange(0, triton.next_power_of_2(N))
    tl.store(indices + slot, -1, mask=(slot >= found) & (slot < N))


@triton.jit
def _num_bits(x):
    """How many bits of a uint32 are set, int32."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
