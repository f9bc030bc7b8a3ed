"""Block geometry of Native Sparse Attention: the only place that knows how l, d, l' and documents
become indices (arXiv 2502.11089, sections 3.2 and 3.3).

All block numbers and positions are relative to the document's first token, so a packed batch sees
exactly the blocks that its documents have alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def causal_pairs(tokens: int, reach: int) -> int:
    """Query-key pairs of one document when each query sees at most the `reach` keys up to its own."""
    reach = min(reach, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


@dataclass(frozen=True)
class Geometry:
    """The sizes that define NSA, in tokens unless said otherwise.

    Compressed block i covers tokens [i*d, i*d + l); selection block j covers [j*l', (j+1)*l').
    Raises ValueError with one sentence when the sizes do not fit together.
    """

    compress_block: int = 32  # l
    compress_stride: int = 16  # d
    select_block: int = 64  # l'
    num_selected: int = 16  # n, blocks per token and KV head, forced ones included; 0: all
    window: int = 512  # w
    num_initial: int = 1  # blocks at the start of the document that are always selected
    num_local: int = 2  # the own block and those before it that are always selected

    def __post_init__(self) -> None:
        for name in ("compress_block", "compress_stride", "select_block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"NSA {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"NSA {name}={getattr(self, name)} is not a multiple of "
                    f"compress_stride={self.compress_stride}."
                )
        if self.num_initial < 0 or self.num_local < 1:
            raise ValueError("NSA needs num_initial >= 0 and num_local >= 1 (the own block).")
        if self.num_selected and self.num_selected < self.num_initial + self.num_local:
            raise ValueError(
                f"NSA num_selected={self.num_selected} is smaller than the forced blocks, "
                f"num_initial + num_local = {self.num_initial + self.num_local}."
            )

    def numbers(self) -> list[int]:
        """All of them, as torch's operators take them; Geometry(*numbers) is the way back."""
        blocks = self.compress_block, self.compress_stride, self.select_block
        return [*blocks, self.num_selected, self.window, self.num_initial, self.num_local]

    def check_selects(self) -> None:
        """Raises ValueError where all blocks were asked for, which only nsa_attention takes."""
        if not self.num_selected:
            raise ValueError(
                "NSA num_selected=0 is for training; with a cache it must be at least 1."
            )

    def num_compressed(self, length):
        """Compressed blocks of a document of `length` tokens (int or tensor)."""
        blocks = (length - self.compress_block) // self.compress_stride + 1
        return blocks.clamp(min=0) if isinstance(blocks, torch.Tensor) else max(blocks, 0)

    def num_visible(self, position):
        """Compressed blocks that end at or before `position`: the prefix a query there may see.

        A block is complete at position p when a document of p + 1 tokens contains it.
        """
        return self.num_compressed(position + 1)

    def capacity(self, num_tokens: int) -> int:
        """Rows that hold the compressed keys of any packing of `num_tokens` tokens.

        Every document has at most length // d blocks, so the bound needs no look at cu_seqlens
        and therefore no device synchronisation.
        """
        return max(num_tokens // self.compress_stride, 1)

    def overlap_weights(self) -> tuple[int, list[int]]:
        """How compressed blocks add up to the importance of a selection block (Eq. 9).

        Returns (first, weights): selection block j gets sum_m weights[m] * p[j*l'/d + first + m],
        where a weight is the number of shared tokens divided by d and blocks out of range count 0.
        With l=32, d=16, l'=64 this is (-1, [1, 2, 2, 2, 1]).
        """
        length, stride, size = self.compress_block, self.compress_stride, self.select_block
        first = 1 - length // stride
        starts = range(first * stride, size, stride)
        weights = [(min(s + length, size) - max(s, 0)) // stride for s in starts]
        return first, weights

    def compressed_offsets(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """First compressed row of each document: int32 [N+1] from cu_seqlens int32 [N+1]."""
        counts = self.num_compressed(cu_seqlens.diff())
        return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

    def block_tokens(
        self, cu_seqlens: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rows of each compressed row: int64 [C, l], and bool [C], false on unused rows.

        Unused rows point at token 0. Works on the device, without synchronisation.
        """
        offsets = self.compressed_offsets(cu_seqlens)
        row = torch.arange(self.capacity(num_tokens), device=cu_seqlens.device, dtype=torch.int32)
        # Of all offsets: torch 2.11 can't compile a search in a part of them for a GPU.
        document = torch.searchsorted(offsets, row, right=True) - 1
        document = document.clamp(max=len(offsets) - 2)
        start = cu_seqlens[document] + (row - offsets[document]) * self.compress_stride
        used = row < offsets[-1]
        tokens = torch.where(used, start, 0)[:, None]
        tokens = tokens + torch.arange(self.compress_block, device=cu_seqlens.device)
        return tokens.clamp(max=num_tokens - 1), used
