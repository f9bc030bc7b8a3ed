"""The NSA operator: three branches, one gate, one autograd node.

Two implementations of one contract: Triton kernels on CUDA tensors, the plain torch twin
(kernels/nsa/reference.py) on any other device. Both are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.nsa import reference
from kernels.nsa.geometry import Geometry, causal_pairs


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_sel: Tensor,
    v_sel: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    geometry: Geometry,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Native Sparse Attention over packed documents (arXiv 2502.11089, Eq. 5):

        o_t = sum_c g_t^c * Attn(q_t, K^c, V^c),  c in {compressed, selected, window}

    q [T, H, Dk]; k_sel, k_win [T, Hkv, Dk]; v_sel, v_win [T, Hkv, Dv]; k_cmp [C, Hkv, Dk] and
    v_cmp [C, Hkv, Dv] with C = geometry.capacity(T) rows laid out by geometry.compressed_offsets;
    gates [T, H, 3] in the branch order above, already passed through the sigmoid (the backward
    needs them not negative); cu_seqlens int32 [N + 1] from 0 to T; max_seqlen the longest document
    in tokens (an upper bound will do); scale defaults to Dk ** -0.5. Any strides. With
    geometry.num_selected = 0 the selected branch attends to the whole past: a dense warm-up.

    Returns the output [T, H, Dv] in q's dtype, and the selected blocks int32 [Hkv, T, n] (see
    reference.select_blocks), through which no gradient flows.
    Raises ValueError when shapes do not fit together.
    """
    _check(q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, geometry)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Kernels go by shapes alone; a view, such as a part of a wider projection, is copied for them.
    inputs = (x.contiguous() for x in (q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates))
    outputs = _attention(*inputs, cu_seqlens, max_seqlen, geometry.numbers(), scale)
    return outputs[0], outputs[-1]


def _check(q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, geometry) -> None:
    tokens, heads, dim = q.shape
    kv_heads, value_dim = k_sel.shape[1], v_sel.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide into {kv_heads} key/value heads.")
    rows = geometry.capacity(tokens)
    expected = {
        "k_cmp": (k_cmp, (rows, kv_heads, dim)),
        "v_cmp": (v_cmp, (rows, kv_heads, value_dim)),
        "k_sel": (k_sel, (tokens, kv_heads, dim)),
        "v_sel": (v_sel, (tokens, kv_heads, value_dim)),
        "k_win": (k_win, (tokens, kv_heads, dim)),
        "v_win": (v_win, (tokens, kv_heads, value_dim)),
        "gates": (gates, (tokens, heads, 3)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"NSA {name} has shape {tuple(x.shape)}; q asks for {shape}.")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError("cu_seqlens must be a one-dimensional int32 tensor, documents + 1 long.")


def _backend(q: Tensor):
    """The module-like set of branch functions for q's device."""
    return _triton() if q.is_cuda else reference


def _triton() -> SimpleNamespace:
    from kernels.nsa import compressed, gates, selected, selected_backward, selection, window

    return SimpleNamespace(
        compressed_forward=compressed.compressed_forward,
        compressed_backward=compressed.compressed_backward,
        select_blocks=selection.select_blocks,
        selected_forward=selected.selected_forward,
        selected_backward=selected_backward.selected_backward,
        window_forward=window.window_forward,
        window_and_merge=window.window_and_merge,
        window_backward=window.window_backward,
        gate_backward=gates.gate_backward,
    )


@torch.library.custom_op("nsa::attention", mutates_args=())
def _attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_sel: Tensor,
    v_sel: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    geometry: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, then o and lse of each branch (what the backward needs), then the selected blocks."""
    run, geo, docs = _backend(q), Geometry(*geometry), (cu_seqlens, max_seqlen)
    o_cmp, lse_cmp = run.compressed_forward(q, k_cmp, v_cmp, *docs, geo, scale)
    if geo.num_selected:
        indices = run.select_blocks(q, k_cmp, lse_cmp, *docs, geo, scale)
        o_sel, lse_sel = run.selected_forward(q, k_sel, v_sel, indices, *docs, geo, scale)
    else:
        indices = q.new_empty(k_sel.shape[1], len(q), 0, dtype=torch.int32)
        o_sel, lse_sel = run.window_forward(q, k_sel, v_sel, *docs, max_seqlen, scale)
    out, o_win, lse_win = run.window_and_merge(
        q, k_win, v_win, gates, o_cmp, o_sel, *docs, geo.window, scale
    )
    return out, o_cmp, lse_cmp, o_sel, lse_sel, o_win, lse_win, indices


@_attention.register_fake
def _(q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, max_seqlen, geometry, scale):
    tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    branches = []
    for _ in range(3):
        branches.append(q.new_empty(tokens, heads, v_sel.shape[2]))
        branches.append(q.new_empty(tokens, heads, dtype=lse_dtype))
    num_selected = Geometry(*geometry).num_selected
    indices = q.new_empty(k_sel.shape[1], tokens, num_selected, dtype=torch.int32)
    return q.new_empty(tokens, heads, v_sel.shape[2]), *branches, indices


@torch.library.custom_op("nsa::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_sel: Tensor,
    v_sel: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    o_cmp: Tensor,
    lse_cmp: Tensor,
    o_sel: Tensor,
    lse_sel: Tensor,
    o_win: Tensor,
    lse_win: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    geometry: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run, geo, docs = _backend(q), Geometry(*geometry), (cu_seqlens, max_seqlen)
    dgates, lse, delta = run.gate_backward(
        dout, gates, (o_cmp, o_sel, o_win), (lse_cmp, lse_sel, lse_win)
    )
    selected = dout, q, k_sel, v_sel, lse[1], delta[1]
    if geo.num_selected:
        dq, dk_sel, dv_sel = run.selected_backward(*selected, indices, *docs, geo, scale)
    else:
        dq, dk_sel, dv_sel = run.window_backward(*selected, *docs, max_seqlen, scale)
    dq, dk_cmp, dv_cmp = run.compressed_backward(
        dout, q, k_cmp, v_cmp, lse[0], delta[0], *docs, geo, scale, dq
    )
    dq, dk_win, dv_win = run.window_backward(
        dout, q, k_win, v_win, lse[2], delta[2], *docs, geo.window, scale, dq
    )
    return dq, dk_cmp, dv_cmp, dk_sel, dv_sel, dk_win, dv_win, dgates


@_attention_backward.register_fake
def _(dout, q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, *rest):
    inputs = (q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.max_seqlen, ctx.geometry, ctx.scale = inputs
    cu_seqlens = tensors.pop()
    _, *branches, indices = output
    ctx.save_for_backward(*tensors, *branches, indices, cu_seqlens)
    ctx.mark_non_differentiable(*branches, indices)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 12
    grads = _attention_backward(
        dout.contiguous(), *ctx.saved_tensors, ctx.max_seqlen, ctx.geometry, ctx.scale
    )
    return *grads, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention_flops(tokens: int, heads: int, dims: int, geometry: Geometry) -> dict[str, int]:
    """Floating-point operations of one forward over one document of `tokens`, by branch.

    dims = Dk + Dv; a multiply-add counts as two. The pairs are those the definition asks for, not
    those a kernel's padding executes; the scores of the selection are the compressed branch's.
    """
    chosen = geometry.num_selected * geometry.select_block or tokens
    pairs = {
        "compressed": causal_pairs(tokens, tokens) // geometry.compress_stride,
        "selected": causal_pairs(tokens, chosen),
        "window": causal_pairs(tokens, geometry.window),
    }
    return {branch: 2 * heads * dims * count for branch, count in pairs.items()}


@register_flop_formula(torch.ops.nsa.attention)
def _forward_flops(q, k_cmp, v_cmp, k_sel, v_sel, *rest, out_shape=None, **kwargs) -> int:
    geometry = Geometry(*rest[-2])
    dims = q[2] + v_sel[2]
    return sum(attention_flops(q[0], q[1], dims, geometry).values())


@register_flop_formula(torch.ops.nsa.attention_backward)
def _backward_flops(dout, q, k_cmp, v_cmp, k_sel, v_sel, *rest, out_shape=None, **kwargs) -> int:
    # Five products against the forward's two: S again, dP, dV, dQ, dK.
    geometry = Geometry(*rest[-2])
    dims = q[2] + v_sel[2]
    return 5 * sum(attention_flops(q[0], q[1], dims, geometry).values()) // 2
