"""One decode step in Triton: one new query per sequence against its caches.

A single query leaves a GPU idle unless its keys are split over many programs (flash decoding).
Four launches, sized by the caches' capacity and never by the lengths, which stay on the device, so
that a step can be captured in a CUDA graph and replayed while the sequences grow:

1. past: logits and partial softmax sums of every part of the compressed cache; beside them, since
   they need no selection, the pieces of the window;
2. rank: importance of a chunk of selection blocks from those logits, and the chunk's best n;
3. selected: a program finds its block among the chunks' best and leaves its partial sums;
4. merge: the parts of each branch by their log-sum-exp, then the branches by their gates.

Each launch after the first is ready before its predecessor ends (programmatic dependent launch,
Hopper and later). Logits and peaks are in base 2: exp2(x * scale * log2(e)).
"""

import math

import torch
import triton
import triton.language as tl

from kernels.nsa.geometry import Geometry

# Programs that read a cache: enough to fill the machine; every part more is another partial sum to
# merge.
PROGRAMS = 512
MAX_PARTS = 32
# Rows that one program reads in a step, and steps in flight.
STEP = 64
STAGES = 3
# Ranking compares all pairs of a chunk, then all pairs of the chunks' best.
MAX_CHUNK = 256
PAIRS = 128
# From this many sequences times KV heads on, a program attends to two selected blocks.
PAIRED = 32


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
    paired = 2 if sequences >= PAIRED and n > 1 else 1
    parts = cmp_parts + win_parts + triton.cdiv(n, paired)
    blocks = triton.cdiv(tokens, geometry.select_block)
    keep = triton.next_power_of_2(n)
    chunk = triton.next_power_of_2(max(keep, min(math.isqrt(keep * blocks), MAX_CHUNK)))
    chunks = triton.cdiv(blocks, chunk)
    candidates = triton.next_power_of_2(chunks * keep)

    logits = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    best = torch.empty(batch, kv_heads, chunks * keep, dtype=torch.int64, device=q.device)
    sums = _empty_sums(batch, heads, parts, value_dim, q.device)
    out = q.new_empty(batch, heads, value_dim)
    sizes, launch = _sizes(heads, kv_heads, dim, value_dim), dict(launch_pdl=pdl)
    cut = dict(CMP_BLOCK=geometry.compress_block, CMP_STRIDE=geometry.compress_stride)
    _past_kernel[(cmp_parts + win_parts, sequences)](
        q, k_cmp, v_cmp, k_win, v_win, lengths, logits, *sums, rows, tokens, parts, cmp_parts,
        cmp_rows, win_rows, geometry.window, scale_log2,
        **sizes, **cut, STEP=STEP, PDL=pdl, num_warps=4, num_stages=STAGES, **launch,
    )  # fmt: skip
    _rank_kernel[(chunks, sequences)](
        logits, lengths, *sums[1:], best, rows, parts, cmp_parts, chunks,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        ROWS=triton.next_power_of_2(heads // kv_heads), PARTS=triton.next_power_of_2(cmp_parts),
        **cut, BLOCK=geometry.select_block, NUM_INITIAL=geometry.num_initial,
        NUM_LOCAL=geometry.num_local, CHUNK=chunk, KEEP=keep, PDL=pdl,
        num_warps=4 if chunk <= 128 else 8, **launch,
    )  # fmt: skip
    block_keys = max(triton.next_power_of_2(geometry.select_block), 16)
    _selected_kernel[(triton.cdiv(n, paired), sequences)](
        q, k_sel, v_sel, lengths, best, *sums, tokens, parts, cmp_parts + win_parts, chunks * keep,
        scale_log2,
        **sizes, BLOCK=geometry.select_block, BLOCK_KEYS=block_keys, NUM_SELECTED=n, PER=paired,
        CANDIDATES=candidates, PAIRS=min(candidates, PAIRS), PDL=pdl,
        num_warps=4 if paired * block_keys <= 64 else 8, **launch,
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
    _past_kernel[(parts, batch * kv_heads)](
        q, k, v, k, v, lengths, sums[0], *sums, tokens, tokens, parts, 0, part_rows, part_rows,
        window, scale / math.log(2),
        **_sizes(heads, kv_heads, dim, value_dim), CMP_BLOCK=1, CMP_STRIDE=1, STEP=STEP, PDL=pdl,
        num_warps=4, num_stages=STAGES, launch_pdl=pdl,
    )  # fmt: skip
    _merge(sums, None, out, 0, parts, pdl)
    return out


def _launches_early(q) -> bool:
    return q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _split(rows: int, sequences: int) -> tuple[int, int]:
    """Rows per part and number of parts of a cache, for each sequence and KV head."""
    wanted = min(max(PROGRAMS // sequences, 1), MAX_PARTS)
    part_rows = max(triton.next_power_of_2(triton.cdiv(rows, wanted)), STEP)
    return part_rows, triton.cdiv(rows, part_rows)


def _sizes(heads, kv_heads, dim, value_dim) -> dict:
    rows, dk, dv = (
        max(triton.next_power_of_2(x), 16) for x in (heads // kv_heads, dim, value_dim)
    )
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
    _merge_kernel[(batch * heads,)](
        *sums, out if gates is None else gates, out, parts, cmp_parts, cmp_parts + win_parts,
        GATED=gates is not None, PARTS=triton.next_power_of_2(parts), DV=value_dim,
        DV_PAD=triton.next_power_of_2(value_dim), PDL=pdl, num_warps=4, launch_pdl=pdl,
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
def _attend(
    q_tile, k, v, cache_row, key, seen, kv_head, scale_log2,
    KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):  # fmt: skip
    """Logits [ROWS, KEYS] against the keys where `seen`, -inf elsewhere; and V [KEYS, DV_PAD]."""
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    row = (cache_row + key).to(tl.int64) * KV_HEADS + kv_head
    k_mask = seen[:, None] & (dk < DK)[None, :]
    v_mask = seen[:, None] & (dv < DV)[None, :]
    k_tile = tl.load(k + row[:, None] * DK + dk[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + row[:, None] * DV + dv[None, :], mask=v_mask, other=0.0)
    s = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2
    return tl.where(seen[None, :], s, float("-inf")), v_tile


@triton.jit
def _store_sums(
    acc_ptr, peaks, totals, acc, peak, total, q_row, valid, part, parts,
    DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Leave one part's softmax sums: acc [ROWS, DV_PAD], peak and total [ROWS]."""
    dv = tl.arange(0, DV_PAD)
    out = q_row.to(tl.int64) * parts + part
    mask = valid[:, None] & (dv < DV)[None, :]
    tl.store(acc_ptr + out[:, None] * DV + dv[None, :], acc, mask=mask)
    tl.store(peaks + out, peak, mask=valid)
    tl.store(totals + out, total, mask=valid)


@triton.jit
def _past_kernel(
    q, k_cmp, v_cmp, k_win, v_win, lengths, logits, acc_ptr, peaks, totals, cmp_capacity,
    win_capacity, parts, cmp_parts, cmp_rows, win_rows, window, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one part of the compressed cache (its logits too) or of the window."""
    part = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    _begin(PDL)
    length = tl.load(lengths + sequence)
    if part < cmp_parts:
        k, v, cache_row = k_cmp, v_cmp, sequence * cmp_capacity
        first = part * cmp_rows
        visible = tl.maximum(length - CMP_BLOCK + CMP_STRIDE, 0) // CMP_STRIDE
        end = tl.minimum(first + cmp_rows, visible)
        end_logits = end
    else:
        k, v, cache_row = k_win, v_win, sequence * win_capacity
        first = tl.maximum(length - window, 0) + (part - cmp_parts) * win_rows
        end = tl.minimum(first + win_rows, length)
        end_logits = first  # none
    q_tile, q_row, valid = _load_query(q, sequence, kv_head, HEADS, GROUP, DK, ROWS, DK_PAD)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for start in range(first, end, STEP):
        key = start + tl.arange(0, STEP)
        s, v_tile = _attend(
            q_tile, k, v, cache_row, key, key < end, kv_head, scale_log2,
            KV_HEADS, DK, DV, DK_PAD, DV_PAD,
        )  # fmt: skip
        out = q_row.to(tl.int64)[:, None] * cmp_capacity + key[None, :]
        tl.store(logits + out, s, mask=valid[:, None] & (key < end_logits)[None, :])
        new_peak = tl.maximum(peak, tl.max(s, 1))
        decay = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    _store_sums(acc_ptr, peaks, totals, acc, peak, total, q_row, valid, part, parts, DV, DV_PAD)


@triton.jit
def _rank_kernel(
    logits, lengths, peaks, totals, best, cmp_capacity, parts, cmp_parts, chunks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr, CHUNK: tl.constexpr, KEEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The KEEP most important of CHUNK selection blocks (Eq. 9 and 10), as sortable numbers.

    A number holds the importance's bits, which order like integers since it is at least 0, above
    the block's complement, so that the lower block wins a tie. Blocks in the future are negative.
    """
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row, part = tl.arange(0, ROWS), tl.arange(0, PARTS)
    member = (row < GROUP)[:, None]
    q_row = (sequence * HEADS + kv_head * GROUP + row).to(tl.int64)[:, None]
    _begin(PDL)
    length = tl.load(lengths + sequence)
    mask = member & (part < cmp_parts)[None, :]
    part_peaks = tl.load(peaks + q_row * parts + part[None, :], mask=mask, other=-1e30)
    part_totals = tl.load(totals + q_row * parts + part[None, :], mask=mask, other=0.0)
    # The compressed blocks that share tokens with block 0, shifted by BLOCK / stride for each next.
    # All loads come before the first reduction, which would hold them back.
    visible = tl.maximum(length - CMP_BLOCK + CMP_STRIDE, 0) // CMP_STRIDE
    logit = ()
    for m in tl.static_range((CMP_BLOCK + BLOCK) // CMP_STRIDE - 1):
        column = block * (BLOCK // CMP_STRIDE) + m + 1 - CMP_BLOCK // CMP_STRIDE
        seen = member & ((column >= 0) & (column < visible))[None, :]
        at = logits + q_row * cmp_capacity + column[None, :]
        logit += (tl.load(at, mask=seen, other=float("-inf")),)
    peak = tl.max(part_peaks, 1)
    total = tl.sum(part_totals * tl.exp2(part_peaks - peak[:, None]), 1)
    lse = peak + tl.log2(tl.where(total > 0.0, total, 1.0))
    mass = tl.zeros([ROWS, CHUNK], tl.float32)
    for m in tl.static_range((CMP_BLOCK + BLOCK) // CMP_STRIDE - 1):
        start = (m + 1) * CMP_STRIDE - CMP_BLOCK
        shared = tl.minimum(start + CMP_BLOCK, BLOCK) - tl.maximum(start, 0)
        mass += tl.exp2(logit[m] - lse[:, None]) * (shared // CMP_STRIDE).to(tl.float32)
    own = (length - 1) // BLOCK
    importance = tl.sum(mass, 0)
    forced = (block < NUM_INITIAL) | (block > own - NUM_LOCAL)
    importance = tl.where(forced, float("inf"), importance)
    number = importance.to(tl.int32, bitcast=True).to(tl.int64) << 32
    number = number | (0x7FFFFFFF - block).to(tl.int64)
    number = tl.where(block > own, -1 - block.to(tl.int64), number)
    rank = tl.sum((number[None, :] > number[:, None]).to(tl.int32), 1)
    out = (tl.program_id(1) * chunks + tl.program_id(0)).to(tl.int64) * KEEP + rank
    tl.store(best + out, number, mask=rank < KEEP)


@triton.jit
def _selected_kernel(
    q, k_sel, v_sel, lengths, best, acc_ptr, peaks, totals, capacity, parts, first_part,
    num_candidates, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr, NUM_SELECTED: tl.constexpr, PER: tl.constexpr,
    CANDIDATES: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax sums of PER selected blocks."""
    part = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    candidate = tl.arange(0, CANDIDATES)
    _begin(PDL)
    length = tl.load(lengths + sequence)
    q_tile, q_row, valid = _load_query(q, sequence, kv_head, HEADS, GROUP, DK, ROWS, DK_PAD)
    best += tl.program_id(1).to(tl.int64) * num_candidates
    number = tl.load(best + candidate, mask=candidate < num_candidates, other=-(1 << 62))
    rank = tl.zeros([CANDIDATES], tl.int32)
    for start in range(0, CANDIDATES, PAIRS):
        other = start + tl.arange(0, PAIRS)
        rival = tl.load(best + other, mask=other < num_candidates, other=-(1 << 62))
        rank += tl.sum((rival[None, :] > number[:, None]).to(tl.int32), 1)
    wanted = part * PER + tl.arange(0, PER)
    mine = (rank[:, None] == wanted[None, :]) & (wanted < NUM_SELECTED)[None, :]
    number = tl.max(tl.where(mine, number[:, None], -1), 0)
    first = tl.where(number >= 0, (0x7FFFFFFF - (number & 0x7FFFFFFF).to(tl.int32)) * BLOCK, length)
    offset = tl.arange(0, BLOCK_KEYS)
    key = first[:, None] + tl.where(offset < BLOCK, offset, length)[None, :]
    key = tl.reshape(key, [PER * BLOCK_KEYS])
    s, v_tile = _attend(
        q_tile, k_sel, v_sel, sequence * capacity, key, key < length, kv_head, scale_log2,
        KV_HEADS, DK, DV, DK_PAD, DV_PAD,
    )  # fmt: skip
    peak = tl.maximum(tl.max(s, 1), -1e30)
    p = tl.exp2(s - peak[:, None])
    acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    _store_sums(
        acc_ptr, peaks, totals, acc, peak, tl.sum(p, 1), q_row, valid, first_part + part, parts,
        DV, DV_PAD,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    acc_ptr, peaks, totals, gates, out, parts, cmp_parts, first_selected,
    GATED: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One (sequence, head): each branch from its parts, then their gated sum."""
    q_row = tl.program_id(0)
    part, dv = tl.arange(0, PARTS), tl.arange(0, DV_PAD)
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
