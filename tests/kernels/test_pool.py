"""The gated mean: twin against its definition by autograd, kernels against the twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nsa import compress, pool
from kernels.nsa.compress import gated_pool, gather_blocks, mean_pool
from kernels.nsa.geometry import Geometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(lengths, heads, dim, geometry, dtype):
    torch.manual_seed(0)
    tokens = sum(lengths)
    shapes = (tokens, heads, dim), (tokens, heads), (geometry.compress_block, heads)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes], cu_seqlens


def definition(x, score, position, cu_seqlens, geometry):
    weight = (gather_blocks(score, cu_seqlens, geometry) + position).softmax(1)
    return (gather_blocks(x, cu_seqlens, geometry) * weight[..., None]).sum(1)


@st.composite
def cases(draw):
    stride = draw(st.sampled_from([1, 2, 4]))
    geometry = Geometry(stride * draw(st.integers(1, 3)), stride, stride * 2, 3, 4)
    lengths = draw(st.lists(st.integers(0, 19), min_size=1, max_size=3))
    return [*lengths, 1], draw(st.integers(1, 3)), draw(st.sampled_from([4, 6])), geometry


@settings(max_examples=20, deadline=None)
@given(cases())
def test_equals_the_definition(case):
    inputs, cu_seqlens = make(*case, torch.float64)
    geometry = case[-1]
    inputs = [t.requires_grad_() for t in inputs]
    want = definition(*inputs, cu_seqlens, geometry)
    grad = torch.randn_like(want)
    runs = [torch.autograd.grad(want, inputs, grad)]
    if DEVICE == "cpu":  # float64 is the twin's alone
        got = gated_pool(*inputs, cu_seqlens, geometry)
        torch.testing.assert_close(got, want)
        runs.append(torch.autograd.grad(got, inputs, grad))
    single = [t.detach().float() for t in inputs]
    y, lse = pool.pool_forward(*single, cu_seqlens, geometry)
    torch.testing.assert_close(y, want.float(), rtol=1e-4, atol=1e-5)
    runs.append(pool.pool_backward(grad.float(), *single, y, lse, cu_seqlens, geometry))
    for run in runs[1:]:
        for g, w in zip(run, runs[0], strict=True):
            torch.testing.assert_close(g.double(), w.double(), rtol=1e-3, atol=1e-4)


def test_opcheck_and_the_mean():
    geometry = Geometry(8, 4, 8, 3, 8)
    inputs, cu_seqlens = make([21, 3, 9], 2, 8, geometry, torch.float32)
    for t in inputs:
        t.requires_grad_()
    args = (*inputs, cu_seqlens, [8, 4, 8, 3, 8, 1, 2])
    torch.library.opcheck(torch.ops.nsa.pool, args)
    blocks = gather_blocks(inputs[0], cu_seqlens, geometry)
    torch.testing.assert_close(mean_pool(inputs[0], cu_seqlens, geometry), blocks.mean(1))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1000, 0, 17, 2048], [31]], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_in_bf16(lengths, dim):
    geometry = Geometry()
    inputs, cu_seqlens = make(lengths, 4, dim, geometry, torch.bfloat16)
    exact = [t.double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    want = definition(*exact, cu_seqlens, geometry)
    got = gated_pool(*inputs, cu_seqlens, geometry)
    grad = torch.randn_like(got)
    pairs = [(got, want)]
    pairs += zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(want, exact, grad.double()),
        strict=True,
    )
    for g, w in pairs:
        error = (g.detach().double() - w).norm() / w.norm().clamp(min=1e-30)
        assert error < 1e-2 if w.any() else not g.any()
    assert compress._backend(got)[0] is pool.pool_forward
