"""Rotary positions: what they must leave alone, and what YaRN stretches. Projections at once."""

import math

import pytest
import torch
from torch import nn

from kernels.rotary import norm_rotate
from model import layers
from model.layers import Rotary, project


def rotate(x, rope):
    return norm_rotate(x, None, rope.cos, rope.sin, 0.0)


def test_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    rotary = Rotary(16)
    at = [rotary(torch.tensor([p])) for p in (3, 10, 1003, 1010)]
    near = (rotate(q, at[1]) * rotate(k, at[0])).sum()
    far = (rotate(q, at[3]) * rotate(k, at[2])).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(q, at[2]).norm(), q.norm(), rtol=1e-6, atol=0)


def test_yarn_stretches_slow_frequencies_and_keeps_fast_ones():
    plain, yarn = (
        Rotary(64, base=1e4),
        Rotary(64, base=1e4, yarn_factor=4, yarn_original_length=4096),
    )
    ratio = [a / b for a, b in zip(plain.frequencies, yarn.frequencies, strict=True)]
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(4)
    assert all(a <= b + 1e-12 for a, b in zip(ratio, ratio[1:], strict=False))
    assert yarn.magnitude == pytest.approx(0.1 * math.log(4) + 1) and plain.magnitude == 1


def test_the_slowest_pairs_need_not_turn():
    half = Rotary(64, base=1e4, fraction=0.5)
    assert half.frequencies == Rotary(64, base=1e4).frequencies[:16] + [0.0] * 16
    cos, sin = half(torch.tensor([10**6]))[1:]
    assert (cos[0, 16:] == 1).all() and (sin[0, 16:] == 0).all() and (sin[0, :16] != 0).all()
    with pytest.raises(ValueError, match="model.rope_fraction=1.5"):
        Rotary(64, fraction=1.5)


def test_positions_keep_their_precision_in_a_bf16_model():
    rotary = Rotary(32).bfloat16()
    cos = rotary(torch.tensor([65535])).cos
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0], torch.tensor(65535.0).cos())


def test_an_odd_head_dimension_is_an_error():
    with pytest.raises(ValueError, match="even head dimension"):
        Rotary(15)


class Doubled(nn.Linear):
    """A layer that is more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


PLAIN = [nn.Linear(12, 16, bias=False), None, nn.Linear(12, 8), nn.Linear(12, 24, bias=False)]


@pytest.mark.parametrize(
    "projected, products",
    [
        (PLAIN, 1),
        ([*PLAIN, Doubled(12, 8)], 4),
        ([*PLAIN, nn.Linear(12, 4)], 4),  # 8 bytes of bf16
    ],
)
def test_layers_on_one_input_are_one_product_when_compiled(monkeypatch, projected, products):
    monkeypatch.setattr(layers, "PROJECTED_AT_ONCE", {"cpu"})
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    parameters = [p for layer in projected if layer for p in layer.double().parameters()]
    results = []
    for run in (project, torch.compile(project, backend=backend, fullgraph=True)):
        x = torch.randn(5, 12, dtype=torch.float64, generator=torch.manual_seed(1))
        outputs = run(x.requires_grad_(), *projected)
        assert [y is None for y in outputs] == [layer is None for layer in projected]
        outputs = [y for y in outputs if y is not None]
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, [x, *parameters])])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert str(graphs[0].code).count("linear(") == products
