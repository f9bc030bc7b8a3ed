"""The whole operator on CUDA against the float64 twin: every branch, every gradient, twice the same."""

import pytest
import torch

from kernels.nsa import reference
from kernels.nsa.compress import mean_pool
from kernels.nsa.geometry import Geometry
from kernels.nsa.ops import nsa_attention

pytestmark = pytest.mark.gpu

PAPER = Geometry()
SMALL = Geometry(8, 4, 32, 6, 100)
ALL = Geometry(num_selected=0)
HEADS = [(1, 1, 64), (2, 1, 64), (6, 2, 64), (16, 4, 64), (16, 4, 128), (16, 1, 128), (12, 1, 96)]


def make(lengths, heads, kv_heads, dim, geometry, value_dim=None, dtype=torch.bfloat16):
    torch.manual_seed(0)
    tokens, rows = sum(lengths), geometry.capacity(sum(lengths))
    shapes = [(tokens, heads, dim)]
    for count in (rows, tokens, tokens):
        shapes += [(count, kv_heads, dim), (count, kv_heads, value_dim or dim)]
    tensors = [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]
    tensors.append(torch.rand(tokens, heads, 3, device="cuda", dtype=dtype))
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    return [x.requires_grad_() for x in tensors], cu_seqlens


def twin(tensors, cu_seqlens, max_seqlen, geometry, indices, dout):
    """Output and gradients of the float64 twin, with the selection given."""
    x = [t.detach().double() for t in tensors]
    q, kc, vc, ks, vs, kw, vw, gates = x
    scale, docs = q.shape[-1] ** -0.5, (cu_seqlens, max_seqlen)
    outs = [
        reference.compressed_forward(q, kc, vc, *docs, geometry, scale),
        reference.selected_forward(q, ks, vs, indices, *docs, geometry, scale),
        reference.window_forward(q, kw, vw, *docs, geometry.window, scale),
    ]
    do = [g.unsqueeze(-1) * dout.double() for g in gates.unbind(2)]
    stats = [(lse, reference.row_delta(d, o)) for d, (o, lse) in zip(do, outs, strict=True)]
    grads = [
        reference.compressed_backward(do[0], q, kc, vc, *stats[0], *docs, geometry, scale),
        reference.selected_backward(do[1], q, ks, vs, *stats[1], indices, *docs, geometry, scale),
        reference.window_backward(do[2], q, kw, vw, *stats[2], *docs, geometry.window, scale),
    ]
    dq = sum(g[0] for g in grads)
    dgates = torch.stack([(dout.double() * o).sum(-1) for o, _ in outs], -1)
    merged = reference.merge_branches(gates, *(o for o, _ in outs))
    return merged, [dq, *(g for branch in grads for g in branch[1:]), dgates]


def error(got, want):
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("heads, kv_heads, dim", HEADS)
@pytest.mark.parametrize("geometry", [PAPER, SMALL, ALL], ids=["paper", "small", "all"])
@pytest.mark.parametrize("lengths", [[17, 0, 2048, 3, 731], [3001]], ids=str)
def test_exact_and_deterministic(heads, kv_heads, dim, geometry, lengths):
    tensors, cu_seqlens = make(lengths, heads, kv_heads, dim, geometry)
    dout = torch.randn(sum(lengths), heads, dim, device="cuda", dtype=torch.bfloat16)
    out, indices = nsa_attention(*tensors, cu_seqlens, max(lengths), geometry)
    grads = torch.autograd.grad(out, tensors, dout)
    read = indices
    if geometry == ALL:
        token = torch.arange(sum(lengths), dtype=torch.int32, device="cuda")
        own = (token - cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]) // 64
        block = torch.arange(48, dtype=torch.int32, device="cuda")
        read = block.where(block <= own[:, None], -1).repeat(kv_heads, 1, 1)
    want, want_grads = twin(tensors, cu_seqlens, max(lengths), geometry, read, dout)
    assert error(out, want) < 5e-3
    names = ("q", "k_cmp", "v_cmp", "k_sel", "v_sel", "k_win", "v_win", "gates")
    for name, g, w in zip(names, grads, want_grads, strict=True):
        assert g.isfinite().all(), name
        assert error(g, w) < 1e-2 if w.any() else not g.any(), (name, error(g, w))

    again, same = nsa_attention(*tensors, cu_seqlens, max(lengths), geometry)
    assert torch.equal(again, out) and torch.equal(same, indices)
    for g, h in zip(grads, torch.autograd.grad(again, tensors, dout), strict=True):
        assert torch.equal(g, h)


def test_a_single_token_copies_its_value():
    tensors, cu_seqlens = make([1], 4, 2, 64, PAPER)
    out, _ = nsa_attention(*tensors, cu_seqlens, 1, PAPER)
    v_sel, v_win, gates = tensors[4].float(), tensors[6].float(), tensors[7].float()
    want = gates[..., 1:2] * v_sel.repeat_interleave(2, 1)
    want = want + gates[..., 2:] * v_win.repeat_interleave(2, 1)
    torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=1e-2)
    for g in torch.autograd.grad(out.sum(), tensors):
        assert g.isfinite().all()


@pytest.mark.parametrize("heads, kv_heads, dim", HEADS)
def test_selection_is_the_twins_up_to_ties(heads, kv_heads, dim):
    lengths = [2048, 5, 1500]
    tensors, cu_seqlens = make(lengths, heads, kv_heads, dim, PAPER)
    _, got = nsa_attention(*tensors, cu_seqlens, max(lengths), PAPER)
    q, kc, vc = (t.detach().double() for t in tensors[:3])
    args = (cu_seqlens, max(lengths), PAPER, dim**-0.5)
    _, lse = reference.compressed_forward(q, kc, vc, *args)
    want = reference.select_blocks(q, kc, lse, *args)
    assert (got.sort(-1).values != want.sort(-1).values).any(-1).float().mean() < 1e-3


def test_compiles_without_graph_breaks():
    tensors, cu_seqlens = make([300, 700], 16, 4, 64, PAPER)
    torch.library.opcheck(
        torch.ops.nsa.attention, (*tensors, cu_seqlens, 700, PAPER.numbers(), 0.125),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    compiled = torch.compile(nsa_attention, fullgraph=True)
    expected, _ = nsa_attention(*tensors, cu_seqlens, 700, PAPER)
    got, _ = compiled(*tensors, cu_seqlens, 700, PAPER)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("heads, kv_heads, dim", [(16, 4, 64), (16, 4, 128), (16, 1, 128)])
def test_a_captured_step_follows_its_inputs(heads, kv_heads, dim):
    """Forward and backward in one CUDA graph, replayed with other numbers and other documents."""
    (q, _, _, *rest), cu_seqlens = make([700, 1, 1347], heads, kv_heads, dim, PAPER)
    dout, leaves = torch.randn_like(q), [q, *rest]

    def step():
        pooled = [mean_pool(x, cu_seqlens, PAPER) for x in rest[:2]]
        out, indices = nsa_attention(q, *pooled, *rest, cu_seqlens, 2048, PAPER)
        return out, indices, *torch.autograd.grad(out, leaves, dout)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [x.detach() for x in step()]
    for lengths in ([700, 1, 1347], [5, 2024, 19], [2048, 0, 0]):
        cu_seqlens.copy_(torch.tensor([0, *lengths]).cumsum(0))
        with torch.no_grad():
            for x in (dout, q, *rest[:-1]):
                x.normal_()
            rest[-1].uniform_()
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
