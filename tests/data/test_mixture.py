from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import EOT, write_shards

from data.batch import NOT_SCORED
from data.loader import PackedLoader
from data.mixture import PERIOD, MixedLoader, apportion, even_order

QUOTAS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def loader_of(lengths, seq_len=16, seed=0):
    with TemporaryDirectory() as folder:
        return PackedLoader(write_shards(Path(folder) / "train", lengths), seq_len, seed, EOT)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True)) and a[5] == b[5]


@given(QUOTAS)
def test_no_kind_is_ever_a_whole_item_early_or_late(quotas):
    quotas = np.array(quotas)
    order = even_order(quotas)
    total = quotas.sum()
    assert (np.bincount(order, minlength=len(quotas)) == quotas).all()
    for kind, quota in enumerate(quotas):
        given = np.concatenate([[0], np.cumsum(order == kind)])
        assert (np.abs(given * total - np.arange(total + 1) * quota) < total).all()


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 5000))
def test_apportioning_gives_everything_and_is_off_by_less_than_one(shares, total):
    shares = np.array(shares)
    given = apportion(shares, total)
    assert given.sum() == total
    assert (np.abs(given - shares / shares.sum() * total) < 1).all()


SOURCES = {"a": loader_of([100, 7, 30] * 9), "b": loader_of([16] * 40), "c": loader_of([300])}
WEIGHTS = {"a": 0.5, "b": 0.375, "c": 0.125}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * PERIOD), st.integers(1, 400))
def test_weights_hold_in_tokens_over_any_window(first, count):
    mixed = MixedLoader(SOURCES, WEIGHTS)
    counts = mixed._counts(first + count) - mixed._counts(first)
    for name, samples in zip("abc", counts, strict=True):
        tokens = samples * 16 * (1 - SOURCES[name].padding_share)
        all_tokens = count * 16 * (1 - mixed.padding_share)
        assert abs(tokens - WEIGHTS[name] * all_tokens) < 2 * 16 + 1e-3 * all_tokens


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 * PERIOD), st.integers(1, 9), st.data())
def test_a_mixture_is_the_same_however_it_is_asked_for(first, count, data):
    whole = MixedLoader(SOURCES, WEIGHTS).batch(first, count)
    cut = data.draw(st.integers(0, count))
    parts = [
        MixedLoader(SOURCES, WEIGHTS).batch(start, size)
        for start, size in ((first, cut), (first + cut, count - cut))
        if size
    ]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    assert torch.equal(whole.cu_seqlens.diff(), lengths)
    assert whole.cu_seqlens.dtype == torch.int32 and whole.cu_seqlens[-1] == count * 16


def test_each_source_comes_in_its_own_order():
    mixed = MixedLoader(SOURCES, WEIGHTS)
    taken = dict.fromkeys(SOURCES, 0)
    for i in range(64):
        name = "abc"[mixed._source[i]]
        assert equal(mixed.batch(i, 1), SOURCES[name].batch(taken[name], 1))
        taken[name] += 1
    assert all(taken.values())


def test_what_is_padded_is_made_up_for():
    padded, full = loader_of([9] * 50), loader_of([16] * 50)  # one document a sample
    batch = MixedLoader({"p": padded, "f": full}, {"p": 1, "f": 1}).batch(0, 500)
    text = (batch.targets != NOT_SCORED).sum().item()
    lengths = batch.cu_seqlens.diff()
    assert (lengths == 9).sum().item() * 9 / text == pytest.approx(0.5, abs=0.01)


def test_stages_go_on_in_each_source_and_may_change_the_weights():
    mixed = MixedLoader(SOURCES, WEIGHTS | {"c": 0})
    later = mixed.next_stage(32, 21, {"b": 1, "c": 1})
    b, c = SOURCES["b"].next_stage(32, 9), SOURCES["c"].next_stage(32, 0)
    expected = [b.batch(0, 1), c.batch(0, 1)]
    found = [later.batch(i, 1) for i in range(2)]
    assert any(equal(found[0], e) for e in expected) and any(equal(found[1], e) for e in expected)
    assert mixed.describe(21) == "a 0.15 epochs, b 0.23 epochs"


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"d": 1}, "data.weights.d: there is no such source, only a, b, c"),
        ({"a": -1}, "data.weights.a: -1 isn't a number from 0 up"),
        ({"a": "much"}, "data.weights.a: 'much' isn't a number"),
        ({"a": 0}, "every source has weight 0"),
        ({"a": 1, "b": 1e-9}, "data.weights.b: 1e-09 is less than one sample in 10,000"),
    ],
)
def test_weights_that_cannot_be_are_named(weights, message):
    with pytest.raises(ValueError, match=message) as error:
        MixedLoader(SOURCES, weights)
    assert "\n" not in str(error.value)
