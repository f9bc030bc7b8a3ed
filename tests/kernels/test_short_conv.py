"""The convolution: its kernels against the twin, the twin against torch's own, the operator's rules."""

import pytest
import torch
import torch.nn.functional as F

from kernels import short_conv as op
from kernels import short_conv_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(lengths, channels, width, dtype=torch.float32):
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    tensors = torch.randn(len(positions), channels), torch.randn(width, channels)
    return *(x.to(DEVICE, dtype) for x in tensors), positions


def test_the_twin_is_torchs_convolution_of_every_document():
    lengths = [37, 1, 2, 20]
    x, weight, positions = make(lengths, 5, 4, torch.float64)
    documents = [
        F.conv1d(F.pad(d.T, (3, 0)), weight.T.flip(1)[:, None], groups=5).T
        for d in x.split(lengths)
    ]
    torch.testing.assert_close(op._twin_forward(x, weight, positions), torch.cat(documents))


@pytest.mark.parametrize(
    "lengths, channels, width",
    [([37, 1, 2, 90], 70, 4), ([3], 16, 4), ([64, 64], 64, 2), ([], 8, 4), ([1], 3, 3)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_equal_the_twins(lengths, channels, width, dtype):
    if not lengths:
        lengths = [0]
    x, weight, positions = make(lengths, channels, width, dtype)
    dy = torch.randn_like(x)
    exact = [t.double() for t in (dy, x, weight)]
    y = short_conv_triton.forward(x, weight, positions)
    tolerance = dict(rtol=5e-3, atol=3e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
    want = op._twin_forward(*exact[1:], positions)
    torch.testing.assert_close(y.double(), want, **tolerance)
    found = short_conv_triton.backward(dy, x, weight, positions)
    for got, expected in zip(found, op._twin_backward(*exact, positions), strict=True):
        torch.testing.assert_close(got.double(), expected, **tolerance)


def test_the_operator_keeps_its_promises():
    x, weight, positions = make([5, 1, 9], 6, 4, torch.float64)
    inputs = x.requires_grad_(), weight.requires_grad_(), positions
    torch.library.opcheck(torch.ops.nsa.short_conv.default, inputs)
    if DEVICE == "cpu":
        assert torch.autograd.gradcheck(op.short_conv, inputs)
    x, weight, ring = (torch.randn(n, 6, device=DEVICE) for n in (3, 4, 9))
    lengths = torch.tensor([1, 2, 9], dtype=torch.int32, device=DEVICE)
    step = x, weight, ring.view(3, 3, 6), lengths
    torch.library.opcheck(torch.ops.nsa.short_conv_step.default, step)


@pytest.mark.parametrize("step", [short_conv_triton.step, op.short_conv_step], ids=["kernel", "op"])
@pytest.mark.parametrize("width, channels", [(4, 70), (2, 64), (3, 3)])
def test_token_by_token_equals_the_whole(step, width, channels):
    x, weight, positions = make([9, 9], channels, width)
    want = op._twin_forward(x, weight, positions).view(2, 9, channels)
    x = x.view(2, 9, channels)
    ring = torch.full((2, width - 1, channels), 1e3, device=DEVICE)  # wrong where read too early
    for t in range(9):
        lengths = torch.tensor([t + 1] * 2, dtype=torch.int32, device=DEVICE)
        got = step(x[:, t].contiguous(), weight, ring, lengths)
        torch.testing.assert_close(got, want[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_in_bf16_and_always_the_same():
    x, weight, positions = make([5000, 1, 777], 512, 4, torch.bfloat16)
    dy = torch.randn_like(x)
    x.requires_grad_(), weight.requires_grad_()
    y = op.short_conv(x, weight, positions)
    grads = [torch.autograd.grad(y, (x, weight), dy, retain_graph=True) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    exact = [t.detach().double() for t in (dy, x, weight)]
    want = op._twin_forward(*exact[1:], positions), *op._twin_backward(*exact, positions)
    for got, expected in zip((y, *grads[0]), want, strict=True):
        assert (got.double() - expected).norm() < 5e-3 * expected.norm()
