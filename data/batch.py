"""What the trainer is given: packed documents in one flat row of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

NOT_SCORED = -100  # torch's cross_entropy leaves this target out


class Batch(NamedTuple):
    """One micro-batch of `sequences * seq_len = T` tokens, holding N documents (or pieces of some).

    tokens      int64 [T]
    targets     int64 [T], the token that follows in the same text; NOT_SCORED in padding
    answers     float32 [T], above 0 for targets that belong to an answer of a synthetic task: the number
                of tokens in their document divided by that in its answers, so that a document's add
                up to its length; all 0 in text and copies
    positions   int64 [T], 0, 1, 2, … from the first token of each document
    cu_seqlens  int32 [N + 1], where each document starts; the last entry is T
    max_seqlen  length of the longest document, in tokens

    Padding is a document of its own, so attention never mixes it with text.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    answers: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        *tensors, max_seqlen = self
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), max_seqlen)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The batches' documents one after another, as one batch."""
    if len(batches) == 1:
        return batches[0]
    *tensors, cu_seqlens, max_seqlen = zip(*batches, strict=True)
    ends = np.cumsum(np.concatenate([[0], *(np.diff(ends) for ends in cu_seqlens)]), dtype=np.int32)
    joined = [*map(np.concatenate, tensors), ends]  # numpy: no thread pool for so little
    return Batch(*map(torch.from_numpy, joined), max(max_seqlen))
