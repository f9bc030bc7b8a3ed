"""Norm and rotation in one: the kernel against the twin, which is the training's composition."""

import pytest
import torch

from kernels import rotary_triton
from kernels.rotary import norm_rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(tokens, heads, dim, dtype):
    torch.manual_seed(0)
    x = torch.randn(tokens, heads, dim, device=DEVICE) * 3
    angles = torch.rand(tokens, dim // 2, device=DEVICE) * 7
    return x.to(dtype), torch.randn(dim, device=DEVICE).to(dtype), angles.cos(), angles.sin()


def exact(x, weight, cos, sin):
    x, cos, sin = (t.double().cpu() for t in (x, cos, sin))
    return norm_rotate(x, None if weight is None else weight.double().cpu(), cos, sin, 1e-6)


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("tokens, heads, dim", [(3, 5, 64), (1, 1, 96), (17, 2, 128), (2, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_equals_the_twin(tokens, heads, dim, dtype, normed):
    x, weight, cos, sin = make(tokens, heads, dim, dtype)
    weight = weight if normed else None
    got = rotary_triton.norm_rotate(x, weight, cos, sin, 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    want = exact(x, weight, cos, sin)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)


def test_the_operator_keeps_its_promises():
    inputs = *make(3, 2, 8, torch.float32), 1e-6
    torch.library.opcheck(torch.ops.nsa.norm_rotate.default, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, heads, dim", [(2, 8, 128), (70000, 4, 64), (33, 3, 96)])
def test_in_bf16(tokens, heads, dim):
    inputs = make(tokens, heads, dim, torch.bfloat16)
    got, want = norm_rotate(*inputs, 1e-6).double().cpu(), exact(*inputs)
    assert (got - want).norm() < 3e-3 * want.norm()
