"""Teaching NSA's importance: from outside, at the operator, like model/probe.py.

No gradient flows through the choice of blocks, so the compressed branch learns what to select only
by what it reads itself. Here it is also told: by the attention that the selected branch would pay to
each block if it saw all tokens (as DSA's indexer is taught, arXiv 2512.02556, section 2.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.dense import full_attention
from kernels.nsa.geometry import Geometry

LONGEST = 8192  # tokens of a document: the lesson holds scores of all pairs


class ImportanceTeacher(TorchFunctionMode):
    """Inside `with ImportanceTeacher(…) as teacher`, a forward pass of blocks that are neither
    compiled nor computed again in the backward pass.

    dense  the selected branch attends to all tokens, for the first part of a training
    learn  `loss` grows by each layer's selection_kl; otherwise it stays 0
    """

    def __init__(self, dense: bool = False, learn: bool = True):
        super().__init__()
        self.dense, self.learn = dense, learn
        self.loss: Tensor | float = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.nsa.attention.default:
            return function(*args, **(kwargs or {}))
        q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, longest, geometry, scale = (
            args
        )
        if self.learn:
            sizes = cu_seqlens, longest, Geometry(*geometry), scale
            self.loss = self.loss + selection_kl(q, k_cmp, k_sel, *sizes)
        if not self.dense:
            return function(*args)
        others = gates * torch.arange(3, device=gates.device).ne(1)
        out, *rest = function(*args[:7], others, *args[8:])
        everything = full_attention(q, k_sel, v_sel, cu_seqlens, longest, scale)
        return out + gates[..., 1:2] * everything, *rest


def selection_kl(
    q: Tensor, k_cmp: Tensor, k_sel: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    geometry: Geometry, scale: float,
) -> Tensor:  # fmt: skip
    """KL(dense attention to each block || importance of each block), mean over tokens and KV heads.

    Arguments as those of kernels.nsa.ops.nsa_attention. Both sides are means over a KV head's query
    heads, over the blocks that are not taken always, and normalised; the attention is detached, and
    its mass on those blocks weighs the token. Raises ValueError for documents past LONGEST.
    """
    if max_seqlen > LONGEST:
        raise ValueError(
            f"The importance is taught by dense attention, for documents of at most {LONGEST:,} "
            f"tokens, not {max_seqlen:,}; take shorter sequences or no selection KL."
        )
    total = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
    low = row = 0
    for length in _lengths(cu_seqlens, len(q), max_seqlen):
        own, count = slice(low, low + length), geometry.num_compressed(length)
        if count:
            total = total + _document(q[own], k_cmp[row : row + count], k_sel[own], geometry, scale)
        low, row = low + length, row + count
    return total / (len(q) * k_sel.shape[1])


def _lengths(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> list[int]:
    """Of the documents. Where all are the longest without a look at the device, so that the lesson can
    be part of a CUDA graph."""
    count = len(cu_seqlens) - 1
    equal = num_tokens == count * max_seqlen
    return [max_seqlen] * count if equal else cu_seqlens.diff().tolist()


def _document(q, k_cmp, k_sel, geometry: Geometry, scale: float) -> Tensor:
    """The sum over tokens and KV heads: q [n, H, D], k_cmp [c, Hkv, D], k_sel [n, Hkv, D]."""
    size, stride, length = geometry.select_block, geometry.compress_stride, geometry.compress_block
    token = torch.arange(len(q), device=q.device)
    first = torch.arange(0, len(q), size, device=q.device)  # of each selection block
    start = torch.arange(len(k_cmp), device=q.device) * stride  # of each compressed block
    own, block = token[:, None] // size, first // size
    free = (block >= geometry.num_initial) & (block <= own - geometry.num_local)  # [n, blocks]

    with torch.no_grad():
        dense = _attention(q, k_sel, token <= token[:, None], scale)
        dense = F.pad(dense, (0, len(first) * size - len(q))).unflatten(-1, (-1, size)).sum(-1)
        mass = (dense * free).sum(-1)  # [Hkv, n]
        target = dense * free / mass.clamp(min=1e-9)[..., None]
    ends = torch.minimum(start[:, None] + length, first + size)
    shared = (ends - torch.maximum(start[:, None], first)).clamp(min=0) / stride
    paid = _attention(q, k_cmp, start + length - 1 <= token[:, None], scale)
    importance = (paid @ shared.to(paid.dtype)) * free
    importance = importance / importance.sum(-1, keepdim=True).clamp(min=1e-9)
    kl = torch.xlogy(target, target) - target * importance.clamp(min=1e-9).log()
    return (kl.sum(-1) * mass).sum()


def _attention(q, k, visible, scale: float) -> Tensor:
    """Softmax weights [Hkv, n, m], the mean over each KV head's query heads; 0 where nothing is
    visible. q [n, H, D], k [m, Hkv, D], visible bool [n, m]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = torch.einsum("nkgd,mkd->kgnm", grouped, k.to(wide)) * scale
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible.any(-1, keepdim=True)
    return weights.mean(1)
