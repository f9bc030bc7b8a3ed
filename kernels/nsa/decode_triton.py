"""One decode step in Triton: one new query per sequence against its caches.

A single query leaves a GPU idle unless its keys are split over many programs (flash decoding).
Four launches, sized by the caches' capacity and never by the lengths, which stay on the device, so
that a step can be captured in a CUDA graph and replayed while the sequences grow:

1. logits of the compressed keys, with the peak and the sum of every part of that cache;
2. rank: importance of a chunk of selection blocks from those logits, and the chunk's best n;
3. values: a program for each selected block, which finds its block among the chunks' best; beside
   them, since they need no selection, the window and the values of the compressed cache;
4. merge: the parts of each branch by their log-sum-exp, then the branches by their gates.

Each launch after the first is ready before its predecessor ends (programmatic dependent launch,
Hopper and later). Logits and peaks are in base 2: exp2(x * scale * log2(e)).
"""

import math

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.nsa.geometry import Geometry

# Programs that read a cache: enough to fill the machine; every part more is another partial sum to
# merge.
PROGRAMS = 256
MAX_PARTS = 32
# Rows that one program reads in a step, and steps in flight.
STEP = 64
STAGES = 3
# Ranking compares all pairs of a chunk, then all pairs of the chunks' best, so many at a time.
MAX_CHUNK = 256
PAIRS = 128 * 128
# Value columns per merging program, which is one warp: its sums over the parts need no barrier.
MERGE_COLUMNS = 32


def decode_step(
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, lengths, geometry: Geometry, scale: float
):  # fmt: skip
    """See kernels.nsa.decode.nsa_decode."""
    batch, heads, dim = q.shape
    rows, kv_heads, value_dim = v_cmp.shape[1:]
    tokens, n, sequences = k_sel.shape[1], geometry.num_selected, batch * kv_heads
    scale_log2 = scale / math.log(2)
    pdl = _launches_early(q)

    cmp_rows, cmp_parts = _split(rows, sequences)
    win_rows, win_parts = _split(geometry.window, sequences)
    parts = cmp_parts + win_parts + n
    blocks = cdiv(tokens, geometry.select_block)
    keep = next_power_of_2(n)
    chunk = next_power_of_2(max(keep, min(math.isqrt(keep * blocks), MAX_CHUNK)))
    chunks = cdiv(blocks, chunk)
    candidates = next_power_of_2(chunks * keep)

    logits = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    best = torch.empty(batch, kv_heads, chunks * keep, dtype=torch.int64, device=q.device)
    sums = _empty_sums(batch, heads, parts, value_dim, q.device)
    out = q.new_empty(batch, heads, value_dim)
    sizes, early = _sizes(heads, kv_heads, dim, value_dim), dict(PDL=pdl, launch_pdl=pdl)
    cut = dict(CMP_BLOCK=geometry.compress_block, CMP_STRIDE=geometry.compress_stride)
    launch(
        _logits_kernel, (cmp_parts, sequences),
        q, k_cmp, lengths, logits, *sums[1:], rows, parts, cmp_rows, scale_log2,
        **sizes, **cut, STEP=STEP, num_warps=4, num_stages=STAGES, **early,
    )  # fmt: skip
    launch(
        _rank_kernel, (chunks, sequences),
        logits, lengths, *sums[1:], best, rows, parts, cmp_parts, chunks,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        ROWS=next_power_of_2(heads // kv_heads), PARTS=next_power_of_2(cmp_parts),
        RATIO=next_power_of_2(geometry.select_block // geometry.compress_stride),
        **cut, BLOCK=geometry.select_block, NUM_INITIAL=geometry.num_initial,
        NUM_LOCAL=geometry.num_local, CHUNK=chunk, KEEP=keep,
        num_warps=8 if sequences < 32 else 4,  # few programs: the shortest way through one
        **early,
    )  # fmt: skip
    launch(
        _values_kernel, (parts, sequences),
        q, v_cmp, k_sel, v_sel, k_win, v_win, lengths, logits, best, *sums, rows, tokens, parts,
        cmp_parts, cmp_rows, win_parts, win_rows, geometry.window, chunks * keep, scale_log2,
        **sizes, **cut, BLOCK=geometry.select_block,
        BLOCK_KEYS=max(next_power_of_2(geometry.select_block), 16), NUM_SELECTED=n,
        CANDIDATES=candidates, RIVALS=min(candidates, max(PAIRS // candidates, 1)), STEP=STEP,
        num_warps=4, num_stages=STAGES, **early,
    )  # fmt: skip
    _merge(sums, gates, out, cmp_parts, win_parts, pdl)
    return out


def window_step(q, k, v, lengths, window: int, scale: float):
    """See kernels.nsa.decode.window_decode."""
    batch, heads, dim = q.shape
    tokens, kv_heads, value_dim = v.shape[1:]
    pdl = _launches_early(q)
    part_rows, parts = _split(min(window, tokens), batch * kv_heads)
    sums = _empty_sums(batch, heads, parts, value_dim, q.device)
    out = q.new_empty(batch, heads, value_dim)
    launch(
        _window_kernel, (parts, batch * kv_heads),
        q, k, v, lengths, *sums, tokens, parts, part_rows, window, scale / math.log(2),
        **_sizes(heads, kv_heads, dim, value_dim), STEP=STEP, PDL=pdl, num_warps=4,
        num_stages=STAGES, launch_pdl=pdl,
    )  # fmt: skip
    _merge(sums, None, out, 0, parts, pdl)
    return out


def _launches_early(q) -> bool:
    return q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _split(rows: int, sequences: int) -> tuple[int, int]:
    """Rows per part and number of parts of a cache, for each sequence and KV head."""
    wanted = min(max(PROGRAMS // sequences, 1), MAX_PARTS)
    part_rows = max(next_power_of_2(cdiv(rows, wanted)), STEP)
    return part_rows, cdiv(rows, part_rows)


def _sizes(heads, kv_heads, dim, value_dim) -> dict:
    rows, dk, dv = (max(next_power_of_2(x), 16) for x in (heads // kv_heads, dim, value_dim))
    return dict(
        HEADS=heads, KV_HEADS=kv_heads, GROUP=heads // kv_heads, DK=dim, DV=value_dim, ROWS=rows,
        DK_PAD=dk, DV_PAD=dv,
    )  # fmt: skip


def _empty_sums(batch, heads, parts, value_dim, device):
    """Of every part: sum of exp2(s - peak) * v, the peak, sum of exp2(s - peak)."""
    empty = dict(dtype=torch.float32, device=device)
    return (
        torch.empty(batch, heads, parts, value_dim, **empty),
        torch.empty(batch, heads, parts, **empty),
        torch.empty(batch, heads, parts, **empty),
    )


def _merge(sums, gates, out, cmp_parts: int, win_parts: int, pdl: bool) -> None:
    batch, heads, parts, value_dim = sums[0].shape
    launch(
        _merge_kernel, (batch * heads, cdiv(value_dim, MERGE_COLUMNS)),
        *sums, out if gates is None else gates, out, parts, cmp_parts, cmp_parts + win_parts,
        GATED=gates is not None, PARTS=next_power_of_2(parts), DV=value_dim,
        COLUMNS=MERGE_COLUMNS, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _begin(PDL: tl.constexpr):
    """Wait until the previous launch has ended, then let the next one take its places.

    Whoever reads what two launches ago was written is safe too: each waits for the one before it.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _load_query(
    q, sequence, kv_head, HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    ROWS: tl.constexpr, DK_PAD: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head: [ROWS, DK_PAD], their rows in [B * H], and which exist."""
    row, dk = tl.arange(0, ROWS), tl.arange(0, DK_PAD)
    valid = row < GROUP
    q_row = sequence * HEADS + kv_head * GROUP + row
    mask = valid[:, None] & (dk < DK)[None, :]
    tile = tl.load(q + q_row[:, None] * DK + dk[None, :], mask=mask, other=0.0)
    return tile, q_row, valid


@triton.jit
def _load_rows(
    x, cache_row, row, seen, kv_head, KV_HEADS: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    """Rows of a cache [rows, KV_HEADS, D] of one head: [ROWS, PAD], zero where not `seen`."""
    dim = tl.arange(0, PAD)
    at = ((cache_row + row).to(tl.int64) * KV_HEADS + kv_head)[:, None] * D + dim[None, :]
    mask = seen[:, None] & (dim < D)[None, :]
    return tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _store_acc(
    acc_ptr, acc, q_row, valid, part, parts, DV: tl.constexpr, DV_PAD: tl.constexpr
):  # fmt: skip
    """Leave one part's sum of exp2(s - peak) * v, [ROWS, DV_PAD]."""
    dv = tl.arange(0, DV_PAD)
    out = q_row.to(tl.int64) * parts + part
    mask = valid[:, None] & (dv < DV)[None, :]
    tl.store(acc_ptr + out[:, None] * DV + dv[None, :], acc, mask=mask)


@triton.jit
def _store_sums(peaks, totals, peak, total, q_row, valid, part, parts):
    """Leave one part's peak and sum of exp2(s - peak), [ROWS]."""
    out = q_row.to(tl.int64) * parts + part
    tl.store(peaks + out, peak, mask=valid)
    tl.store(totals + out, total, mask=valid)


@triton.jit
def _num_visible(length, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr):
    return tl.maximum(length - CMP_BLOCK + CMP_STRIDE, 0) // CMP_STRIDE


@triton.jit
def _logits_kernel(
    q, k_cmp, lengths, logits, peaks, totals, capacity, parts, part_rows, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits of one part of the compressed cache for one KV head's group, their peak and sum."""
    part = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    _begin(PDL)
    first = part * part_rows
    visible = _num_visible(tl.load(lengths + sequence), CMP_BLOCK, CMP_STRIDE)
    end = tl.minimum(first + part_rows, visible)
    q_tile, q_row, valid = _load_query(q, sequence, kv_head, HEADS, GROUP, DK, ROWS, DK_PAD)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(first, end, STEP):
        key = start + tl.arange(0, STEP)
        seen = key < end
        k_tile = _load_rows(k_cmp, sequence * capacity, key, seen, kv_head, KV_HEADS, DK, DK_PAD)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2
        out = q_row.to(tl.int64)[:, None] * capacity + key[None, :]
        tl.store(logits + out, s, mask=valid[:, None] & seen[None, :])
        s = tl.where(seen[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(s - new_peak[:, None]), 1)
        peak = new_peak
    _store_sums(peaks, totals, peak, total, q_row, valid, part, parts)


@triton.jit
def _rank_kernel(
    logits, lengths, peaks, totals, best, capacity, parts, cmp_parts, chunks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, RATIO: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, CHUNK: tl.constexpr,
    KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The KEEP most important of CHUNK selection blocks (Eq. 9 and 10), as sortable numbers.

    A number holds the importance's bits, which order like integers since it is at least 0, above
    the block's complement, so that the lower block wins a tie. Blocks in the future are negative.
    """
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    first = tl.program_id(0) * CHUNK
    block = first + tl.arange(0, CHUNK)
    row, part = tl.arange(0, ROWS), tl.arange(0, PARTS)
    member = (row < GROUP)[:, None]
    q_row = (sequence * HEADS + kv_head * GROUP + row).to(tl.int64)[:, None]
    # Compressed blocks that begin in a selection block, BLOCK / CMP_STRIDE padded to RATIO.
    slot = tl.arange(0, CHUNK * RATIO)
    place = slot % RATIO
    if RATIO == BLOCK // CMP_STRIDE:
        column = first * RATIO + slot
    else:
        column = (first + slot // RATIO) * (BLOCK // CMP_STRIDE) + place
    _begin(PDL)
    length = tl.load(lengths + sequence)
    # All loads come before the first reduction, which would hold them back.
    mask = member & (part < cmp_parts)[None, :]
    part_peaks = tl.load(peaks + q_row * parts + part[None, :], mask=mask, other=-1e30)
    part_totals = tl.load(totals + q_row * parts + part[None, :], mask=mask, other=0.0)
    # Masked by the capacity, which is aligned, and not by the length: wide loads.
    visible = _num_visible(length, CMP_BLOCK, CMP_STRIDE)
    limit = tl.where(first * (BLOCK // CMP_STRIDE) < visible, capacity, 0)
    inside = tl.load(
        logits + q_row * capacity + column[None, :], mask=member & (column < limit)[None, :],
        other=0.0,
    )  # fmt: skip
    # Those that begin before the selection block and reach into it.
    before = ()
    for m in tl.static_range(1, CMP_BLOCK // CMP_STRIDE):
        at = block * (BLOCK // CMP_STRIDE) - m
        seen = member & ((at >= 0) & (at < visible))[None, :]
        s = tl.load(logits + q_row * capacity + at[None, :], mask=seen, other=float("-inf"))
        before += (s,)
    peak = tl.max(part_peaks, 1)
    total = tl.sum(part_totals * tl.exp2(part_peaks - peak[:, None]), 1)
    lse = (peak + tl.log2(tl.where(total > 0.0, total, 1.0)))[:, None]
    # The weight of a compressed block is the number of tokens it shares, in strides.
    shared = tl.minimum(CMP_BLOCK, BLOCK - place * CMP_STRIDE) // CMP_STRIDE
    seen = member & ((place < BLOCK // CMP_STRIDE) & (column < visible))[None, :]
    mass = tl.sum(tl.exp2(tl.where(seen, inside, float("-inf")) - lse), 0) * shared.to(tl.float32)
    importance = tl.sum(tl.reshape(mass, [CHUNK, RATIO]), 1)
    for m in tl.static_range(1, CMP_BLOCK // CMP_STRIDE):
        shared = min(CMP_BLOCK - m * CMP_STRIDE, BLOCK) // CMP_STRIDE
        importance += tl.sum(tl.exp2(before[m - 1] - lse), 0) * shared
    own = (length - 1) // BLOCK
    forced = (block < NUM_INITIAL) | (block > own - NUM_LOCAL)
    importance = tl.where(forced, float("inf"), importance)
    number = importance.to(tl.int32, bitcast=True).to(tl.int64) << 32
    number = number | (0x7FFFFFFF - block).to(tl.int64)
    number = tl.where(block > own, -1 - block.to(tl.int64), number)
    # Summed over the first axis, whose elements a thread holds by itself.
    rank = tl.sum((number[:, None] > number[None, :]).to(tl.int32), 0)
    out = (tl.program_id(1) * chunks + tl.program_id(0)).to(tl.int64) * KEEP + rank
    tl.store(best + out, number, mask=rank < KEEP)


@triton.jit
def _values_kernel(
    q, v_cmp, k_sel, v_sel, k_win, v_win, lengths, logits, best, acc_ptr, peaks, totals,
    cmp_capacity, capacity, parts, cmp_parts, cmp_rows, win_parts, win_rows, window,
    num_candidates, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, NUM_SELECTED: tl.constexpr, CANDIDATES: tl.constexpr,
    RIVALS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one selected block, one piece of the window or one part of v_cmp.

    Selected blocks come first, as theirs is the longest way.
    """
    index = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    _begin(PDL)
    length = tl.load(lengths + sequence)
    if index < NUM_SELECTED:
        q_tile, q_row, valid = _load_query(q, sequence, kv_head, HEADS, GROUP, DK, ROWS, DK_PAD)
        first = _find_block(
            best + tl.program_id(1).to(tl.int64) * num_candidates, index, num_candidates, length,
            BLOCK, CANDIDATES, RIVALS,
        )  # fmt: skip
        key = first + tl.arange(0, BLOCK_KEYS)
        seen = key < tl.minimum(first + BLOCK, length)
        cache_row = sequence * capacity
        k_tile = _load_rows(k_sel, cache_row, key, seen, kv_head, KV_HEADS, DK, DK_PAD)
        v_tile = _load_rows(v_sel, cache_row, key, seen, kv_head, KV_HEADS, DV, DV_PAD)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2
        s = tl.where(seen[None, :], s, float("-inf"))
        peak = tl.maximum(tl.max(s, 1), -1e30)
        p = tl.exp2(s - peak[:, None])
        acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        part = cmp_parts + win_parts + index
        _store_acc(acc_ptr, acc, q_row, valid, part, parts, DV, DV_PAD)
        _store_sums(peaks, totals, peak, tl.sum(p, 1), q_row, valid, part, parts)
    elif index < NUM_SELECTED + win_parts:
        piece = index - NUM_SELECTED
        _window_part(
            q, k_win, v_win, length, acc_ptr, peaks, totals, capacity, parts, cmp_parts + piece,
            tl.maximum(length - window, 0) + piece * win_rows, win_rows, scale_log2, sequence,
            kv_head, HEADS, KV_HEADS, GROUP, DK, DV, ROWS, DK_PAD, DV_PAD, STEP,
        )  # fmt: skip
    else:
        part = index - NUM_SELECTED - win_parts
        row = tl.arange(0, ROWS)
        valid = row < GROUP
        q_row = sequence * HEADS + kv_head * GROUP + row
        sums = q_row.to(tl.int64) * parts + part
        peak = tl.load(peaks + sums, mask=valid, other=0.0)
        first = part * cmp_rows
        end = tl.minimum(first + cmp_rows, _num_visible(length, CMP_BLOCK, CMP_STRIDE))
        acc = tl.zeros([ROWS, DV_PAD], tl.float32)
        for start in range(first, end, STEP):
            key = start + tl.arange(0, STEP)
            seen = key < end
            s = tl.load(
                logits + q_row.to(tl.int64)[:, None] * cmp_capacity + key[None, :],
                mask=valid[:, None] & seen[None, :], other=float("-inf"),
            )  # fmt: skip
            v_tile = _load_rows(
                v_cmp, sequence * cmp_capacity, key, seen, kv_head, KV_HEADS, DV, DV_PAD
            )
            p = tl.exp2(s - peak[:, None])
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        _store_acc(acc_ptr, acc, q_row, valid, part, parts, DV, DV_PAD)


@triton.jit
def _find_block(
    best, wanted, num_candidates, length,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, RIVALS: tl.constexpr,
):  # fmt: skip
    """First token of the block of rank `wanted` among the chunks' best; `length` if there is none."""
    candidate = tl.arange(0, CANDIDATES)
    none = -(1 << 62)
    number = tl.load(best + candidate, mask=candidate < num_candidates, other=none)
    rank = tl.zeros([CANDIDATES], tl.int32)
    for start in range(0, CANDIDATES, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        rival = tl.load(best + rival, mask=rival < num_candidates, other=none)
        rank += tl.sum((rival[:, None] > number[None, :]).to(tl.int32), 0)
    block = 0x7FFFFFFF - (number & 0x7FFFFFFF).to(tl.int32)
    found = tl.max(tl.where((rank == wanted) & (number >= 0), block, -1), 0)
    return tl.where(found < 0, length, found * BLOCK)


@triton.jit
def _window_part(
    q, k, v, length, acc_ptr, peaks, totals, capacity, parts, part, first, part_rows, scale_log2,
    sequence, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Softmax sums over part_rows tokens from `first` on."""
    q_tile, q_row, valid = _load_query(q, sequence, kv_head, HEADS, GROUP, DK, ROWS, DK_PAD)
    end = tl.minimum(first + part_rows, length)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for start in range(first, end, STEP):
        key = start + tl.arange(0, STEP)
        seen = key < end
        k_tile = _load_rows(k, sequence * capacity, key, seen, kv_head, KV_HEADS, DK, DK_PAD)
        v_tile = _load_rows(v, sequence * capacity, key, seen, kv_head, KV_HEADS, DV, DV_PAD)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2
        s = tl.where(seen[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        decay = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    _store_acc(acc_ptr, acc, q_row, valid, part, parts, DV, DV_PAD)
    _store_sums(peaks, totals, peak, total, q_row, valid, part, parts)


@triton.jit
def _window_kernel(
    q, k, v, lengths, acc_ptr, peaks, totals, capacity, parts, part_rows, window, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one piece of the window, where that is all there is."""
    part = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    _begin(PDL)
    length = tl.load(lengths + sequence)
    first = tl.maximum(length - window, 0) + part * part_rows
    _window_part(
        q, k, v, length, acc_ptr, peaks, totals, capacity, parts, part, first, part_rows,
        scale_log2, sequence, tl.program_id(1) % KV_HEADS,
        HEADS, KV_HEADS, GROUP, DK, DV, ROWS, DK_PAD, DV_PAD, STEP,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    acc_ptr, peaks, totals, gates, out, parts, cmp_parts, first_selected,
    GATED: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS values of one (sequence, head): each branch from its parts, then their gated sum."""
    q_row = tl.program_id(0)
    part, dv = tl.arange(0, PARTS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = q_row.to(tl.int64) * parts + part
    branch = tl.where(part < cmp_parts, 0, tl.where(part < first_selected, 2, 1))
    _begin(PDL)
    peak = tl.load(peaks + row, mask=part < parts, other=-1e30)
    total = tl.load(totals + row, mask=part < parts, other=0.0)
    mask = (part < parts)[:, None] & (dv < DV)[None, :]
    acc = tl.load(acc_ptr + row[:, None] * DV + dv[None, :], mask=mask, other=0.0)
    if GATED:
        gate = tl.load(gates + q_row * 3 + branch).to(tl.float32)
    else:
        gate = tl.full([PARTS], 1.0, tl.float32)
    weight = tl.zeros([PARTS], tl.float32)
    for b in tl.static_range(3):
        own = tl.where(branch == b, peak, float("-inf"))
        share = tl.exp2(own - tl.maximum(tl.max(own, 0), -1e30))
        mass = tl.sum(share * total, 0)
        weight += share * gate / tl.where(mass > 0.0, mass, 1.0)
    result = tl.sum(acc * weight[:, None], 0)
    tl.store(out + q_row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
