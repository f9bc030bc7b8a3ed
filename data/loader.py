"""Packed batches by number: sample i is the same tokens whoever asks, and whenever.

The order is a function of (shards, seq_len, seed) alone. Ranks and accumulation steps only decide
who asks for which samples, and the whole state of a run's data is one integer: samples consumed.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from data.batch import NOT_SCORED, Batch
from data.packing import PADDING, Plan, plan_epoch, unseen
from data.shards import TokenShards


class PackedLoader:
    """Random access to an endless run of samples of `seq_len` tokens, reshuffled every epoch.

    Attributes:
        padding_share: the share of an epoch's tokens that is padding, 0 … 1.
    """

    def __init__(self, shards: TokenShards, seq_len: int, seed: int, eot_id: int):
        check(shards, seq_len, eot_id)
        self.shards, self.seq_len, self.seed, self.eot_id = shards, seq_len, seed, eot_id
        self._plan = lru_cache(maxsize=2)(self._make_plan)  # a batch may span the end of an epoch
        starts, ends = shards.offsets[:-1], shards.offsets[1:]
        self._first_epoch, self._opening = 0, (starts, ends)
        self._num_opening = self._num_samples = self._plan(0).num_sequences
        self.padding_share = 1 - shards.num_tokens / (self._num_samples * seq_len)

    def next_stage(self, seq_len: int, consumed: int) -> "PackedLoader":
        """A loader of other sequences that goes on where this one stands after `consumed` samples.

        Its first epoch is what is left of the running one, packed anew, so that a change of length
        shows no token twice and leaves none out.
        """
        stage = PackedLoader(self.shards, seq_len, self.seed, self.eot_id)
        stage._first_epoch, first = self._locate(consumed)
        stage._opening = unseen(self._plan(stage._first_epoch), first, self.shards.offsets)
        stage._plan.cache_clear()
        stage._num_opening = stage._plan(stage._first_epoch).num_sequences
        return stage

    def samples_per_epoch(self) -> int:
        """The same in every whole epoch: packing depends on the lengths of the documents alone."""
        return self._num_samples

    def describe(self, samples: int) -> str:
        """How often that many samples show the corpus, for the person who starts a run."""
        return f"{samples / self._num_samples:.2f} epochs"

    def batch(self, first: int, count: int) -> Batch:
        """Samples first … first + count - 1 of the run (or stage), as count * seq_len tokens."""
        pieces, sample, end = [], first, first + count
        while sample < end:
            epoch, index = self._locate(sample)
            plan = self._plan(epoch)
            stop = min(index + end - sample, plan.num_sequences)
            pieces.append(_pieces(plan, index, stop))
            sample += stop - index
        start, length = map(np.concatenate, zip(*pieces, strict=True))
        return _assemble(self.shards.tokens, start, length, self.eot_id)

    def _locate(self, sample: int) -> tuple[int, int]:
        """The epoch of a sample and its place in it."""
        if sample < self._num_opening:
            return self._first_epoch, sample
        epochs, index = divmod(sample - self._num_opening, self._num_samples)
        return self._first_epoch + 1 + epochs, index

    def _make_plan(self, epoch: int) -> Plan:
        offsets = self.shards.offsets
        documents = self._opening if epoch == self._first_epoch else (offsets[:-1], offsets[1:])
        return plan_epoch(*documents, self.seq_len, self.seed, epoch)


def validation_batches(
    shards: TokenShards, seq_len: int, eot_id: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """One sequence of `seq_len` tokens after another, in the order of the documents.

    Every token is scored once, packed as in training; max_tokens (padding counts) ends the walk
    early, after a whole number of sequences and at least one.
    """
    check(shards, seq_len, eot_id)
    plan = plan_epoch(shards.offsets[:-1], shards.offsets[1:], seq_len)
    count = plan.num_sequences
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // seq_len))
    for i in range(count):
        yield _assemble(shards.tokens, *_pieces(plan, i, i + 1), eot_id)


def check(shards: TokenShards, seq_len: int, eot_id: int) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: a sequence needs at least 2 tokens")
    if shards.tokens[0] != eot_id:
        raise ValueError(
            f"{shards.folder}: was made with another tokenizer, as its documents start with token "
            f"{shards.tokens[0]} where end of text is {eot_id} in this one"
        )


def _pieces(plan: Plan, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = slice(plan.first_piece[first], plan.first_piece[last])
    return plan.start[pieces], plan.length[pieces]


def _assemble(tokens: np.ndarray, start: np.ndarray, length: np.ndarray, eot_id: int) -> Batch:
    ends = np.cumsum(length)
    positions = np.arange(ends[-1]) - np.repeat(ends - length, length)
    index = np.repeat(start, length) + positions
    padding = np.repeat(start == PADDING, length)
    index[padding] = 0
    # Documents lie one after another, each opened by the end-of-text that closes the one before, so
    # the next token in the file is the target everywhere: inside, at a cut, and at the end.
    inputs = tokens.take(index).astype(np.int64)
    targets = tokens.take(index + 1).astype(np.int64)
    inputs[padding], targets[padding] = eot_id, NOT_SCORED
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    arrays = inputs, targets, np.zeros(len(inputs), np.float32), positions, cu_seqlens
    return Batch(*map(torch.from_numpy, arrays), int(length.max()))
