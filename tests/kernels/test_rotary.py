"""Norm and rotation in one: the kernels against the twin, which other devices train with."""

import pytest
import torch

from kernels import rotary_triton
from kernels.rotary import norm_rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(tokens, heads, dim, dtype, wide=False):
    """x, weight, cos and sin; with `wide`, x is a part of a wider projection."""
    torch.manual_seed(0)
    x = (torch.randn(tokens, heads + wide, dim, device=DEVICE) * 3).to(dtype)[:, :heads]
    angles = torch.rand(tokens, dim // 2, device=DEVICE) * 7
    return x, torch.randn(dim, device=DEVICE).to(dtype), angles.cos(), angles.sin()


def exact(dy, x, weight, cos, sin):
    """y, dx and dweight (or no elements) in float64."""
    dy, x, cos, sin = (t.detach().double().cpu() for t in (dy, x, cos, sin))
    if weight is not None:
        weight = weight.detach().double().cpu().requires_grad_()
    y = norm_rotate(x.requires_grad_(), weight, cos, sin, 1e-6)
    if weight is None:
        return y, *torch.autograd.grad(y, x, dy), y.new_empty(0)
    return y, *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("wide", [True, False], ids=["view", "whole"])
@pytest.mark.parametrize(
    "tokens, heads, dim", [(3, 5, 64), (1, 1, 96), (17, 2, 128), (2, 3, 6), (0, 2, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_equal_the_twin(monkeypatch, tokens, heads, dim, dtype, wide, normed):
    monkeypatch.setattr(rotary_triton, "PROGRAMS", 3)  # several tiles each, and an unequal share
    x, weight, cos, sin = make(tokens, heads, dim, dtype, wide)
    weight = weight if normed else None
    dy = make(tokens, heads, dim, dtype, wide)[0].flip(-1)
    inputs = x, weight, cos, sin
    found = [rotary_triton.forward(*inputs, 1e-6), *rotary_triton.backward(dy, *inputs, 1e-6)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(found, exact(dy, *inputs), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        torch.testing.assert_close(
            got.double().cpu(), want.detach(), rtol=tolerance, atol=5 * tolerance
        )


def test_the_operator_keeps_its_promises():
    """On a CPU too, where only this test calls it: by Triton's interpreter."""
    x, weight, cos, sin = make(3, 2, 8, torch.float32, wide=True)
    for given in (weight.requires_grad_(), None):
        inputs = x.detach().requires_grad_(), given, cos, sin, 1e-6
        torch.library.opcheck(torch.ops.nsa.norm_rotate.default, inputs)
        dy, leaves = torch.randn_like(x), [t for t in inputs[:2] if t is not None]
        found = torch.autograd.grad(torch.ops.nsa.norm_rotate(*inputs), leaves, dy)
        for got, want in zip(found, exact(dy, *inputs[:4])[1:], strict=False):
            torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, heads, dim", [(2, 8, 128), (70000, 4, 64), (33, 3, 96)])
def test_in_bf16(tokens, heads, dim):
    x, weight, cos, sin = make(tokens, heads, dim, torch.bfloat16, wide=True)
    given = x.requires_grad_(), weight.requires_grad_()
    y = norm_rotate(*given, cos, sin, 1e-6)
    dy = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, given, dy, retain_graph=True)
    for got, want in zip(found, exact(dy, x, weight, cos, sin), strict=True):
        want = want.detach()
        assert (got.detach().double().cpu() - want).norm() < 4e-3 * want.norm()
    again = torch.autograd.grad(y, given, dy)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))
