"""The kernel of append.py: a program for each sequence, head and cache.

A program whose token completes a block reads the block's older tokens from the ring and the newest
from its own registers, so no program waits for another's writes. The arithmetic is pool.py's, over
all of the block at once: one round of loads is what a step waits for.
"""

import triton
import triton.language as tl


def append_step(caches, tokens, lengths, compressed, scores, positions, stride: int) -> None:
    """See kernels.nsa.append.append."""
    batch, heads, dim = tokens[0].shape
    if not batch:
        return
    length = caches[0].shape[1] if compressed else 1
    _append_kernel[(batch * heads, len(caches))](
        tuple(caches), tuple(cache.shape[1] for cache in caches), tuple(tokens), lengths,
        tuple(compressed), tuple(rows.shape[1] for rows in compressed), tuple(scores),
        tuple(positions), H=heads, D=dim, DP=triton.next_power_of_2(dim), L=length,
        LP=triton.next_power_of_2(length), STRIDE=stride, num_warps=4,
    )  # fmt: skip


@triton.jit
def _append_kernel(
    caches, cache_rows, tokens, lengths, compressed, compressed_rows, scores, positions,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    n = tl.load(lengths + b)
    if n == 0:
        return
    d = tl.arange(0, DP)
    for i in tl.static_range(len(caches)):
        if tl.program_id(1) == i:
            token = tl.load(tokens[i] + (b * H + h) * D + d, mask=d < D, other=0.0)
            cache = caches[i] + b.to(tl.int64) * cache_rows[i] * H * D + h * D + d
            if i < len(compressed):
                if (n >= L) & ((n - L) % STRIDE == 0):
                    row = b.to(tl.int64) * compressed_rows[i] + (n - L) // STRIDE
                    weights = scores[i] + h * D + d, positions[i] + h
                    mean = _gated_mean(cache, token, n, *weights, d, H, D, L, LP)
                    at = compressed[i] + (row * H + h) * D + d
                    tl.store(at, mean.to(compressed[i].dtype.element_ty), mask=d < D)
            tl.store(cache + ((n - 1) % cache_rows[i]).to(tl.int64) * H * D, token, mask=d < D)


@triton.jit
def _gated_mean(
    ring, newest, n, score, position, d,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """Of the last L tokens [DP], in fp32: `newest` and the ring's others, oldest first."""
    i = tl.arange(0, LP)
    rows = tl.load(
        ring[None, :] + ((n + i) % L)[:, None] * H * D,
        mask=(i < L - 1)[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    rows = tl.where((i == L - 1)[:, None], newest[None, :], rows).to(tl.float32)
    weight = tl.load(score, mask=d < D, other=0.0).to(tl.float32)
    # A score is rounded where training rounds it: between the product and the pool.
    logit = tl.sum(rows * weight[None, :], 1).to(newest.dtype).to(tl.float32)
    logit += tl.load(position + i * H, mask=i < L, other=0.0).to(tl.float32)
    logit = tl.where(i < L, logit, -1.0e30)
    weight = tl.exp(logit - tl.max(logit, 0))
    return tl.sum(rows * weight[:, None], 0) / tl.sum(weight, 0)
