"""Gate and merge, and the operator as a whole from its Triton kernels, against the torch twin."""

import pytest
import torch

from kernels.nsa import csr, gates, ops, reference
from kernels.nsa.geometry import Geometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("tokens, heads, dim, dtype", [
    (37, 3, 24, torch.float32), (1, 1, 64, torch.float16), (0, 2, 16, torch.float32),
])  # fmt: skip
def test_merge_and_its_backward_equal_the_twins(tokens, heads, dim, dtype):
    torch.manual_seed(0)
    dout, *outs = (random(tokens, heads, dim, dtype=dtype) for _ in range(4))
    lses = [random(tokens, heads) for _ in range(3)]
    gate = torch.rand(tokens, heads, 3, device=DEVICE).to(dtype)
    if tokens > 1:
        gate[3, 1] = 0.0  # closed
        lses[0][:5] = float("-inf")  # nothing to see
    tolerance = dict(rtol=2e-3, atol=2e-3) if dtype == torch.float16 else dict(rtol=1e-5, atol=1e-5)
    exact = [x.double() for x in outs]
    want = reference.merge_branches(gate.double(), *exact)
    torch.testing.assert_close(gates.merge_branches(gate, *outs).double(), want, **tolerance)
    got = gates.gate_backward(dout, gate, outs, lses)
    want = reference.gate_backward(dout.double(), gate.double(), exact, lses)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), **tolerance)


def test_the_whole_operator_from_its_kernels(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(csr, "_SORT", 32)  # the interpreter sorts slowly
    torch.manual_seed(0)
    geometry, lengths, heads, kv_heads, dim = Geometry(8, 4, 16, 3, 16), [37, 0, 1, 20], 4, 2, 16
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
