"""Teaching NSA's importance what to select.

No gradient flows through the choice of blocks, so the compressed branch learns what to select only
by what it reads itself. The lesson tells it: by the attention that the selected branch would pay to
each block if it saw all tokens, as DSA's indexer is taught (arXiv 2512.02556, section 2.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.nsa.block_logsumexp import LOW, block_logsumexp
from kernels.nsa.geometry import Geometry

GOLDEN = (5**0.5 - 1) / 2
CANDIDATES = 8  # for each query that is taught


def candidates(num_tokens: int, count: int, device: torch.device) -> Tensor:
    """Rows int64 [count], ascending, one in each of equal stretches, or all of a pass of less than twice
    as many tokens: the same for every batch, at places that fall on all parts of a block alike. Passes
    of another size have other candidates."""
    if num_tokens < 2 * count:
        return torch.arange(num_tokens, device=device)
    stretch = torch.arange(count, device=device, dtype=torch.float64)
    return ((stretch + stretch * GOLDEN % 1) * (num_tokens / count)).long()


def selection_kl(
    q: Tensor, k_cmp: Tensor, k_sel: Tensor, cu_seqlens: Tensor, geometry: Geometry, scale: float,
    queries: int,
) -> Tensor:  # fmt: skip
    """KL(dense attention to each block || importance of each block), mean over so many queries and KV
    heads: an fp32 scalar.

    q [T, H, D], k_cmp [C, Hkv, D] and k_sel [T, Hkv, D] of packed documents, as those of
    kernels.nsa.ops.nsa_attention. Both sides are means over a KV head's query heads, over the blocks
    that are not taken always, and normalised. The dense attention is detached, and its mass on those
    blocks weighs the query. No gradient reaches k_sel. Most queries look at what is near: a KV head is
    taught those, of CANDIDATES times as many, that pay the most to one of those blocks.
    """
    num_tokens, size = len(q), geometry.select_block
    rows = candidates(num_tokens, CANDIDATES * queries, q.device)
    document = torch.searchsorted(cu_seqlens, rows.int(), right=True) - 1  # of each row
    begin = cu_seqlens[document][:, None]

    # Selection blocks of all documents, one after another; those past the last document's are unused.
    offsets = F.pad((cu_seqlens.diff() + size - 1) // size, (1, 0)).cumsum(0, dtype=torch.int32)
    block = torch.arange(num_tokens // size + len(cu_seqlens) - 1, device=q.device)
    owner = torch.searchsorted(offsets, block.int(), right=True) - 1
    used = owner < len(cu_seqlens) - 1
    owner = owner.clamp(max=len(cu_seqlens) - 2)
    number = block - offsets[owner]  # in its document
    first, end = cu_seqlens[owner] + number.int() * size, cu_seqlens[owner + 1]  # tokens
    last = (rows[:, None] - begin) // size - geometry.num_local  # that the importance decides about
    free = used & (owner == document[:, None]) & (number >= geometry.num_initial) & (number <= last)

    with torch.no_grad():
        until = torch.where(used, torch.minimum(first + size, end), first)
        where = rows.int(), begin[:, 0], first, until, size
        dense = block_logsumexp(q[rows], k_sel, *where, scale).softmax(-1)
        dense = dense.unflatten(0, (k_sel.shape[1], -1)).mean(1) * free
        # Rounded, so that the last bits, which depend on how ranks share the work, hardly decide; of
        # equal ones the first are taken.
        peak = dense.amax(-1).bfloat16()
        chosen = peak.sort(stable=True, descending=True).indices[:, :queries]  # [Hkv, R]
        head = torch.arange(len(chosen), device=q.device)[:, None]
        dense = dense[head, chosen]
        mass = dense.sum(-1, keepdim=True)
        target = dense / mass.clamp(min=1e-9)
    rows, begin, free = rows[chosen], begin[chosen], free[chosen]

    start, there = geometry.block_tokens(cu_seqlens, num_tokens)
    start = torch.where(there, start[:, 0], -1)  # of compressed blocks
    stop = start + geometry.compress_block
    visible = (start >= begin) & (stop <= rows[..., None] + 1)  # [Hkv, R, C]
    shared = torch.minimum(stop[:, None], torch.minimum(first + size, end))
    shared = (shared - torch.maximum(start[:, None], first)).clamp(min=0)  # tokens [C, blocks]
    grouped = q.unflatten(1, (len(rows), -1))[rows, head] * scale  # [Hkv, R, G, D]
    scores = torch.einsum("kngd,mkd->kgnm", grouped, k_cmp).masked_fill(~visible[:, None], LOW)
    paid = scores.softmax(-1, dtype=target.dtype).mean(1) * visible
    importance = (paid.to(q.dtype) @ shared.to(q.dtype)).to(paid.dtype) * free
    importance = importance / importance.sum(-1, keepdim=True).clamp(min=1e-9)
    kl = torch.xlogy(target, target) - target * importance.clamp(min=1e-9).log()
    return (kl * mass).sum() / mass.numel()
