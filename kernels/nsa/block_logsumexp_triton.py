"""block_logsumexp as a Triton kernel: a program holds the queries of a head and goes through blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2

QUERIES = 64  # of a program
BLOCKS = 16  # that it goes through
LOW = tl.constexpr(-1e30)


def forward(q, k, rows, begins, firsts, ends, size: int, scale: float):
    """[H, R, B] fp32, as kernels.nsa.block_logsumexp says; q and k contiguous."""
    (num_rows, heads, dim), kv_heads, num_blocks = q.shape, k.shape[1], len(firsts)
    out = torch.empty(heads, num_rows, num_blocks, dtype=torch.float32, device=q.device)
    if out.numel():
        launch(
            _logsumexp_kernel, (cdiv(num_rows, QUERIES), cdiv(num_blocks, BLOCKS), heads),
            q, k, rows, begins, firsts, ends, out, num_rows, num_blocks, scale,
            HEADS=heads, GROUP=heads // kv_heads, D=dim, D_PAD=max(16, next_power_of_2(dim)),
            SIZE=max(16, next_power_of_2(size)), QUERIES=QUERIES, BLOCKS=BLOCKS, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _logsumexp_kernel(
    q, k, rows, begins, firsts, ends, out, num_rows, num_blocks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head, d, there = tl.program_id(2), tl.arange(0, D_PAD), r < num_rows
    row = tl.load(rows + r, mask=there, other=-1)
    begin = tl.load(begins + r, mask=there, other=1 << 30)
    queries = tl.load(
        q + (r[:, None].to(tl.int64) * HEADS + head) * D + d,
        mask=there[:, None] & (d < D), other=0.0,
    )  # fmt: skip
    last, earliest = tl.max(row, 0), tl.min(begin, 0)
    at = out + (head.to(tl.int64) * num_rows + r) * num_blocks
    first_block = tl.program_id(1) * BLOCKS
    for b in range(first_block, tl.minimum(first_block + BLOCKS, num_blocks)):
        first, end = tl.load(firsts + b), tl.load(ends + b)
        total = tl.full([QUERIES], LOW, tl.float32)
        if (first <= last) & (end > earliest):
            token = first + tl.arange(0, SIZE)
            keys = tl.load(
                k + (token[:, None].to(tl.int64) * (HEADS // GROUP) + head // GROUP) * D + d,
                mask=(token < end)[:, None] & (d < D), other=0.0,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            seen = (token < end)[None] & (token >= begin[:, None]) & (token <= row[:, None])
            scores = tl.where(seen, scores, LOW)
            most = tl.max(scores, 1)
            total = most + tl.log(tl.sum(tl.exp(scores - most[:, None]), 1))
        tl.store(at + b, total, mask=there)
