"""The plan of an epoch: which pieces of which documents make up each sequence. Pure numpy.

Documents longer than a sequence are cut into whole sequences and a rest, so nothing is lost; the
rests and the short documents are packed by best-fit decreasing (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", arXiv:2404.10830). How many sequences come out depends on
the lengths alone, so every epoch of a corpus has the same number of them.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

PADDING = -1  # the `start` of a piece that holds no text


class Plan(NamedTuple):
    """Sequence i is the pieces first_piece[i] … first_piece[i + 1] - 1, seq_len tokens in all.

    start        int64 [P], a piece's first token in the token file, or PADDING (always last)
    length       int64 [P], in tokens
    first_piece  int64 [S + 1]
    """

    start: np.ndarray
    length: np.ndarray
    first_piece: np.ndarray

    @property
    def num_sequences(self) -> int:
        return len(self.first_piece) - 1


def plan_epoch(
    starts: np.ndarray, ends: np.ndarray, seq_len: int, seed: int | None = None, epoch: int = 0
) -> Plan:
    """Places every token of some documents in exactly one sequence of `seq_len` tokens.

    Args:
        starts, ends: int64 [N], where each document lies in the token file.
        seed: documents meet, and sequences follow each other, in an order drawn from (seed, epoch);
            None keeps the order of the file.
    """
    lengths = ends - starts
    wholes = lengths // seq_len
    within = np.arange(wholes.sum()) - np.repeat(np.cumsum(wholes) - wholes, wholes)
    whole_start = np.repeat(starts, wholes) + seq_len * within

    documents = _order(len(lengths), seed, epoch, stream=0)
    rest = (lengths % seq_len)[documents]
    rest_start = ends[documents] - rest
    rest, rest_start = rest[rest > 0], rest_start[rest > 0]
    bins = best_fit(rest, seq_len)
    room = seq_len - np.bincount(bins, weights=rest).astype(np.int64)
    padded = np.flatnonzero(room)

    start = np.concatenate([whole_start, rest_start, np.full(len(padded), PADDING)])
    length = np.concatenate([np.full(len(whole_start), seq_len), rest, room[padded]])
    sequence = np.concatenate(
        [np.arange(len(whole_start)), len(whole_start) + bins, len(whole_start) + padded]
    )
    rank = _ranks(sequence, start, seed, epoch)[sequence]
    pieces = np.argsort(rank, kind="stable")
    first_piece = np.concatenate([[0], np.cumsum(np.bincount(rank))])
    return Plan(start[pieces], length[pieces], first_piece)


def unseen(plan: Plan, consumed: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text of a plan's sequences from number `consumed` on, as starts and ends, int64 [M] each.

    Pieces of one document that touch are one again, so that longer sequences can hold more of it.

    Args:
        offsets: int64 [N + 1], where each document starts in the token file, and its end.
    """
    pieces = slice(plan.first_piece[consumed], None)
    text = plan.start[pieces] != PADDING
    starts = plan.start[pieces][text]
    ends = starts + plan.length[pieces][text]
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    opens = offsets[np.searchsorted(offsets, starts)] == starts
    opens[1:] |= starts[1:] != ends[:-1]
    opens[:1] = True
    return starts[opens], ends[np.append(opens[1:], True)]


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: longest first, each into the fullest bin that still takes it.

    Args:
        lengths: int64 [n], each in 1 … capacity.

    Returns:
        int64 [n], the bin of each item, counted from 0.
    """
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, first = np.unique(-lengths[order], return_index=True)
    bins_by_room = defaultdict(list)
    rooms = 0  # bit r is set while some bin has exactly r tokens of room: one shift finds the fit
    num_bins = 0
    end_of_size = np.append(first, len(order))[1:]
    runs = np.stack([-sizes, first, end_of_size], axis=1)  # of equal lengths, longest first
    for size, item, end in runs.tolist():
        while item < end:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                bin = bins_by_room[room].pop()
                if not bins_by_room[room]:
                    rooms ^= 1 << room
            else:
                room, bin, num_bins = capacity, num_bins, num_bins + 1
            taken = min(room // size, end - item)  # it stays the best fit for the next of this size
            bins[order[item : item + taken]] = bin
            item += taken
            if room := room - taken * size:
                bins_by_room[room].append(bin)
                rooms |= 1 << room
    return bins


def _order(count: int, seed: int | None, epoch: int, stream: int) -> np.ndarray:
    """A permutation of `count` drawn from (seed, epoch, stream), or the identity without a seed.

    It sorts the raw output of PCG64, which numpy promises never to change, unlike its `shuffle`.
    """
    if seed is None:
        return np.arange(count)
    keys = np.random.PCG64([seed, epoch, stream]).random_raw(count)
    return np.argsort(keys, kind="stable")


def _ranks(sequence: np.ndarray, start: np.ndarray, seed: int | None, epoch: int) -> np.ndarray:
    """The place in the epoch of each sequence: drawn, or without a seed by its earliest token."""
    count = sequence.max(initial=-1) + 1
    if seed is None:
        earliest = np.full(count, np.iinfo(np.int64).max)
        text = start != PADDING
        np.minimum.at(earliest, sequence[text], start[text])
        order = np.argsort(earliest, kind="stable")
    else:
        order = _order(count, seed, epoch, stream=1)
    ranks = np.empty(count, np.int64)
    ranks[order] = np.arange(count)
    return ranks
