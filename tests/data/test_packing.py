import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import PADDING, best_fit, plan_epoch, unseen

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=60)
SEED = st.none() | st.integers(0, 2**63)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def plan_of(offsets, *arguments, **options):
    return plan_epoch(offsets[:-1], offsets[1:], *arguments, **options)


@given(LENGTHS, st.integers(2, 40), SEED, st.integers(0, 3))
def test_every_token_is_in_exactly_one_sequence(lengths, seq_len, seed, epoch):
    offsets = offsets_of(lengths)
    plan = plan_of(offsets, seq_len, seed, epoch)
    text = plan.start != PADDING
    covered = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(plan.start[text], plan.length[text], strict=True)]
    )
    assert np.array_equal(np.sort(covered), np.arange(offsets[-1]))
    # no piece reaches over the end of a document
    document = np.searchsorted(offsets, plan.start[text], side="right")
    assert (plan.start[text] + plan.length[text] <= offsets[document]).all()
    # sequences are full, and only the last piece of one may be padding
    assert (np.add.reduceat(plan.length, plan.first_piece[:-1]) == seq_len).all()
    assert (plan.length > 0).all()
    assert np.isin(np.flatnonzero(~text), plan.first_piece[1:] - 1).all()


@given(LENGTHS, st.integers(2, 40))
def test_documents_are_cut_only_where_a_sequence_ends(lengths, seq_len):
    plan = plan_of(offsets_of(lengths), seq_len, seed=0)
    pieces = (plan.start != PADDING).sum()
    assert pieces == sum(-(-length // seq_len) for length in lengths)


@given(LENGTHS, st.integers(2, 40))
def test_every_epoch_has_the_same_number_of_sequences(lengths, seq_len):
    offsets = offsets_of(lengths)
    counts = {plan_of(offsets, seq_len, seed, seed).num_sequences for seed in range(4)}
    assert len(counts | {plan_of(offsets, seq_len).num_sequences}) == 1


@given(st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_is_best_fit_decreasing(lengths):
    """Against the definition: longest first, into the bin with the least room that takes it."""
    lengths = np.array(lengths, np.int64)
    bins = best_fit(lengths, 30)
    rooms = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(30)
        chosen = min(fitting, key=rooms.__getitem__) if fitting else -1
        rooms[chosen] -= length
    filled = np.bincount(bins, weights=lengths).astype(int) if len(lengths) else []
    assert sorted(30 - filled) == sorted(rooms) if len(lengths) else not rooms


def test_without_a_seed_the_order_is_the_files():
    plan = plan_of(offsets_of([3, 50, 4, 20]), 20)
    assert plan.start.tolist() == [0, 43, 53, PADDING, 3, 23, 57]
    assert plan.length.tolist() == [3, 10, 4, 3, 20, 20, 20]
    assert plan.first_piece.tolist() == [0, 4, 5, 6, 7]


def test_epochs_differ_and_are_reproducible():
    offsets = offsets_of(np.random.default_rng(0).integers(1, 100, 500))
    starts = [plan_of(offsets, 64, 7, epoch).start.tolist() for epoch in (0, 1, 0)]
    assert starts[0] == starts[2] != starts[1]
    assert plan_of(offsets, 64, 8, 0).start.tolist() != starts[0]


@pytest.mark.parametrize("seq_len", [2048, 65536])
def test_a_million_documents_in_seconds(seq_len):
    lengths = np.random.default_rng(0).lognormal(6.5, 1.3, 1_000_000).astype(np.int64) + 1
    start = time.process_time()
    plan = plan_of(offsets_of(lengths), seq_len, 0)
    assert time.process_time() - start < 10  # about 1 s on an idle core
    assert lengths.sum() / (plan.num_sequences * seq_len) > 0.999


@given(LENGTHS, st.integers(2, 40), st.data())
def test_what_is_unseen_is_the_rest_in_the_longest_pieces(lengths, seq_len, data):
    offsets = offsets_of(lengths)
    plan = plan_of(offsets, seq_len, 3)
    consumed = data.draw(st.integers(0, plan.num_sequences - 1))
    starts, ends = unseen(plan, consumed, offsets)
    seen = np.zeros(offsets[-1], bool)
    for piece in range(plan.first_piece[consumed]):
        if plan.start[piece] != PADDING:
            seen[plan.start[piece] : plan.start[piece] + plan.length[piece]] = True
    for start, end in zip(starts, ends, strict=True):
        assert not seen[start:end].any()
        document = np.searchsorted(offsets, start, side="right")
        assert start < end <= offsets[document]
        # nothing more of the document could have been joined to it
        assert start == offsets[document - 1] or seen[start - 1]
        assert end == offsets[document] or seen[end]
    assert (ends - starts).sum() == (~seen).sum()
