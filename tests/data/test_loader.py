import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import EOT, write_shards

from data.batch import NOT_SCORED
from data.loader import PackedLoader, validation_batches

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def shards_of(lengths):
    """Shards whose folder is gone: mapped files outlive their names."""
    with TemporaryDirectory() as folder:
        return write_shards(Path(folder) / "train", lengths)


def text_of(batch, shards, seq_len):
    """The tokens of a batch that aren't padding, after checking all that it promises of them."""
    total, cu = len(batch.tokens), batch.cu_seqlens
    dtypes = [torch.int64] * 2 + [torch.float32, torch.int64, torch.int32]
    assert [t.dtype for t in batch[:5]] == dtypes and not batch.answers.any()
    assert cu[0] == 0 and cu[-1] == total and (cu.diff() > 0).all()
    assert batch.max_seqlen == cu.diff().max()
    assert set(range(0, total + 1, seq_len)) <= set(cu.tolist())  # none lies in two sequences
    text = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        tokens, targets = batch.tokens[start:end], batch.targets[start:end]
        assert batch.positions[start:end].tolist() == list(range(end - start))
        if (targets == NOT_SCORED).any():
            assert (targets == NOT_SCORED).all() and (tokens == EOT).all()
            continue
        assert torch.equal(tokens[1:], targets[:-1])
        numbered = tokens[tokens != EOT].numpy()
        assert (shards.tokens[numbered] == targets[tokens != EOT].numpy()).all()
        text += tokens.tolist()
    return text


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(2, 30), st.integers(0, 100))
def test_an_epoch_feeds_every_token_once(lengths, seq_len, seed):
    shards = shards_of(lengths)
    loader = PackedLoader(shards, seq_len, seed, EOT)
    batch = loader.batch(0, loader.samples_per_epoch())
    text = text_of(batch, shards, seq_len)
    assert sorted(text) == sorted(shards.tokens[:-1].tolist())
    scored = batch.targets[batch.targets != NOT_SCORED]
    assert sorted(scored.tolist()) == sorted(shards.tokens[1:].tolist())
    padding = (batch.targets == NOT_SCORED).float().mean().item()
    assert loader.padding_share == pytest.approx(padding, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(2, 30))
def test_validation_scores_every_token_once(lengths, seq_len):
    shards = shards_of(lengths)
    batches = list(validation_batches(shards, seq_len, EOT))
    text = [i for batch in batches for i in text_of(batch, shards, seq_len)]
    assert sorted(text) == sorted(shards.tokens[:-1].tolist())


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(2, 30), st.data())
def test_order_does_not_depend_on_how_it_is_asked_for(lengths, seq_len, data):
    """Any split of a stretch of samples over ranks, steps and a restart gives the same tokens."""
    shards = shards_of(lengths)
    first, count = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 12))
    whole = PackedLoader(shards, seq_len, 5, EOT).batch(first, count)
    parts, sample = [], first
    while sample < first + count:
        size = data.draw(st.integers(1, first + count - sample))
        parts.append(PackedLoader(shards, seq_len, 5, EOT).batch(sample, size))
        sample += size
    for field in ("tokens", "targets", "positions"):
        assert torch.equal(
            getattr(whole, field), torch.cat([getattr(part, field) for part in parts])
        )
    lengths_of = [part.cu_seqlens.diff() for part in parts]
    assert torch.equal(whole.cu_seqlens.diff(), torch.cat(lengths_of))


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.lists(st.sampled_from([1, 2, 3, 6]), min_size=2, max_size=4), st.data())
def test_ranks_share_a_run_that_changes_its_world_size(lengths, worlds, data):
    """Steps of 6 sequences, at any number of ranks, broken off and resumed with another number."""
    shards, samples, seen = shards_of(lengths), 0, []
    for world in worlds:
        for _ in range(data.draw(st.integers(0, 3))):
            for accumulation in range(6 // world):
                for rank in range(world):
                    loader = PackedLoader(shards, 16, 2, EOT)  # as after a restart
                    seen.append(loader.batch(samples + accumulation * world + rank, 1))
            samples += 6
    if samples:
        whole = PackedLoader(shards, 16, 2, EOT).batch(0, samples)
        assert torch.equal(whole.tokens, torch.cat([batch.tokens for batch in seen]))


def test_four_samples_are_two_and_two():
    loader = PackedLoader(shards_of([30] * 50), 16, 0, EOT)
    whole, halves = loader.batch(0, 4), (loader.batch(0, 2), loader.batch(2, 2))
    assert torch.equal(whole.tokens, torch.cat([half.tokens for half in halves]))


def test_epochs_reshuffle():
    loader = PackedLoader(shards_of(list(range(1, 60))), 64, 3, EOT)
    size = loader.samples_per_epoch()
    epochs = [loader.batch(epoch * size, size).tokens for epoch in range(3)]
    assert all(torch.equal(epochs[0].sort()[0], other.sort()[0]) for other in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_a_long_document_goes_on_in_the_next_piece():
    loader = PackedLoader(shards_of([100]), 16, 0, EOT)
    batch = loader.batch(0, loader.samples_per_epoch())
    following = dict(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
    assert all(following[i] == i + 1 for i in range(2, 100))
    assert following[100] == EOT


def test_validation_goes_in_order_and_stops_early():
    shards = shards_of([100, 40])
    tokens = torch.cat([batch.tokens for batch in validation_batches(shards, 16, EOT, 50)])
    assert tokens.tolist() == shards.tokens[:48].tolist()
    assert len(list(validation_batches(shards, 16, EOT, 1))) == 1


def test_refuses_what_cannot_be_right():
    shards = shards_of([10, 10])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        PackedLoader(shards, 16, 0, eot_id=5)
    with pytest.raises(ValueError, match="seq_len=1"):
        PackedLoader(shards, 1, 0, EOT)


def test_batches_come_at_ten_million_tokens_a_second():
    shards = shards_of(np.random.default_rng(0).integers(2, 3000, 3000).tolist())
    loader = PackedLoader(shards, 8192, 0, EOT)
    loader.batch(0, 8)
    start = time.process_time()
    for i in range(20):
        loader.batch(8 * i, 8)
    assert 20 * 8 * 8192 / (time.process_time() - start) > 10e6  # some 200e6 on an idle core


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.lists(st.tuples(st.integers(2, 30), st.integers(0, 25)), min_size=1, max_size=3))
def test_stages_show_nothing_twice_before_all_is_seen(lengths, stages):
    """Stages of any lengths, broken off anywhere: each epoch is whole, and the next one begins."""
    shards = shards_of(lengths)
    loader, text = PackedLoader(shards, 8, 1, EOT), []
    for seq_len, samples in stages:
        if samples:
            text += text_of(loader.batch(0, samples), shards, loader.seq_len)
        loader = loader.next_stage(seq_len, samples)
    rest = -len(text) % shards.num_tokens or shards.num_tokens
    sample = 0
    while rest > 0:
        new = text_of(loader.batch(sample, 1), shards, loader.seq_len)
        text, rest, sample = text + new, rest - len(new), sample + 1
    assert rest == 0
    every = sorted(shards.tokens[:-1].tolist())
    for epoch in range(0, len(text), len(every)):
        assert sorted(text[epoch : epoch + len(every)]) == every


def test_a_longer_stage_joins_what_a_shorter_one_cut():
    shards = shards_of([1000])
    loader = PackedLoader(shards, 10, 0, EOT).next_stage(500, consumed=1)
    assert loader.batch(0, 2).max_seqlen > 300
