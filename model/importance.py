"""Teaching NSA's importance what to select.

No gradient flows through the choice of blocks, so the compressed branch learns what to select only
by what it reads itself. The lesson tells it: by the attention that the selected branch would pay to
each block if it saw all tokens, as DSA's indexer is taught (arXiv 2512.02556, section 2.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.dense import full_attention
from kernels.nsa.geometry import Geometry

QUERIES = 256  # of a pass that are taught; the lesson holds their attention to all its tokens
GOLDEN = (5**0.5 - 1) / 2


class DenseSelection(TorchFunctionMode):
    """Inside `with DenseSelection()`, NSA's selected branch attends to all tokens, for the first part of
    a training, in blocks that are not compiled."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.nsa.attention.default:
            return function(*args, **(kwargs or {}))
        q, _, _, k_sel, v_sel, _, _, gates, cu_seqlens, longest, _, scale = args
        others = gates * torch.arange(3, device=gates.device).ne(1)
        out, *rest = function(*args[:7], others, *args[8:])
        everything = full_attention(q, k_sel, v_sel, cu_seqlens, longest, scale)
        return out + gates[..., 1:2] * everything, *rest


def taught_queries(num_tokens: int, device: torch.device) -> Tensor:
    """Rows int64 [min(QUERIES, T)], one in each of as many equal stretches: the same for every batch,
    at places that fall on all parts of a block alike."""
    if num_tokens <= QUERIES:
        return torch.arange(num_tokens, device=device)
    stretch = torch.arange(QUERIES, device=device, dtype=torch.float64)
    return ((stretch + stretch * GOLDEN % 1) * (num_tokens / QUERIES)).long()


def selection_kl(
    q: Tensor, k_cmp: Tensor, k_sel: Tensor, cu_seqlens: Tensor, geometry: Geometry, scale: float
) -> Tensor:
    """KL(dense attention to each block || importance of each block), mean over taught_queries and KV
    heads: an fp32 scalar.

    q [T, H, D], k_cmp [C, Hkv, D] and k_sel [T, Hkv, D] of packed documents, as those of
    kernels.nsa.ops.nsa_attention. Both sides are means over a KV head's query heads, over the blocks
    that are not taken always, and normalised. The dense attention is detached, and its mass on those
    blocks weighs the query. No gradient reaches k_sel.
    """
    num_tokens, size = len(q), geometry.select_block
    rows = taught_queries(num_tokens, q.device)
    document = torch.searchsorted(cu_seqlens, rows.int(), right=True) - 1  # of each row
    begin = cu_seqlens[document]

    # Selection blocks of all documents, one after another; those past the last document's are unused.
    offsets = F.pad((cu_seqlens.diff() + size - 1) // size, (1, 0)).cumsum(0)
    block = torch.arange(num_tokens // size + len(cu_seqlens) - 1, device=q.device)
    owner = torch.searchsorted(offsets, block, right=True) - 1
    used = owner < len(cu_seqlens) - 1
    owner = owner.clamp(max=len(cu_seqlens) - 2)
    number = block - offsets[owner]  # in its document
    first = cu_seqlens[owner] + number * size  # token
    own = used & (owner == document[:, None])  # [R, blocks]
    last = (rows - begin) // size - geometry.num_local  # block that the importance decides about
    free = own & (number >= geometry.num_initial) & (number <= last[:, None])

    with torch.no_grad():
        tokens = (first[:, None] + torch.arange(size, device=q.device)).flatten()
        visible = own.repeat_interleave(size, 1) & (tokens <= rows[:, None])
        keys = k_sel[tokens.clamp(max=num_tokens - 1)]
        dense = _attention(q[rows], keys, visible, scale).unflatten(-1, (-1, size)).sum(-1) * free
        mass = dense.sum(-1, keepdim=True)
        target = dense / mass.clamp(min=1e-9)

    start, there = geometry.block_tokens(cu_seqlens, num_tokens)
    start = start[:, 0]  # of compressed blocks
    end = start + geometry.compress_block
    visible = there & (start >= begin[:, None]) & (end <= rows[:, None] + 1)
    shared = torch.minimum(end[:, None], torch.minimum(first + size, cu_seqlens[owner + 1]))
    shared = (shared - torch.maximum(start[:, None], first)).clamp(min=0)  # tokens
    paid = _attention(q[rows], k_cmp, visible, scale)
    importance = (paid @ shared.to(paid.dtype)) * free
    importance = importance / importance.sum(-1, keepdim=True).clamp(min=1e-9)
    kl = torch.xlogy(target, target) - target * importance.clamp(min=1e-9).log()
    return (kl * mass).sum() / mass.numel()


def _attention(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax weights [Hkv, R, M], the mean over each KV head's query heads; 0 where nothing is
    visible. q [R, H, D], k [M, Hkv, D], visible bool [R, M]."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("nkgd,mkd->kgnm", grouped, k).to(wide) * scale
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    return weights.mean(1)
