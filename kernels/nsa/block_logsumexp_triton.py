"""block_logsumexp as a Triton kernel: a program holds the queries of a head and goes through blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2

QUERIES = 64  # of a program
BLOCKS = 64  # that it goes through
STAGES = 3  # blocks of keys on their way
LOW = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)


def forward(q, k, rows, begins, firsts, ends, size: int, scale: float):
    """[H, R, B] fp32, as kernels.nsa.block_logsumexp says; q and k contiguous."""
    (num_rows, heads, dim), kv_heads, num_blocks = q.shape, k.shape[1], len(firsts)
    out = torch.empty(heads, num_rows, num_blocks, dtype=torch.float32, device=q.device)
    if out.numel():
        launch(
            _logsumexp_kernel, (cdiv(num_rows, QUERIES), cdiv(num_blocks, BLOCKS), heads),
            q, k, rows, begins, firsts, ends, out, num_rows, num_blocks, scale,
            HEADS=heads, GROUP=heads // kv_heads, D=dim, D_PAD=max(16, next_power_of_2(dim)),
            SIZE=max(16, next_power_of_2(size)), QUERIES=QUERIES, BLOCKS=BLOCKS, STAGES=STAGES,
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _logsumexp_kernel(
    q, k, rows, begins, firsts, ends, out, num_rows, num_blocks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head, d, there = tl.program_id(2), tl.arange(0, D_PAD), r < num_rows
    row = tl.load(rows + r, mask=there, other=-1)
    begin = tl.load(begins + r, mask=there, other=1 << 30)
    queries = tl.load(
        q + (r[:, None].to(tl.int64) * HEADS + head) * D + d,
        mask=there[:, None] & (d < D), other=0.0,
    )  # fmt: skip
    at = out + (head.to(tl.int64) * num_rows + r) * num_blocks

    # Blocks that some of the queries see are neighbours, from low to high - 1. The loop over them has no
    # branch around its loads, so that they are made ahead of the products.
    last, earliest = tl.max(row, 0), tl.min(begin, 0)
    b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    first = tl.load(firsts + b, mask=b < num_blocks, other=1 << 30)
    end = tl.load(ends + b, mask=b < num_blocks, other=0)
    seen = (first <= last) & (end > earliest)
    low = tl.min(tl.where(seen, b, 1 << 30), 0)
    high = tl.max(tl.where(seen, b + 1, 0), 0)
    unseen = ((b < low) | (b >= high)) & (b < num_blocks)
    tl.store(
        at[:, None] + b, tl.full([QUERIES, BLOCKS], LOW, tl.float32),
        mask=there[:, None] & unseen[None],
    )  # fmt: skip

    lowest, latest = tl.min(tl.where(there, row, 1 << 30), 0), tl.max(tl.where(there, begin, -1), 0)
    log2_scale = scale * 1.4426950408889634
    for i in tl.range(low, high, num_stages=STAGES):
        start, stop = tl.load(firsts + i), tl.load(ends + i)
        token = start + tl.arange(0, SIZE)
        keys = tl.load(
            k + (token[:, None].to(tl.int64) * (HEADS // GROUP) + head // GROUP) * D + d,
            mask=(token < stop)[:, None] & (d < D), other=0.0,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if (stop - start < SIZE) | (stop > lowest + 1) | (start < latest):
            inside = (token < stop)[None] & (token >= begin[:, None]) & (token <= row[:, None])
            scores = tl.where(inside, scores, LOW)
        most = tl.max(scores, 1)
        total = tl.sum(tl.exp2(scores * log2_scale - (most * log2_scale)[:, None]), 1)
        total = (most * log2_scale + tl.log2(total)) * LN2
        tl.store(at + i, tl.where(most > LOW, total, LOW), mask=there)
