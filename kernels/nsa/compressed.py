"""The compressed branch: attention to one learned summary per block of l tokens (Eq. 7)."""

from __future__ import annotations

from kernels.nsa.flash import Keys, flash_backward, flash_forward
from kernels.nsa.geometry import Geometry
from kernels.nsa.tiles import compressed_offsets


def compressed_forward(
    q, k_cmp, v_cmp, cu_seqlens, max_seqlen: int, geometry: Geometry, scale: float
):
    """Attention of every token to the compressed blocks that are complete at its position.

    q [T, H, Dk], k_cmp [C, Hkv, Dk], v_cmp [C, Hkv, Dv], bf16 or fp16 (fp32 works, slowly), with
    the rows of document i at geometry.compressed_offsets(cu_seqlens)[i]; rows past the last
    document must be finite. Returns o [T, H, Dv] in q's dtype and lse [T, H] fp32, natural
    logarithm; a token before the first complete block gets o = 0 and lse = -inf.
    """
    keys = _keys(cu_seqlens, geometry)
    return flash_forward(q, k_cmp, v_cmp, cu_seqlens, keys, scale)


def compressed_backward(
    do, q, k_cmp, v_cmp, lse, delta, cu_seqlens, max_seqlen: int, geometry: Geometry, scale: float,
    dq=None,
):  # fmt: skip
    """Gradients dq, dk_cmp, dv_cmp of compressed_forward; zero for rows no document uses.

    delta [T, H] fp32 = sum(dO * O). A dq that is given is added to in place.
    """
    keys = _keys(cu_seqlens, geometry)
    inputs = do, q, k_cmp, v_cmp, lse, delta, cu_seqlens, max_seqlen
    return flash_backward(*inputs, keys, scale, dq)


def _keys(cu_seqlens, geometry: Geometry) -> Keys:
    offsets = compressed_offsets(cu_seqlens, geometry)
    return Keys(offsets, geometry.compress_stride, geometry.compress_block - 1, None)
