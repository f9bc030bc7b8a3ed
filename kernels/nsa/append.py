"""One new token of every sequence into a layer's caches, in one launch: the writes of a decode step.

As in decode.py: Triton on CUDA tensors, which never waits for the device, so that a step can be
captured in a CUDA graph, and a plain torch twin on any other device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def append(
    caches: Sequence[Tensor],
    tokens: Sequence[Tensor],
    lengths: Tensor,
    compressed: Sequence[Tensor] = (),
    scores: Sequence[Tensor] = (),
    positions: Sequence[Tensor] = (),
    stride: int = 1,
) -> None:
    """Write tokens[i] [B, Hkv, D] into caches[i] [B, rows, Hkv, D], token t in row t % rows.

    lengths int32 [B] counts each sequence's tokens with the new one; where it is 0, nothing is
    written. The caches differ in their rows only, and all tensors are contiguous.

    The first caches may be rings of the last l tokens that feed `compressed` [B, C, Hkv, D] of the
    same number: where the new token completes a block of l tokens that starts at a multiple of
    `stride`, that block's gated mean (compress.py's gated_pool) goes into its row. A token's logit
    is its product with scores[i] [Hkv, D] plus positions[i] [l, Hkv] by its place in the block.
    Raises ValueError when shapes do not fit together.
    """
    if not (len(compressed) == len(scores) == len(positions) <= len(caches) == len(tokens)):
        raise ValueError("append takes a token for every cache, and all of a ring's parts or none.")
    batch, heads, dim = shape = tuple(tokens[0].shape)
    expected = {"lengths": (lengths, (batch,))}
    for i, (cache, token) in enumerate(zip(caches, tokens, strict=True)):
        expected[f"tokens[{i}]"] = token, shape
        expected[f"caches[{i}]"] = cache, (batch, cache.shape[1], heads, dim)
    length = caches[0].shape[1]
    for i, (rows, score, position) in enumerate(zip(compressed, scores, positions, strict=True)):
        expected[f"caches[{i}]"] = caches[i], (batch, length, heads, dim)
        expected[f"compressed[{i}]"] = rows, (batch, rows.shape[1], heads, dim)
        expected[f"scores[{i}]"] = score, (heads, dim)
        expected[f"positions[{i}]"] = position, (length, heads)
    for name, (x, wanted) in expected.items():
        if tuple(x.shape) != wanted:
            raise ValueError(f"append: {name} has shape {tuple(x.shape)}, not {wanted}.")
        if not x.is_contiguous():
            raise ValueError(f"append: {name} must be contiguous.")
    _append(caches, tokens, lengths, compressed, scores, positions, stride)


@torch.library.custom_op("nsa::append", mutates_args=("caches", "compressed"))
def _append(
    caches: Sequence[Tensor],
    tokens: Sequence[Tensor],
    lengths: Tensor,
    compressed: Sequence[Tensor],
    scores: Sequence[Tensor],
    positions: Sequence[Tensor],
    stride: int,
) -> None:
    if lengths.is_cuda:
        from kernels.nsa.append_triton import append_step as step  # needs a working Triton
    else:
        step = _twin
    step(caches, tokens, lengths, compressed, scores, positions, stride)


def _twin(caches, tokens, lengths, compressed, scores, positions, stride) -> None:
    """In plain torch."""
    sequence = lengths.nonzero()[:, 0]
    for cache, token in zip(caches, tokens, strict=True):
        cache[sequence, (lengths[sequence] - 1) % cache.shape[1]] = token[sequence]
    # Rings come first, so there are as many as compressed caches.
    for ring, rows, score, position in zip(caches, compressed, scores, positions, strict=False):
        wide, length = torch.promote_types(ring.dtype, torch.float32), ring.shape[1]
        done = ((lengths >= length) & ((lengths - length) % stride == 0)).nonzero()[:, 0]
        oldest_first = lengths[done, None] + torch.arange(length, device=lengths.device)
        block = ring[done[:, None], oldest_first % length]  # [complete, l, Hkv, D]
        logits = (block * score).sum(-1).to(wide) + position.to(wide)
        mean = (block.to(wide) * logits.softmax(1)[..., None]).sum(1)
        rows[done, (lengths[done] - length) // stride] = mean.to(rows.dtype)


@_append.register_fake
def _(*args):
    return None
