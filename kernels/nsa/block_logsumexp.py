"""How much attention some queries would pay to each selection block, if they saw all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = -1e30  # of a block that a query sees no token of
CHUNK_SCORES = 1 << 26  # that the twin holds at a time


@torch.library.custom_op("nsa::block_logsumexp", mutates_args=())
def block_logsumexp(
    q: Tensor, k: Tensor, rows: Tensor, begins: Tensor, firsts: Tensor, ends: Tensor, size: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """log sum_t exp(scale q . k_t) over the tokens t of a block that a query may see, [H, R, B], at
    least fp32; LOW where there are none. Not differentiable.

    q [R, H, D] of the queries at tokens rows, int32 [R], ascending, in documents that begin at begins,
    int32 [R]; k [T, Hkv, D]. Block b holds the tokens firsts[b] ... ends[b] - 1, int32 [B], at most
    `size` of them.
    """
    q, k = q.contiguous(), k.contiguous()
    if q.is_cuda:
        from kernels.nsa.block_logsumexp_triton import forward  # needs a working Triton

        return forward(q, k, rows, begins, firsts, ends, size, scale)
    return twin(q, k, rows, begins, firsts, ends, size, scale)


@block_logsumexp.register_fake
def _(q, k, rows, begins, firsts, *rest):
    wide = torch.promote_types(q.dtype, torch.float32)
    # Not by len(), with which every number of documents would be compiled anew.
    return q.new_empty(q.shape[1], rows.shape[0], firsts.shape[0], dtype=wide)


def twin(q, k, rows, begins, firsts, ends, size: int, scale: float) -> Tensor:
    """The same in plain torch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape[1], len(rows), len(firsts), dtype=wide)
    grouped = q.unflatten(1, (k.shape[1], -1))
    step = max(CHUNK_SCORES // (q.shape[1] * len(rows) * size), 1)  # blocks
    for start in range(0, len(firsts), step):
        part = slice(start, start + step)
        tokens = firsts[part, None] + torch.arange(size, device=q.device, dtype=torch.int32)
        tokens = torch.where(tokens < ends[part, None], tokens, -1).flatten()
        scores = torch.einsum("nkgd,mkd->kgnm", grouped, k[tokens]).to(wide) * scale
        seen = (tokens >= begins[:, None]) & (tokens <= rows[:, None])
        scores = scores.masked_fill(~seen, LOW).flatten(0, 1)
        out[:, :, part] = scores.unflatten(-1, (-1, size)).logsumexp(-1)
    return out
