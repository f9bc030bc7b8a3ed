"""The window branch: causal attention to the last `window` tokens of the document."""

from __future__ import annotations

import torch

from kernels.nsa.flash import Keys, flash_backward, flash_forward


def window_forward(q, k, v, cu_seqlens, max_seqlen: int, window: int, scale: float):
    """Attention of every token to the last `window` tokens, itself included.

    q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], bf16 or fp16 (fp32 works, slowly); documents
    delimited by cu_seqlens int32 [N + 1]; window >= max_seqlen is full causal attention.
    Returns o [T, H, Dv] in q's dtype and lse [T, H] fp32, natural logarithm.
    """
    keys = _keys(cu_seqlens, max_seqlen, window)
    return flash_forward(q, k, v, cu_seqlens, keys, scale)


def window_and_merge(
    q, k, v, gates, o_cmp, o_sel, cu_seqlens, max_seqlen: int, window: int, scale: float
):
    """window_forward, and the gate (Eq. 5) on its rows before they leave the registers.

    gates [T, H, 3]; o_cmp and o_sel [T, H, Dv] in q's dtype, contiguous. Returns the merged output
    [T, H, Dv], then o and lse.
    """
    out = torch.empty_like(o_cmp)
    merge = gates.contiguous(), o_cmp, o_sel, out
    keys = _keys(cu_seqlens, max_seqlen, window)
    return out, *flash_forward(q, k, v, cu_seqlens, keys, scale, merge)


def window_backward(
    do, q, k, v, lse, delta, cu_seqlens, max_seqlen: int, window: int, scale: float, dq=None
):
    """Gradients dq, dk, dv of window_forward.

    delta [T, H] fp32 = sum(dO * O). A dq that is given is added to in place.
    """
    keys = _keys(cu_seqlens, max_seqlen, window)
    return flash_backward(do, q, k, v, lse, delta, cu_seqlens, max_seqlen, keys, scale, dq)


def _keys(cu_seqlens, max_seqlen: int, window: int) -> Keys:
    return Keys(cu_seqlens, 1, 0, window if window < max_seqlen else None)
