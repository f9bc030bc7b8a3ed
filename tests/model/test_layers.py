"""Rotary positions: what they must leave alone, and what YaRN stretches."""

import math

import pytest
import torch

from model.layers import Rotary, rotate


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


def test_positions_keep_their_precision_in_a_bf16_model():
    rotary = Rotary(32).bfloat16()
    cos = rotary(torch.tensor([65535])).cos
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0], torch.tensor(65535.0).cos())


def test_an_odd_head_dimension_is_an_error():
    with pytest.raises(ValueError, match="even head dimension"):
        Rotary(15)
