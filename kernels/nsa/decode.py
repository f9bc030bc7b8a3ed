"""Attention of one new token per sequence against its caches: the operators of a decode step.

Two implementations of one contract: Triton kernels on CUDA tensors, which never wait for the device
and so can be captured in a CUDA graph, and the plain torch twin on any other device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.nsa import reference
from kernels.nsa.geometry import Geometry


def nsa_decode(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_sel: Tensor,
    v_sel: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    lengths: Tensor,
    geometry: Geometry,
    scale: float | None = None,
) -> Tensor:
    """The newest token's Native Sparse Attention in each of B sequences (arXiv 2502.11089, Eq. 5).

    q [B, H, Dk] and gates [B, H, 3] (compressed, selected, window; after the sigmoid) belong to the
    newest token; lengths int32 [B] counts a sequence's tokens with it. Caches, whose rows up to the
    length are filled: k_sel, k_win [B, S, Hkv, Dk], v_sel, v_win [B, S, Hkv, Dv], and k_cmp, v_cmp
    [B, C, Hkv, D] with one row per complete compressed block. All contiguous. scale defaults to
    Dk ** -0.5. Returns [B, H, Dv] in q's dtype; an empty sequence gives zeros.
    Raises ValueError when shapes do not fit together, or for geometry.num_selected = 0.
    """
    geometry.check_selects()
    batch, heads, dim = q.shape
    (tokens, kv_heads), (rows, value_dim) = k_sel.shape[1:3], (k_cmp.shape[1], v_sel.shape[3])
    caches = {
        "k_cmp": (k_cmp, (batch, rows, kv_heads, dim)),
        "v_cmp": (v_cmp, (batch, rows, kv_heads, value_dim)),
        "k_sel": (k_sel, (batch, tokens, kv_heads, dim)),
        "v_sel": (v_sel, (batch, tokens, kv_heads, value_dim)),
        "k_win": (k_win, (batch, tokens, kv_heads, dim)),
        "v_win": (v_win, (batch, tokens, kv_heads, value_dim)),
    }
    _check(q, kv_heads, lengths, {**caches, "gates": (gates, (batch, heads, 3))})
    scale = dim**-0.5 if scale is None else scale
    return _decode(
        q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, lengths, geometry.numbers(), scale
    )


def window_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int, scale: float
) -> Tensor:
    """The newest token's attention to the last `window` tokens, itself included, in B sequences.

    q [B, H, Dk]; caches k [B, S, Hkv, Dk], v [B, S, Hkv, Dv]; lengths as in nsa_decode. A window
    of at least S is full attention. Returns [B, H, Dv] in q's dtype; an empty sequence gives zeros.
    """
    batch, tokens, kv_heads, value_dim = v.shape
    caches = {
        "k": (k, (batch, tokens, kv_heads, q.shape[2])),
        "v": (v, (q.shape[0], tokens, kv_heads, value_dim)),
    }
    _check(q, kv_heads, lengths, caches)
    return _decode_window(q, k, v, lengths, window, scale)


def _check(q, kv_heads, lengths, expected) -> None:
    if q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} query heads do not divide into {kv_heads} key/value heads.")
    for name, (x, shape) in {**expected, "lengths": (lengths, q.shape[:1])}.items():
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"Decode {name} has shape {tuple(x.shape)}; q asks for {shape}.")
        if not x.is_contiguous():
            raise ValueError(f"Decode {name} must be contiguous.")
    if lengths.dtype != torch.int32:
        raise ValueError(f"Decode lengths must be int32, not {lengths.dtype}.")


@torch.library.custom_op("nsa::decode", mutates_args=())
def _decode(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_sel: Tensor,
    v_sel: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    lengths: Tensor,
    geometry: Sequence[int],
    scale: float,
) -> Tensor:
    caches, geometry = (k_cmp, v_cmp, k_sel, v_sel, k_win, v_win), Geometry(*geometry)
    q, gates = q.contiguous(), gates.contiguous()
    if q.is_cuda:
        from kernels.nsa.decode_triton import decode_step  # needs a working Triton

        return decode_step(q, *caches, gates, lengths, geometry, scale)
    past, cu_seqlens, empty = _as_new_tokens(lengths)
    out = reference.nsa_cached(q, *caches, gates, cu_seqlens, past, geometry, scale)
    return out.masked_fill(empty, 0.0)


@torch.library.custom_op("nsa::decode_window", mutates_args=())
def _decode_window(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int, scale: float
) -> Tensor:
    q = q.contiguous()
    if q.is_cuda:
        from kernels.nsa.decode_triton import window_step  # needs a working Triton

        return window_step(q, k, v, lengths, window, scale)
    past, cu_seqlens, empty = _as_new_tokens(lengths)
    documents = reference.cached_documents(cu_seqlens, past, k.shape[1], 0)
    tiles = reference.window_tiles(q, documents, window)
    out, _ = reference.attention_forward(q, k.flatten(0, 1), v.flatten(0, 1), tiles, scale)
    return out.masked_fill(empty, 0.0)


def _as_new_tokens(lengths: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """What the twin asks for: tokens before each new one, cu_seqlens; and the empty sequences."""
    past = (lengths - 1).clamp(min=0).tolist()
    cu_seqlens = torch.arange(len(past) + 1, dtype=torch.int32, device=lengths.device)
    return past, cu_seqlens, (lengths == 0)[:, None, None]


@_decode.register_fake
def _(q, k_cmp, v_cmp, *rest):
    return q.new_empty(*q.shape[:2], v_cmp.shape[3])


@_decode_window.register_fake
def _(q, k, v, lengths, window, scale):
    return q.new_empty(*q.shape[:2], v.shape[3])


# Of full caches: what a sequence has of them is on the device. A multiply-add counts as two.
@register_flop_formula(torch.ops.nsa.decode)
def _decode_flops(q, k_cmp, v_cmp, k_sel, v_sel, *rest, out_shape=None, **kwargs) -> int:
    geometry = Geometry(*rest[-2])
    chosen = min(geometry.num_selected * geometry.select_block, k_sel[1])
    rows = k_cmp[1] + chosen + min(geometry.window, k_sel[1])
    return 2 * q[0] * q[1] * (q[2] + v_sel[3]) * rows


@register_flop_formula(torch.ops.nsa.decode_window)
def _decode_window_flops(q, k, v, lengths, window, *rest, out_shape=None, **kwargs) -> int:
    return 2 * q[0] * q[1] * (q[2] + v[3]) * min(window, k[1])
