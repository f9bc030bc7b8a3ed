"""Associative recall in a Markov chain, the task of scripts/retrieval_study.py.

A second-order chain is text that has something to learn by itself; in it key tokens, each followed by
its value, occur twice (MQAR, arXiv 2312.04927).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STATES, KEYS, VALUES = 32, 256, 256  # kinds of tokens, in this order
SUCCESSORS = (0.55, 0.25, 0.12, 0.08)  # probabilities of the chain's next states
VOCABULARY = STATES + KEYS + VALUES


class Sequences(NamedTuple):
    """tokens int64 [N, T]; first and second int64 [N, pairs], the places of each key; whole bool
    [N, pairs], False where another pair was written over this one; plain bool [N, T], tokens that
    the chain alone predicts, from the two before; ask int64 [N, pairs, value_tokens], the tokens before
    those of each value's second occurrence."""

    tokens: Tensor
    first: Tensor
    second: Tensor
    whole: Tensor
    plain: Tensor
    ask: Tensor

    def asking(self, x: Tensor) -> Tensor:
        """x [N, T] where the values' tokens are to be predicted: [N, pairs, value_tokens]"""
        return x.gather(1, self.ask.flatten(1)).view(self.ask.shape)


def make_sequences(
    count: int, length: int, num_pairs: int, value_tokens: int, rng: np.random.Generator
) -> Sequences:
    """Distances are drawn, half of them log-uniformly, half uniformly, from a pair's tokens to the
    second key's place."""
    shape, width = (count, num_pairs), 1 + value_tokens
    tokens = _chain(count, length, rng)
    keys = STATES + rng.random((count, KEYS)).argsort(1)[:, :num_pairs]
    values = STATES + KEYS + rng.integers(VALUES, size=(*shape, value_tokens))
    second = rng.integers(width, length - width + 1, size=shape)
    share = rng.random(shape)
    near, far = width * (second / width) ** share, width + share * (second - width)
    first = second - np.where(rng.random(shape) < 0.5, near, far).astype(np.int64)
    plain = np.ones_like(tokens, dtype=bool)
    plain[:, :2] = False
    rows = np.arange(count)[:, None]
    pairs = [keys, *np.moveaxis(values, 2, 0)]
    for place in (first, second):
        for i, part in enumerate(pairs):
            tokens[rows, place + i] = part
    whole = np.all(
        [
            tokens[rows, place + i] == part
            for place in (first, second)
            for i, part in enumerate(pairs)
        ],
        0,
    )
    ask = second[..., None] + np.arange(value_tokens)
    other = tokens >= STATES
    plain &= ~other
    plain[:, 1:] &= ~other[:, :-1]
    plain[:, 2:] &= ~other[:, :-2]
    return Sequences(*map(torch.from_numpy, (tokens, first, second, whole, plain, ask)))


def _chain(count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count, length] of the second-order chain, which is the same in every study."""
    successors = np.random.default_rng(0).integers(STATES, size=(STATES, STATES, len(SUCCESSORS)))
    limits = np.cumsum(SUCCESSORS)[:-1]
    tokens = np.empty((length, count), np.int64)
    tokens[:2] = rng.integers(STATES, size=(2, count))
    for t in range(2, length):
        choice = np.searchsorted(limits, rng.random(count))
        tokens[t] = successors[tokens[t - 2], tokens[t - 1], choice]
    return np.ascontiguousarray(tokens.T)
