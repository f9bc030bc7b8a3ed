"""Work lists for packed documents: which document, and where in it, each tile of rows works on.

A tile never crosses a document. The number of tiles depends on the document lengths, which live on
the device; the grid is launched at an upper bound instead and the surplus programs return at once,
so that building the list needs no host synchronisation.

All layers of a model, forward and backward, cut the same documents; what is made from a cu_seqlens
is therefore kept as long as that tensor lives unchanged: these launches were half of all of them,
which counts at short lengths.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.launch import launch
from kernels.nsa.geometry import Geometry

_CHUNK = 256
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _remember(cu_rows: torch.Tensor, key: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """make(), or what it gave for the same tensor, unchanged since, and the same key.

    A CUDA graph reruns its launches with other contents in the same tensor, so nothing that is made
    outside may enter it.
    """
    if cu_rows.is_inference() or cu_rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return make()
    version, made = _made.get(cu_rows, (None, {}))
    if version != cu_rows._version:
        made = {}
        _made[cu_rows] = cu_rows._version, made
    if key not in made:
        made[key] = make()
    return made[key]


def max_tiles(num_rows: int, num_documents: int, rows_per_tile: int) -> int:
    """Most tiles that `num_documents` documents with `num_rows` rows in all can need."""
    return num_rows // rows_per_tile + min(num_documents, num_rows)


def tile_map(cu_rows: torch.Tensor, num_rows: int, rows_per_tile: int) -> torch.Tensor:
    """Cut every document's rows into tiles of `rows_per_tile`.

    cu_rows: int32 [N + 1], first row of every document (the last entry is at most num_rows).
    num_rows: rows there is room for, e.g. T for tokens, C for compressed blocks.
    Returns int32 [max_tiles, 2] in document order: (document, first row inside the document);
    the document of an unused entry is -1, and all unused entries come last.
    """

    def make():
        num_documents = cu_rows.numel() - 1
        size = max_tiles(num_rows, num_documents, rows_per_tile)
        tiles = torch.empty(size, 2, dtype=torch.int32, device=cu_rows.device)
        launch(
            _tile_map, (num_documents,),
            cu_rows, tiles, num_documents, size, ROWS=rows_per_tile, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
        return tiles

    return _remember(cu_rows, ("tiles", num_rows, rows_per_tile), make)


def first_tiles(cu_rows: torch.Tensor, rows_per_tile: int) -> torch.Tensor:
    """int32 [N]: the number of each document's first tile in tile_map's list."""

    def make():
        counts = (cu_rows.diff() + rows_per_tile - 1) // rows_per_tile
        return counts.cumsum(0, dtype=torch.int32) - counts

    return _remember(cu_rows, ("first", rows_per_tile), make)


def compressed_offsets(cu_seqlens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """geometry.compressed_offsets(cu_seqlens) in one launch, which counts at short lengths."""

    def make():
        offsets = torch.empty_like(cu_seqlens)
        launch(
            _compressed_offsets, (1,),
            cu_seqlens, offsets, cu_seqlens.numel() - 1, BLOCK=geometry.compress_block,
            STRIDE=geometry.compress_stride, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
        return offsets

    return _remember(cu_seqlens, ("compressed", geometry), make)


@triton.jit
def _compressed_offsets(
    cu_rows, offsets, num_documents,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, CHUNK)
    tl.store(offsets, 0)
    base = 0
    for i in range(0, num_documents, CHUNK):
        ok = i + lane < num_documents
        first = tl.load(cu_rows + i + lane, mask=ok, other=0)
        length = tl.load(cu_rows + i + lane + 1, mask=ok, other=0) - first
        count = tl.where(length >= BLOCK, (length - BLOCK) // STRIDE + 1, 0)
        tl.store(offsets + 1 + i + lane, base + tl.cumsum(count, 0), mask=ok)
        base += tl.sum(count, 0)


@triton.jit
def _tile_map(cu_rows, tiles, num_documents, size, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Program i counts the tiles of the documents before document i, then writes its own."""
    document = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    before = tl.zeros([CHUNK], tl.int32)
    for i in range(0, document, CHUNK):
        ok = i + lane < document
        first = tl.load(cu_rows + i + lane, mask=ok, other=0)
        end = tl.load(cu_rows + i + lane + 1, mask=ok, other=0)
        before += (end - first + ROWS - 1) // ROWS
    base = tl.sum(before, 0)
    length = tl.load(cu_rows + document + 1) - tl.load(cu_rows + document)
    count = (length + ROWS - 1) // ROWS
    for i in range(0, count, CHUNK):
        ok = i + lane < count
        tl.store(tiles + 2 * (base + i + lane), document, mask=ok)
        tl.store(tiles + 2 * (base + i + lane) + 1, (i + lane) * ROWS, mask=ok)
    if document == num_documents - 1:
        for i in range(base + count, size, CHUNK):
            tl.store(tiles + 2 * (i + lane), -1, mask=i + lane < size)
            tl.store(tiles + 2 * (i + lane) + 1, 0, mask=i + lane < size)
