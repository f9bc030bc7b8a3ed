"""One decode step of Native Sparse Attention: one new query per sequence against its caches.

A single query leaves a GPU idle unless its keys are split over many programs (flash decoding).
Four launches, sized by the caches' capacity and never by the lengths, which stay on the device, so
that a step can be captured in a CUDA graph and replayed while the sequences grow:

1. compressed: logits, and partial softmax sums of every part of the compressed cache;
2. importance of every selection block, from those logits;
3. selected and window: a program per selected block, which finds its block itself, and one per
   piece of the window, each leaving partial sums;
4. merge: the parts of each branch by their log-sum-exp, then the branches by their gates.

Logits and peaks are in base 2: exp2(x * scale * log2(e)).
"""

import math

import torch
import triton
import triton.language as tl

from kernels.nsa.geometry import Geometry

# Compressed rows that one program reads in a step.
STEP = 64
# Programs that read the compressed caches: enough to fill the machine; every part more is another
# partial sum to merge.
PROGRAMS = 1024
MAX_PARTS = 32
# Selection blocks per importance program.
IMPORTANCE_BLOCKS = 64


def nsa_decode(
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, lengths, geometry: Geometry,
    scale: float | None = None,
):  # fmt: skip
    """The newest token's attention in each of B sequences (arXiv 2502.11089, Eq. 5).

    q [B, H, Dk] and gates [B, H, 3] (compressed, selected, window; after the sigmoid) belong to the
    newest token; lengths int32 [B] counts a sequence's tokens with it. Caches, whose rows up to the
    length are filled: k_sel, v_sel, k_win, v_win [B, S, Hkv, D], k_cmp, v_cmp [B, C, Hkv, D] with
    one row per complete compressed block. All contiguous, on one CUDA device; bf16, fp16 or fp32.
    scale defaults to Dk ** -0.5. Returns [B, H, Dv] in q's dtype; an empty sequence gives zeros.
    Launches nothing that waits for the device. Raises ValueError when shapes do not fit together.
    """
    _check(q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, lengths)
    batch, heads, dim = q.shape
    rows, kv_heads, value_dim = v_cmp.shape[1:]
    tokens = k_sel.shape[1]
    scale_log2 = (dim**-0.5 if scale is None else scale) / math.log(2)

    wanted_parts = min(triton.cdiv(PROGRAMS, batch * kv_heads), MAX_PARTS)
    part_rows = max(triton.next_power_of_2(triton.cdiv(rows, wanted_parts)), STEP)
    compressed_parts = triton.cdiv(rows, part_rows)
    keys = max(triton.next_power_of_2(geometry.select_block), 16)
    window_parts = triton.cdiv(geometry.window, keys)
    parts = compressed_parts + geometry.num_selected + window_parts
    blocks = triton.cdiv(tokens, geometry.select_block)
    scratch = dict(dtype=torch.float32, device=q.device)
    logits = torch.empty(batch, heads, rows, **scratch)
    importance = torch.empty(batch, kv_heads, blocks, **scratch)
    acc = torch.empty(batch, heads, parts, value_dim, **scratch)
    peaks = torch.empty(batch, heads, parts, **scratch)
    totals = torch.empty(batch, heads, parts, **scratch)
    out = q.new_empty(batch, heads, value_dim)

    group = heads // kv_heads
    sizes = dict(
        HEADS=heads, KV_HEADS=kv_heads, GROUP=group, DK=dim, DV=value_dim,
        ROWS=max(triton.next_power_of_2(group), 16), DK_PAD=max(triton.next_power_of_2(dim), 16),
        DV_PAD=max(triton.next_power_of_2(value_dim), 16),
    )  # fmt: skip
    cut = dict(CMP_BLOCK=geometry.compress_block, CMP_STRIDE=geometry.compress_stride)
    choice = dict(
        BLOCK=geometry.select_block, NUM_INITIAL=geometry.num_initial,
        NUM_LOCAL=geometry.num_local,
    )  # fmt: skip
    sums = (acc, peaks, totals)
    _compressed_kernel[(compressed_parts, batch * kv_heads)](
        q, k_cmp, v_cmp, lengths, logits, *sums, rows, parts, part_rows, scale_log2,
        **sizes, **cut, STEP=STEP, num_warps=4, num_stages=2,
    )  # fmt: skip
    _importance_kernel[(triton.cdiv(blocks, IMPORTANCE_BLOCKS), batch * kv_heads)](
        logits, lengths, peaks, totals, importance, rows, parts, compressed_parts, blocks,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=group, ROWS=triton.next_power_of_2(group),
        PARTS=triton.next_power_of_2(compressed_parts), BLOCKS=IMPORTANCE_BLOCKS,
        **cut, **choice, num_warps=4,
    )  # fmt: skip
    _token_kernel[(geometry.num_selected + window_parts, batch * kv_heads)](
        q, k_sel, v_sel, k_win, v_win, lengths, importance, *sums, tokens, parts,
        compressed_parts, blocks, scale_log2,
        **sizes, BLOCK=geometry.select_block, NUM_SELECTED=geometry.num_selected,
        WINDOW=geometry.window, BLOCKS=triton.next_power_of_2(blocks),
        KEYS=keys, num_warps=4,
    )  # fmt: skip
    _merge_kernel[(batch * heads,)](
        *sums, gates, out, parts, compressed_parts, geometry.num_selected, window_parts,
        DV=value_dim, DV_PAD=sizes["DV_PAD"], num_warps=4,
        PARTS=max(triton.next_power_of_2(p) for p in
                  (compressed_parts, geometry.num_selected, window_parts)),
    )  # fmt: skip
    return out


def _check(q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, lengths) -> None:
    batch, heads, dim = q.shape
    tokens, kv_heads = k_sel.shape[1:3]
    rows, value_dim = k_cmp.shape[1], v_sel.shape[3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide into {kv_heads} key/value heads.")
    expected = {
        "k_cmp": (k_cmp, (batch, rows, kv_heads, dim)),
        "v_cmp": (v_cmp, (batch, rows, kv_heads, value_dim)),
        "k_sel": (k_sel, (batch, tokens, kv_heads, dim)),
        "v_sel": (v_sel, (batch, tokens, kv_heads, value_dim)),
        "k_win": (k_win, (batch, tokens, kv_heads, dim)),
        "v_win": (v_win, (batch, tokens, kv_heads, value_dim)),
        "gates": (gates, (batch, heads, 3)),
        "lengths": (lengths, (batch,)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"NSA decode {name} has shape {tuple(x.shape)}; q asks for {shape}.")
        if not x.is_contiguous():
            raise ValueError(f"NSA decode {name} must be contiguous.")


@triton.jit
def _store_sums(
    acc_ptr, peaks, totals, acc, peak, total, q_row, valid, part, parts,
    DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Leave one part's softmax sums: acc [ROWS, DV], peak and total [ROWS]."""
    dv = tl.arange(0, DV_PAD)
    out = q_row.to(tl.int64) * parts + part
    mask = valid[:, None] & (dv < DV)[None, :]
    tl.store(acc_ptr + out[:, None] * DV + dv[None, :], acc, mask=mask)
    tl.store(peaks + out, peak, mask=valid)
    tl.store(totals + out, total, mask=valid)


@triton.jit
def _attend(
    q_tile, k, v, cache_row, first, end, kv_head, scale_log2,
    KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Logits [ROWS, KEYS] against a sequence's keys from `first`, -inf from `end` on; and V."""
    key = first + tl.arange(0, KEYS)
    seen = key < end
    dk, dv = tl.arange(0, DK_PAD), tl.arange(0, DV_PAD)
    row = (cache_row + key).to(tl.int64) * KV_HEADS + kv_head
    k_mask = seen[:, None] & (dk < DK)[None, :]
    v_mask = seen[:, None] & (dv < DV)[None, :]
    k_tile = tl.load(k + row[:, None] * DK + dk[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + row[:, None] * DV + dv[None, :], mask=v_mask, other=0.0)
    s = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2
    return tl.where(seen[None, :], s, float("-inf")), v_tile


@triton.jit
def _compressed_kernel(
    q, k_cmp, v_cmp, lengths, logits, acc_ptr, peaks, totals, cache_rows, parts, part_rows,
    scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Logits and softmax sums of one part of the compressed cache, for one KV head's group."""
    part = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    row = tl.arange(0, ROWS)
    valid = row < GROUP
    q_row = sequence * HEADS + kv_head * GROUP + row
    dk = tl.arange(0, DK_PAD)
    visible = tl.maximum(tl.load(lengths + sequence) - CMP_BLOCK + CMP_STRIDE, 0) // CMP_STRIDE
    end = tl.minimum((part + 1) * part_rows, visible)
    mask = valid[:, None] & (dk < DK)[None, :]
    q_tile = tl.load(q + q_row[:, None] * DK + dk[None, :], mask=mask, other=0.0)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for first in range(part * part_rows, end, STEP):
        key = first + tl.arange(0, STEP)
        s, v_tile = _attend(
            q_tile, k_cmp, v_cmp, sequence * cache_rows, first, end, kv_head, scale_log2,
            KV_HEADS, DK, DV, DK_PAD, DV_PAD, STEP,
        )  # fmt: skip
        out = q_row.to(tl.int64)[:, None] * cache_rows + key[None, :]
        tl.store(logits + out, s, mask=valid[:, None] & (key < end)[None, :])
        new_peak = tl.maximum(peak, tl.max(s, 1))
        decay = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    _store_sums(acc_ptr, peaks, totals, acc, peak, total, q_row, valid, part, parts, DV, DV_PAD)


@triton.jit
def _importance_kernel(
    logits, lengths, peaks, totals, importance, cache_rows, parts, compressed_parts, num_blocks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_INITIAL: tl.constexpr, NUM_LOCAL: tl.constexpr,
):  # fmt: skip
    """Importance of BLOCKS selection blocks (Eq. 9 and 10): +inf where forced, -1 in the future."""
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    length = tl.load(lengths + sequence)
    visible = tl.maximum(length - CMP_BLOCK + CMP_STRIDE, 0) // CMP_STRIDE
    own = (length - 1) // BLOCK
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    row = tl.arange(0, ROWS)
    q_row = (sequence * HEADS + kv_head * GROUP + row).to(tl.int64)
    part = tl.arange(0, PARTS)
    mask = (row < GROUP)[:, None] & (part < compressed_parts)[None, :]
    sums = q_row[:, None] * parts + part[None, :]
    part_peaks = tl.load(peaks + sums, mask=mask, other=-1e30)
    part_totals = tl.load(totals + sums, mask=mask, other=0.0)
    peak = tl.max(part_peaks, 1)
    total = tl.sum(part_totals * tl.exp2(part_peaks - peak[:, None]), 1)
    lse = peak + tl.log2(tl.where(total > 0.0, total, 1.0))
    # The compressed blocks that share tokens with block 0, shifted by BLOCK / stride for each next.
    result = tl.zeros([BLOCKS], tl.float32)
    for m in tl.static_range((CMP_BLOCK + BLOCK) // CMP_STRIDE - 1):
        start = (m + 1) * CMP_STRIDE - CMP_BLOCK
        shared = tl.minimum(start + CMP_BLOCK, BLOCK) - tl.maximum(start, 0)
        column = block * (BLOCK // CMP_STRIDE) + m + 1 - CMP_BLOCK // CMP_STRIDE
        seen = (row < GROUP)[:, None] & ((column >= 0) & (column < visible))[None, :]
        s = tl.load(
            logits + q_row[:, None] * cache_rows + column[None, :], mask=seen, other=float("-inf")
        )
        result += tl.sum(tl.exp2(s - lse[:, None]), 0) * (shared // CMP_STRIDE).to(tl.float32)
    forced = (block < NUM_INITIAL) | (block > own - NUM_LOCAL)
    result = tl.where(forced, float("inf"), result)
    result = tl.where(block > own, -1.0, result)
    out = tl.program_id(1).to(tl.int64) * num_blocks + block
    tl.store(importance + out, result, mask=block < num_blocks)


@triton.jit
def _token_kernel(
    q, k_sel, v_sel, k_win, v_win, lengths, importance, acc_ptr, peaks, totals, cache_tokens,
    parts, compressed_parts, num_blocks, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, NUM_SELECTED: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one selected block, or of one piece of the window."""
    part = tl.program_id(0)
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    length = tl.load(lengths + sequence)
    row = tl.arange(0, ROWS)
    valid = row < GROUP
    q_row = sequence * HEADS + kv_head * GROUP + row
    dk = tl.arange(0, DK_PAD)
    mask = valid[:, None] & (dk < DK)[None, :]
    q_tile = tl.load(q + q_row[:, None] * DK + dk[None, :], mask=mask, other=0.0)
    if part < NUM_SELECTED:
        # The part-th best block. Importance is at least 0 where it counts, so its bits order like
        # integers; the number below them lets the lower block win a tie.
        block = tl.arange(0, BLOCKS)
        score = tl.load(
            importance + tl.program_id(1).to(tl.int64) * num_blocks + block,
            mask=block < num_blocks, other=-1.0,
        )  # fmt: skip
        order = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCKS - 1 - block)
        order = tl.where(score < 0.0, -1, order)
        best = tl.max(order, 0)
        for _ in range(part):
            order = tl.where(order == best, -1, order)
            best = tl.max(order, 0)
        first = (BLOCKS - 1 - (best & (BLOCKS - 1)).to(tl.int32)) * BLOCK
        end = tl.minimum(tl.where(best >= 0, first + BLOCK, 0), length)
        k, v = k_sel, v_sel
    else:
        start = tl.maximum(length - WINDOW, 0)
        first = start + (part - NUM_SELECTED) * KEYS
        end = tl.minimum(start + WINDOW, length)
        k, v = k_win, v_win
    s, v_tile = _attend(
        q_tile, k, v, sequence * cache_tokens, first, end, kv_head, scale_log2,
        KV_HEADS, DK, DV, DK_PAD, DV_PAD, KEYS,
    )  # fmt: skip
    peak = tl.maximum(tl.max(s, 1), -1e30)
    p = tl.exp2(s - peak[:, None])
    acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    _store_sums(
        acc_ptr, peaks, totals, acc, peak, tl.sum(p, 1), q_row, valid, compressed_parts + part,
        parts, DV, DV_PAD,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    acc_ptr, peaks, totals, gates, out, parts, compressed_parts, selected_parts, window_parts,
    DV: tl.constexpr, DV_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One (sequence, head): each branch from its parts, then their gated sum."""
    q_row = tl.program_id(0)
    dv = tl.arange(0, DV_PAD)
    part = tl.arange(0, PARTS)
    result = tl.zeros([DV_PAD], tl.float32)
    first = 0
    for branch in tl.static_range(3):
        if branch == 0:
            count = compressed_parts
        elif branch == 1:
            count = selected_parts
        else:
            count = window_parts
        row = q_row.to(tl.int64) * parts + first + part
        peak = tl.load(peaks + row, mask=part < count, other=-1e30)
        weight = tl.exp2(peak - tl.max(peak, 0))
        total = tl.sum(tl.load(totals + row, mask=part < count, other=0.0) * weight, 0)
        mask = (part < count)[:, None] & (dv < DV)[None, :]
        acc = tl.load(acc_ptr + row[:, None] * DV + dv[None, :], mask=mask, other=0.0)
        gate = tl.load(gates + q_row * 3 + branch).to(tl.float32)
        value = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
        result += gate * value
        first += count
    tl.store(out + q_row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
