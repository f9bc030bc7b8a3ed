"""The flash kernels in portable Triton: forward, dQ, and dK/dV. See flash.py for the problem."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import TileView, launch, next_power_of_2
from kernels.nsa.gates import load_parts, merged
from kernels.nsa.tiles import tile_map

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ALIGN = tl.constexpr(4)  # fp32 numbers in the 16 bytes where a TMA copy may begin


class Tile(NamedTuple):
    """How a kernel cuts its work: `rows` (query, head) pairs by `keys` keys a step."""

    rows: int
    keys: int
    warps: int
    stages: int
    peel: bool = True  # run the steps that need no mask in a loop of their own


def sizes(q, k, v, keys) -> dict[str, int | bool]:
    """The compile-time sizes that all kernels share."""
    heads, dim = q.shape[1:]
    kv_heads, value_dim = k.shape[1], v.shape[2]
    return dict(
        H=heads,
        HKV=kv_heads,
        G=heads // kv_heads,
        GP=next_power_of_2(heads // kv_heads),
        DK=dim,
        DV=value_dim,
        STRIDE=keys.stride,
        OFFSET=keys.offset,
        WINDOWED=keys.window is not None,
    )


def padded(dim: int) -> int:
    """The width of a head dimension inside a tile."""
    return max(next_power_of_2(dim), 16)


def key_tiles(x: torch.Tensor, rows: int) -> TileView:
    """Tiles of `rows` keys of one head of x [N, Hkv, D], for load_keys."""
    dim = padded(x.shape[2])
    if dim == x.shape[2]:
        return TileView(x.flatten(1), (rows, dim))
    return TileView(x, (rows, 1, dim))


def _query_tiles(x: torch.Tensor, queries: int, group: int) -> TileView:
    """Tiles [queries, group, D] of x [T, H, D]."""
    return TileView(x, (queries, group, padded(x.shape[2])))


def forward(q, k, v, o, lse, merge, cu_seqlens, keys, tile: Tile, scale: float) -> None:
    """Fill o and lse, and what flash.flash_forward says of merge."""
    shape = sizes(q, k, v, keys)
    queries = max(tile.rows // shape["GP"], 1)
    work = tile_map(cu_seqlens, q.shape[0], queries)
    launch(
        _forward, (len(work), k.shape[1]),
        q, key_tiles(k, tile.keys), key_tiles(v, tile.keys), o, lse, *merge,
        work, cu_seqlens, keys.cu_keys, keys.window or 0, scale,
        **shape, DKP=padded(q.shape[2]), DVP=padded(v.shape[2]),
        BQ=queries, BN=tile.keys, PEEL=tile.peel, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def backward_dq(
    do, q, k, v, lse, delta, stats, dq, add: bool, cu_seqlens, keys, tile: Tile, scale: float
) -> None:
    """Fill dq, or add to it, and stats [2, Hkv, rows, GP] with lse in base 2 and delta.

    Rows of the statistics lie as stat_row says.
    """
    shape = sizes(q, k, v, keys)
    queries = max(tile.rows // shape["GP"], 1)
    work = tile_map(cu_seqlens, q.shape[0], queries)
    launch(
        _dq, (len(work), k.shape[1]),
        q, key_tiles(k, tile.keys), key_tiles(v, tile.keys), do, lse, delta, *stats, dq,
        work, cu_seqlens, keys.cu_keys, keys.window or 0, scale, stats.shape[2],
        **shape, DKP=padded(q.shape[2]), DVP=padded(v.shape[2]),
        BQ=queries, BN=tile.keys, PEEL=tile.peel, ADD=add, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def backward_dkv(
    do, q, k, v, stats, dk, dv, work, num_chunks, chunk, cu_seqlens, keys, tile: Tile, scale: float
) -> None:
    """Fill dk and dv, or for several chunks of queries their partials [num_chunks, ...]."""
    shape = sizes(q, k, v, keys)
    queries = max(tile.rows // shape["GP"], 1)
    launch(
        _dkv, (len(work), k.shape[1], num_chunks),
        _query_tiles(q, queries, shape["GP"]), k, v, _query_tiles(do, queries, shape["GP"]),
        *(TileView(x.view(-1), (queries * shape["GP"],)) for x in stats), dk, dv,
        work, cu_seqlens, keys.cu_keys, keys.window or 0, scale, chunk, stats.shape[2], k.shape[0],
        **shape, DKP=padded(q.shape[2]), DVP=padded(v.shape[2]),
        BQ=queries, BN=tile.keys, PEEL=tile.peel, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def load_keys(desc, row, h, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[ROWS, DP] from `row` on, columns past D zero."""
    if D == DP:
        return desc.load([row, h * D])
    else:
        return desc.load([row, h, 0]).reshape(ROWS, DP)


@triton.jit
def num_complete(t, STRIDE: tl.constexpr, OFFSET: tl.constexpr):
    """Keys that are complete at position t >= 0."""
    return tl.maximum(t - OFFSET + STRIDE, 0) // STRIDE


@triton.jit
def stat_row(document, token0, h, num_stats):
    """Where a document's rows begin in the per-row statistics [Hkv, num_stats, GP]: aligned."""
    return h * num_stats + (token0 // ALIGN + document) * ALIGN


@triton.jit
def visible(n, t, window, STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr):
    """Mask of keys n against positions t, which broadcast against each other."""
    seen = n < num_complete(t, STRIDE, OFFSET)
    if WINDOWED:
        seen = seen & (n > t - window)
    return seen


@triton.jit
def key_steps(
    first, last, window,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Steps of BN keys for the queries first..last: (first key, steps, first full, end of full).

    Full steps hold only keys that all these queries see.
    """
    begin = 0
    full_begin = 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0)
        full_begin = tl.cdiv(tl.maximum(last - window + 1, 0) - begin, BN)
    steps = tl.cdiv(tl.maximum(num_complete(last, STRIDE, OFFSET) - begin, 0), BN)
    full_end = tl.maximum(num_complete(first, STRIDE, OFFSET) - begin, 0) // BN
    return begin, steps, full_begin, tl.maximum(full_begin, full_end)


@triton.jit
def _softmax_step(
    q, k_desc, v_desc, m, l, acc, n0, t, key0, h, window, scale,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: q [M, DKP] against keys n0 .. n0 + BN - 1.

    m [M] is the running maximum of scale * logits in base 2, finite from the start so that a row
    that sees nothing meets no inf - inf.
    """
    k = load_keys(k_desc, key0 + n0, h, BN, DK, DKP)
    s = tl.dot(q, k.T, input_precision="ieee")
    if MASK:
        n = n0 + tl.arange(0, BN)
        seen = visible(n[None, :], t[:, None], window, STRIDE, OFFSET, WINDOWED)
        s = tl.where(seen, s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1) * scale)
    alpha = tl.exp2(m - new_m)
    p = tl.exp2(s * scale - new_m[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = load_keys(v_desc, key0 + n0, h, BN, DV, DVP)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return new_m, l, acc


@triton.jit(do_not_specialize=["window"])
def _forward(
    q, k_desc, v_desc, o, lse, gates, o_cmp, o_sel, out,
    tiles, cu_queries, cu_keys, window, scale,
    H: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    # Late tiles first: they see the most keys, and short ones fill the tail of the launch.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    token0 = tl.load(cu_queries + document)
    length = tl.load(cu_queries + document + 1) - token0
    key0 = tl.load(cu_keys + document)
    scale_log2 = scale * LOG2E

    M: tl.constexpr = BQ * GP
    r = tl.arange(0, M)
    t = first + r // GP
    ok = (t < length) & (r % GP < G)
    row = (token0 + t).to(tl.int64) * H + h * G + r % GP
    dk = tl.arange(0, DKP)
    dv = tl.arange(0, DVP)
    k_mask = ok[:, None] & (dk < DK)[None, :]
    qt = tl.load(q + row[:, None] * DK + dk[None, :], mask=k_mask, other=0.0)
    m = tl.full([M], -1.0e30, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)

    last = tl.minimum(first + BQ, length) - 1
    begin, steps, full_begin, full_end = key_steps(
        first, last, window, STRIDE, OFFSET, WINDOWED, BN
    )
    if PEEL:
        for i in range(0, steps - (full_end - full_begin)):
            n0 = begin + tl.where(i < full_begin, i, i + full_end - full_begin) * BN
            m, l, acc = _softmax_step(
                qt, k_desc, v_desc, m, l, acc, n0, t, key0, h, window, scale_log2,
                DK, DV, DKP, DVP, STRIDE, OFFSET, WINDOWED, BN, True,
            )  # fmt: skip
        for i in range(full_begin, full_end):
            m, l, acc = _softmax_step(
                qt, k_desc, v_desc, m, l, acc, begin + i * BN, t, key0, h, window, scale_log2,
                DK, DV, DKP, DVP, STRIDE, OFFSET, WINDOWED, BN, False,
            )  # fmt: skip
    else:
        for i in range(0, steps):
            m, l, acc = _softmax_step(
                qt, k_desc, v_desc, m, l, acc, begin + i * BN, t, key0, h, window, scale_log2,
                DK, DV, DKP, DVP, STRIDE, OFFSET, WINDOWED, BN, True,
            )  # fmt: skip

    some = l > 0
    l = tl.where(some, l, 1.0)
    acc = (acc / l[:, None]).to(o.dtype.element_ty)
    at = row[:, None] * DV + dv[None, :]
    keep = ok[:, None] & (dv < DV)[None, :]
    tl.store(o + at, acc, mask=keep)
    tl.store(lse + row, tl.where(some, (m + tl.log2(l)) * LN2, float("-inf")), mask=ok)
    if out is not None:
        total = merged(load_parts(gates, o_cmp, o_sel, row, ok, at, keep), acc)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _dq_step(
    q, do, k_desc, v_desc, lse, delta, acc, n0, t, key0, h, window, scale,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    k = load_keys(k_desc, key0 + n0, h, BN, DK, DKP)
    v = load_keys(v_desc, key0 + n0, h, BN, DV, DVP)
    s = tl.dot(q, k.T, input_precision="ieee")
    dp = tl.dot(do, v.T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASK:
        n = n0 + tl.arange(0, BN)
        seen = visible(n[None, :], t[:, None], window, STRIDE, OFFSET, WINDOWED)
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["window", "num_stats"])
def _dq(
    q, k_desc, v_desc, do, lse, delta, norms, deltas, dq,
    tiles, cu_queries, cu_keys, window, scale, num_stats,
    H: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PEEL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    token0 = tl.load(cu_queries + document)
    length = tl.load(cu_queries + document + 1) - token0
    key0 = tl.load(cu_keys + document)
    scale_log2 = scale * LOG2E

    M: tl.constexpr = BQ * GP
    r = tl.arange(0, M)
    t = first + r // GP
    ok = (t < length) & (r % GP < G)
    row = (token0 + t).to(tl.int64) * H + h * G + r % GP
    dk = tl.arange(0, DKP)
    dv = tl.arange(0, DVP)
    k_mask = ok[:, None] & (dk < DK)[None, :]
    v_mask = ok[:, None] & (dv < DV)[None, :]
    dot = tl.load(do + row[:, None] * DV + dv[None, :], mask=v_mask, other=0.0)
    dl = tl.load(delta + row, mask=ok, other=0.0)
    # A row that is not there, or sees nothing, has p = exp2(s - inf) = 0 without further masks.
    norm = tl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
    norm = tl.where(norm == float("-inf"), float("inf"), norm)
    # One pair of numbers per row, as dK/dV reads them: a tile's rows side by side.
    stat = (stat_row(document, token0, h, num_stats) + first) * GP + r
    tl.store(norms + stat, norm, mask=t < length)
    tl.store(deltas + stat, dl, mask=t < length)
    qt = tl.load(q + row[:, None] * DK + dk[None, :], mask=k_mask, other=0.0)
    acc = tl.zeros([M, DKP], tl.float32)

    last = tl.minimum(first + BQ, length) - 1
    begin, steps, full_begin, full_end = key_steps(
        first, last, window, STRIDE, OFFSET, WINDOWED, BN
    )
    if PEEL:
        for i in range(0, steps - (full_end - full_begin)):
            n0 = begin + tl.where(i < full_begin, i, i + full_end - full_begin) * BN
            acc = _dq_step(
                qt, dot, k_desc, v_desc, norm, dl, acc, n0, t, key0, h, window, scale_log2,
                DK, DV, DKP, DVP, STRIDE, OFFSET, WINDOWED, BN, True,
            )  # fmt: skip
        for i in range(full_begin, full_end):
            acc = _dq_step(
                qt, dot, k_desc, v_desc, norm, dl, acc, begin + i * BN, t, key0, h, window,
                scale_log2, DK, DV, DKP, DVP, STRIDE, OFFSET, WINDOWED, BN, False,
            )  # fmt: skip
    else:
        for i in range(0, steps):
            acc = _dq_step(
                qt, dot, k_desc, v_desc, norm, dl, acc, begin + i * BN, t, key0, h, window,
                scale_log2, DK, DV, DKP, DVP, STRIDE, OFFSET, WINDOWED, BN, True,
            )  # fmt: skip
    acc *= scale
    dq += row[:, None] * DK + dk[None, :]
    if ADD:
        acc += tl.load(dq, mask=k_mask, other=0.0).to(tl.float32)
    tl.store(dq, acc.to(dq.dtype.element_ty), mask=k_mask)


@triton.jit
def _dkv_step(
    q_desc, do_desc, norm_desc, delta_desc, k, v, dk, dv, t0, t_end, n, token0, stat0, h, window,
    scale, G: tl.constexpr, GP: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr,
    BQ: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the rows of queries t0 .. t0 + BQ - 1 (those before t_end) to dk, dv [BN, D].

    Logits are held transposed, [BN, rows], so that P^T and dS^T feed the next products from
    registers.
    """
    q = q_desc.load([token0 + t0, h * G, 0]).reshape(BQ * GP, DKP)
    do = do_desc.load([token0 + t0, h * G, 0]).reshape(BQ * GP, DVP)
    norm = norm_desc.load([(stat0 + t0) * GP])
    delta = delta_desc.load([(stat0 + t0) * GP])
    s = tl.dot(k, q.T, input_precision="ieee")
    dp = tl.dot(v, do.T, input_precision="ieee")
    if MASK:
        # Beyond t_end, the statistics are whatever lies in memory.
        t = t0 + tl.arange(0, BQ * GP) // GP
        norm = tl.where(t < t_end, norm, float("inf"))
        delta = tl.where(t < t_end, delta, 0.0)
    p = tl.exp2(s * scale - norm[None, :])
    if MASK:
        seen = visible(n[:, None], t[None, :], window, STRIDE, OFFSET, WINDOWED)
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window", "chunk", "num_stats", "num_keys"])
def _dkv(
    q_desc, k, v, do_desc, norm_desc, delta_desc, dk, dv,
    tiles, cu_queries, cu_keys, window, scale, chunk, num_stats, num_keys,
    H: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOWED: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """dK, dV of one tile of keys from the queries of one chunk."""
    tile = tl.program_id(0)  # early keys first: the most queries see them
    h = tl.program_id(1)
    c = tl.program_id(2)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    token0 = tl.load(cu_queries + document)
    length = tl.load(cu_queries + document + 1) - token0
    key0 = tl.load(cu_keys + document)
    count = tl.load(cu_keys + document + 1) - key0
    last = tl.minimum(first + BN, count) - 1
    scale_log2 = scale * LOG2E

    # Queries begin .. end-1 see some key of the tile, full .. full_end-1 all of them.
    begin = tl.maximum(first * STRIDE + OFFSET, c * chunk) // ALIGN * ALIGN
    end = tl.minimum(length, (c + 1) * chunk)
    if WINDOWED:
        end = tl.minimum(end, last + window)
    if begin >= end:
        return
    steps = tl.cdiv(end - begin, BQ)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(last * STRIDE + OFFSET - begin, 0), BQ), steps)
    full_end = end
    if WINDOWED:
        full_end = tl.minimum(end, first + window)
    full_end = tl.maximum(full_begin, tl.maximum(full_end - begin, 0) // BQ)
    stat0 = stat_row(document, token0, h, num_stats)

    n = first + tl.arange(0, BN)
    d = tl.arange(0, DKP)
    e = tl.arange(0, DVP)
    row = (key0 + n).to(tl.int64) * HKV + h
    k_mask = (n < count)[:, None] & (d < DK)[None, :]
    v_mask = (n < count)[:, None] & (e < DV)[None, :]
    # Not through a descriptor: outside a loop that would leave them in registers.
    kt = tl.load(k + row[:, None] * DK + d[None, :], mask=k_mask, other=0.0)
    vt = tl.load(v + row[:, None] * DV + e[None, :], mask=v_mask, other=0.0)
    dk_acc = tl.zeros([BN, DKP], tl.float32)
    dv_acc = tl.zeros([BN, DVP], tl.float32)
    if PEEL:
        for i in range(0, steps - (full_end - full_begin)):
            t0 = begin + tl.where(i < full_begin, i, i + full_end - full_begin) * BQ
            dk_acc, dv_acc = _dkv_step(
                q_desc, do_desc, norm_desc, delta_desc, kt, vt, dk_acc, dv_acc, t0, end, n, token0,
                stat0, h, window, scale_log2, G, GP, DKP, DVP, STRIDE, OFFSET, WINDOWED, BQ, True,
            )  # fmt: skip
        for i in range(full_begin, full_end):
            dk_acc, dv_acc = _dkv_step(
                q_desc, do_desc, norm_desc, delta_desc, kt, vt, dk_acc, dv_acc, begin + i * BQ, end,
                n, token0, stat0, h, window, scale_log2,
                G, GP, DKP, DVP, STRIDE, OFFSET, WINDOWED, BQ, False,
            )  # fmt: skip
    else:
        for i in range(0, steps):
            dk_acc, dv_acc = _dkv_step(
                q_desc, do_desc, norm_desc, delta_desc, kt, vt, dk_acc, dv_acc, begin + i * BQ, end,
                n, token0, stat0, h, window, scale_log2,
                G, GP, DKP, DVP, STRIDE, OFFSET, WINDOWED, BQ, True,
            )  # fmt: skip

    row += c.to(tl.int64) * num_keys * HKV
    dk_acc = (dk_acc * scale).to(dk.dtype.element_ty)
    tl.store(dk + row[:, None] * DK + d[None, :], dk_acc, mask=k_mask)
    dv_acc = dv_acc.to(dv.dtype.element_ty)
    tl.store(dv + row[:, None] * DV + e[None, :], dv_acc, mask=v_mask)
