"""The retrieval study's task is what it says."""

import numpy as np
import pytest
import torch

from data.recall_chain import KEYS, STATES, make_sequences


def make(value_tokens, seed=0):
    return make_sequences(64, 256, 8, value_tokens, np.random.default_rng(seed))


@pytest.mark.parametrize("value_tokens", [1, 3])
def test_keys_come_twice_with_their_values_at_all_distances(value_tokens):
    width = 1 + value_tokens
    made = make(value_tokens)
    assert 0.5 < made.whole.double().mean() < 1  # some are written over
    for tokens, first, second, whole in zip(*made[:4], strict=True):
        for a, b in zip(first[whole].tolist(), second[whole].tolist(), strict=True):
            assert torch.equal(tokens[a : a + width], tokens[b : b + width])
            assert tokens[a + 1 : a + width].min() >= STATES + KEYS
            assert (tokens == tokens[b]).sum() == 2 and b - a >= width
    distance = (made.second - made.first)[made.whole]
    assert min(distance) < width + 2 and (distance >= 128).sum() > 10
    again, other = (make(value_tokens, seed) for seed in (0, 1))
    rows = torch.arange(64)[:, None, None]
    expected = torch.stack(
        [made.tokens[rows[:, 0], made.second + i + 1] for i in range(width - 1)], -1
    )
    assert torch.equal(made.asking(made.tokens[:, 1:]), expected)
    assert torch.equal(again.tokens, made.tokens) and not torch.equal(other.tokens, made.tokens)
