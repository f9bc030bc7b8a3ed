"""Gate and merge, and the operator as a whole from its Triton kernels, against the torch twin."""

from types import SimpleNamespace

import pytest
import torch

from kernels import dense
from kernels.nsa import csr, flash, gates, ops, reference, window
from kernels.nsa.geometry import Geometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("lengths, kv_heads, group, dim, dtype", [
    ([37, 0, 1, 50], 2, 3, 24, torch.float32), ([70, 5], 1, 6, 16, torch.float16),
    ([1], 1, 1, 64, torch.float16), ([3, 90], 1, 16, 32, torch.float16),
])  # fmt: skip
def test_the_windows_kernel_merges_as_separate_arithmetic_does(
    lengths, kv_heads, group, dim, dtype
):
    torch.manual_seed(0)
    tokens, heads = sum(lengths), kv_heads * group
    q, o_cmp, o_sel = (random(tokens, heads, dim, dtype=dtype) for _ in range(3))
    k, v = (random(tokens, kv_heads, dim, dtype=dtype) for _ in range(2))
    gate = torch.rand(3, tokens, heads, device=DEVICE).to(dtype).movedim(0, 2)
    gate[0, 0] = 0.0  # closed
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    docs = cu_seqlens, max(lengths), 20, dim**-0.5
    out, *branch = window.window_and_merge(q, k, v, gate, o_cmp, o_sel, *docs)
    for got, alone in zip(branch, window.window_forward(q, k, v, *docs), strict=True):
        assert torch.equal(got, alone)
    outs = [x.float() for x in (o_cmp, o_sel, branch[0])]
    want = reference.merge_branches(gate.float(), *outs).to(dtype)
    if DEVICE == "cpu":
        assert torch.equal(out, want)
    else:  # contracts products and sums
        torch.testing.assert_close(out, want)


def test_the_merged_rows_are_the_documents_only():
    rows, heads, dim, tokens = 40, 3, 16, 21
    q, o_cmp, o_sel, out = (random(rows, heads, dim) for _ in range(4))
    k, v = random(rows, 1, dim), random(rows, 1, dim)
    gate, before = torch.rand(rows, heads, 3, device=DEVICE), out.clone()
    cu_seqlens = torch.tensor([0, 5, tokens], device=DEVICE, dtype=torch.int32)
    keys = flash.Keys(cu_seqlens, 1, 0, 8)
    o, _ = flash.flash_forward(q, k, v, cu_seqlens, keys, 0.25, (gate, o_cmp, o_sel, out))
    want = reference.merge_branches(gate, o_cmp, o_sel, o)
    torch.testing.assert_close(out[:tokens], want[:tokens])
    assert torch.equal(out[tokens:], before[tokens:])


@pytest.mark.parametrize("tokens, heads, dim, dtype", [
    (37, 3, 24, torch.float32), (1, 1, 64, torch.float16), (0, 2, 16, torch.float32),
])  # fmt: skip
def test_the_backward_equals_the_twin(tokens, heads, dim, dtype):
    torch.manual_seed(0)
    dout, *outs = (random(tokens, heads, dim, dtype=dtype) for _ in range(4))
    lses = [random(tokens, heads) for _ in range(3)]
    gate = torch.rand(tokens, heads, 3, device=DEVICE).to(dtype)
    if tokens > 1:
        gate[3, 1] = 0.0  # closed
        lses[0][:5] = float("-inf")  # nothing to see
    tolerance = dict(rtol=2e-3, atol=2e-3) if dtype == torch.float16 else dict(rtol=1e-5, atol=1e-5)
    got = gates.gate_backward(dout, gate, outs, lses)
    exact = [x.double() for x in outs]
    want = reference.gate_backward(dout.double(), gate.double(), exact, lses)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), **tolerance)


@pytest.mark.parametrize("num_selected", [3, 0])
def test_the_whole_operator_from_its_kernels(monkeypatch, num_selected):
    if DEVICE == "cpu":
        monkeypatch.setattr(csr, "_SORT", 32)  # the interpreter sorts slowly
    torch.manual_seed(0)
    geometry = Geometry(8, 4, 16, num_selected, 16)
    lengths, heads, kv_heads, dim = [37, 0, 1, 20], 4, 2, 16
    tokens, rows = sum(lengths), geometry.capacity(sum(lengths))
    tensors = [random(tokens, heads, dim)]
    tensors += [random(n, kv_heads, dim) for n in (rows, rows, tokens, tokens, tokens, tokens)]
    gate = torch.rand(tokens, heads, 3, device=DEVICE)
    gate[5, 1, 1] = 0.0
    tensors = [x.requires_grad_() for x in (*tensors, gate)]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    dout = random(tokens, heads, dim)
    runs = []
    for backend in (lambda q: ops._triton(), lambda q: reference):
        monkeypatch.setattr(ops, "_backend", backend)
        out, indices = ops.nsa_attention(*tensors, cu_seqlens, max(lengths), geometry)
        runs.append((out, indices, *torch.autograd.grad(out, tensors, dout)))
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0]], ids=str)
def test_no_tokens_at_all(monkeypatch, cu_seqlens):
    monkeypatch.setattr(ops, "_backend", lambda q: ops._triton())
    q, gate, k = random(0, 2, 16), random(0, 2, 3), random(0, 1, 16)
    k_cmp = random(1, 1, 16)  # geometry.capacity(0)
    leaves = [x.requires_grad_() for x in (q, k_cmp, k_cmp.clone(), *[k] * 4, gate)]
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    out, indices = ops.nsa_attention(*leaves, cu_seqlens, 0, Geometry(4, 4, 8, 3, 8))
    assert out.shape == (0, 2, 16) and indices.shape == (1, 0, 3)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not any(x.any() for x in grads)


def strided(x):
    """x as every other number of a row."""
    return torch.stack([x, torch.full_like(x, 1e3)], -1).flatten(-2)[..., ::2]


def test_inputs_may_have_any_strides(monkeypatch):
    """Which the kernels do not know."""
    if DEVICE == "cpu":
        monkeypatch.setattr(csr, "_SORT", 32)
    torch.manual_seed(0)
    geometry, lengths, heads, dim = Geometry(4, 4, 8, 3, 8), [17, 3], 2, 16
    tokens, rows = sum(lengths), geometry.capacity(sum(lengths))
    tensors = [random(tokens, heads, dim)]
    tensors += [random(n, 1, dim) for n in (rows, rows, tokens, tokens, tokens, tokens)]
    tensors.append(torch.rand(tokens, heads, 3, device=DEVICE))
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    monkeypatch.setattr(ops, "_backend", lambda q: ops._triton())
    kernels = dict(window_forward=window.window_forward, window_backward=window.window_backward)
    monkeypatch.setattr(
        dense, "_backend", lambda q: SimpleNamespace(**kernels, row_delta=gates.row_delta)
    )

    def nsa(*tensors):
        return ops.nsa_attention(*tensors, cu_seqlens, max(lengths), geometry)[0]

    def sliding(*tensors):
        return dense.sliding_attention(*tensors, cu_seqlens, max(lengths), 5, 0.25)

    for operator, inputs in ((nsa, tensors), (sliding, (tensors[0], *tensors[3:5]))):
        results = []
        for change in (torch.clone, strided):
            leaves = [change(x).requires_grad_() for x in inputs]
            out = operator(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
