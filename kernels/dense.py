"""Dense attention over packed documents: full causal and sliding window.

One document goes to torch's scaled_dot_product_attention; packed documents and windows go to the
banded kernel that NSA's window branch uses too (Triton on CUDA, plain torch elsewhere).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.nsa import reference
from kernels.nsa.geometry import causal_pairs


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """Causal attention inside each document.

    q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], cu_seqlens int32 [N + 1]. Returns [T, H, Dv].
    """
    if len(cu_seqlens) == 2:
        return _sdpa(q, k, v, scale)
    if q.is_cuda or torch.compiler.is_compiling():  # a loop over documents can't be compiled
        return sliding_attention(q, k, v, cu_seqlens, max_seqlen, max_seqlen, scale)
    bounds = cu_seqlens.tolist()
    parts = [
        _sdpa(q[a:b], k[a:b], v[a:b], scale)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        if b > a
    ]
    return torch.cat(parts)


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
) -> Tensor:
    """Causal attention to the last `window` tokens of the document, the own one included."""
    rows = q.contiguous(), k.contiguous(), v.contiguous()  # kernels go by shapes alone
    return _window(*rows, cu_seqlens, max_seqlen, window, scale)[0]


def full_cached(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, past: list[int], scale: float):
    """New queries of B sequences, delimited by cu_seqlens, against caches k, v [B, S, Hkv, D].

    past counts each sequence's tokens before the new ones, which are in the cache already.
    """
    parts, bounds = [], cu_seqlens.tolist()
    for b, start in enumerate(past):
        low, high = bounds[b], bounds[b + 1]
        length = start + high - low
        parts.append(_sdpa(q[low:high], k[b, :length], v[b, :length], scale))
    return torch.cat(parts)


def sliding_cached(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, past: list[int], window: int, scale: float
):
    """As full_cached, over the last `window` tokens."""
    documents = reference.cached_documents(cu_seqlens, past, k.shape[1], 0)
    tiles = reference.window_tiles(q, documents, window)
    return reference.attention_forward(q, k.flatten(0, 1), v.flatten(0, 1), tiles, scale)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last R positions of a document of K tokens: q [R, H, D], k and v [K, Hkv, D]."""
    rows, length = q.shape[0], k.shape[0]
    mask, causal = None, True
    if rows != length:
        causal = False
        if rows > 1:
            mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o[0].transpose(0, 1)


def _backend(q: Tensor):
    if not q.is_cuda:
        return reference
    from kernels.nsa import gates, window  # need a working Triton

    return SimpleNamespace(
        window_forward=window.window_forward,
        window_backward=window.window_backward,
        row_delta=gates.row_delta,
    )


@torch.library.custom_op("nsa::window", mutates_args=())
def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _backend(q).window_forward(q, k, v, cu_seqlens, max_seqlen, window, scale)


@_window.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, window, scale):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[:2], dtype=lse_dtype)


@torch.library.custom_op("nsa::window_backward", mutates_args=())
def _window_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _backend(q)
    delta = run.row_delta(do, o)
    return run.window_backward(do, q, k, v, lse, delta, cu_seqlens, max_seqlen, window, scale)


@_window_backward.register_fake
def _(do, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 7
    grads = _window_backward(
        do.contiguous(), *ctx.saved_tensors, ctx.max_seqlen, ctx.window, ctx.scale
    )
    return *grads, None, None, None, None


_window.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.nsa.window)
def _forward_flops(q, k, v, *rest, out_shape=None, **kwargs) -> int:
    # As attention_flops counts: one document, the pairs that the definition asks for.
    return 2 * q[1] * (q[2] + v[2]) * causal_pairs(q[0], rest[-2])


@register_flop_formula(torch.ops.nsa.window_backward)
def _backward_flops(do, q, k, v, *rest, out_shape=None, **kwargs) -> int:
    return 5 * _forward_flops(q, k, v, *rest) // 2
