"""Flash attention where each query sees one interval of its document's keys.

Key n of a document is complete at position n * STRIDE + OFFSET: the token itself for STRIDE 1,
OFFSET 0, a compressed block for STRIDE d, OFFSET l - 1. A query at position t sees every key that
is complete at t, or, when WINDOWED, of those the keys n > t - window. The compressed branch and the
window branch are the two uses.

Rows are packed by group: the G query heads of a KV head share its keys, so a tile holds
rows = (query, head of the group), at least 64 of them, which is what wgmma needs. G is padded to a
power of two inside a tile, and so are head dimensions, by the TMA unit, which fills what lies
outside a tensor with zeros.

Backward in two kernels, 7 matrix products instead of the 5 of a fused one, because a fused one
needs a sum over programs for dQ: by fp32 atomics, which are not deterministic and were slower.
dQ is query-major; dK/dV is key-major and may be split over chunks of queries, each with an fp32
partial, summed in a fixed order by a third kernel.

The kernels exist in portable Triton (flash_triton.py), which also runs in the interpreter, and,
where Triton's scheduling is the limit, in Gluon for Hopper (flash_hopper*.py).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.nsa import flash_triton
from kernels.nsa.flash_triton import ALIGN, Tile, padded
from kernels.nsa.tiles import tile_map

# dK/dV programs that keep the GPU busy to the end: rounds over the 132 multiprocessors of an H100.
# A constant, so that the order of the sums does not depend on the device.
PROGRAMS = 2112
MIN_CHUNK = 512  # queries; fewer do not pay for a partial
SUM_ROWS = 16  # keys whose partials one program adds up


class HopperTile(NamedTuple):
    """How a Gluon kernel cuts its work: as Tile, its warps being fixed."""

    rows: int
    keys: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile | HopperTile
    dq: Tile | HopperTile
    dkv: Tile | HopperTile


class Keys(NamedTuple):
    """Which keys a query sees (see the head of this file), and where they lie.

    cu_keys int32 [N + 1] delimits the documents' keys as cu_seqlens does their queries.
    """

    cu_keys: torch.Tensor
    stride: int
    offset: int
    window: int | None


# By padded head dimension. Measured on an H100 (Triton 3.6, bf16, 65,536 tokens, 16/4 and 64/4
# heads): independent 64-row programs, two to four on a multiprocessor, overlap one's softmax with
# another's products; programs of 8 warps run in lockstep and were up to 1.5 times slower.
# Dimension 256 is what fits into shared memory and registers; it was not tuned.
PORTABLE = {
    64: Tiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
}
# Over a short window a step of 128 keys wastes more at both ends, and its masked form's registers
# leave room for two programs instead of four: 16/4 heads of 64, 0.64 ms for 0.44.
PORTABLE_WINDOW = PORTABLE | {64: PORTABLE[64]._replace(forward=Tile(64, 64, 4, 2))}
# fp32 is for tests: its products run outside the tensor cores.
FLOAT32 = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
# Dimension 128 only; at 64 the softmax is the limit and the portable kernels were faster.
# Against those, at 65,536 tokens and 64/4 heads, ms compressed and window: forward 7.4 for 9.9 and
# 2.8 for 3.4, dQ 9.8 for 12.0 and 3.5 for 4.3, dK/dV of the window 4.6 for 6.4.
HOPPER = Tiles(HopperTile(128, 128, 2), HopperTile(128, 64, 3), HopperTile(64, 128, 3))
HOPPER_WINDOW = HOPPER._replace(forward=HopperTile(128, 64, 3))


def on_hopper(q, k) -> bool:
    """Whether the Gluon kernels can run: on a Hopper GPU, for groups of at most 64 heads."""
    if not q.is_cuda or q.shape[1] > 64 * k.shape[1]:
        return False
    return _major_version(q.device) == 9


@cache
def _major_version(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _tiles(q, k, v, keys: Keys) -> Tiles:
    dims = q.shape[2], v.shape[2]
    if q.dtype == torch.float32:
        return FLOAT32
    if dims == (128, 128) and on_hopper(q, k):
        return HOPPER if keys.window is None else HOPPER_WINDOW
    portable = PORTABLE if keys.window is None else PORTABLE_WINDOW
    return portable[max(padded(max(dims)), 64)]


def flash_forward(q, k, v, cu_seqlens, keys: Keys, scale: float, merge=(None,) * 4):
    """o [T, H, Dv] in q's dtype and lse [T, H] fp32; a query that sees nothing gets 0 and -inf.

    merge: gates [T, H, 3], two other branches' o, and a tensor of their shape that is filled with
    what the gates make of the three, o last; contiguous.
    """
    _check(q, k, v)
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.numel():
        tile = _tiles(q, k, v, keys).forward
        _backend(tile).forward(q, k, v, o, lse, merge, cu_seqlens, keys, tile, scale)
    return o, lse


def flash_backward(
    do, q, k, v, lse, delta, cu_seqlens, max_seqlen: int, keys: Keys, scale: float, dq=None
):
    """dq, dk, dv of flash_forward; key rows that no document uses get exactly zero.

    delta [T, H] fp32 = sum(dO * O). A dq that is given is added to in place.
    """
    add = dq is not None
    dq = dq if add else torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    if not q.numel():
        return dq, dk, dv
    tiles = _tiles(q, k, v, keys)
    tokens, heads, _ = q.shape
    kv_heads = k.shape[1]
    # Room for every document to start at a multiple of ALIGN rows, see flash_triton.stat_row.
    rows = (tokens // ALIGN.value + cu_seqlens.numel() - 1) * ALIGN.value
    group = next_power_of_2(heads // kv_heads)
    stats = torch.empty(2, kv_heads, rows, group, dtype=torch.float32, device=q.device)
    inputs = do, q, k, v, lse, delta, stats, dq, add, cu_seqlens, keys
    _backend(tiles.dq).backward_dq(*inputs, tiles.dq, scale)

    tile = tiles.dkv
    work = tile_map(keys.cu_keys, k.shape[0], tile.keys)
    num_chunks = _num_chunks(len(work) * kv_heads, max_seqlen, keys)
    chunk = cdiv(max_seqlen, num_chunks * ALIGN.value) * ALIGN.value
    parts = dk, dv
    if num_chunks > 1:
        parts = [x.new_empty(num_chunks, *x.shape, dtype=torch.float32) for x in (k, v)]
    inputs = do, q, k, v, stats, *parts, work, num_chunks, chunk, cu_seqlens, keys
    _backend(tile).backward_dkv(*inputs, tile, scale)
    if num_chunks > 1:
        launch(
            _sum_chunks, (len(work), kv_heads, cdiv(tile.keys, SUM_ROWS)),
            *parts, dk, dv, work, cu_seqlens, keys.cu_keys, chunk, k.shape[0],
            HKV=kv_heads, DK=k.shape[2], DV=v.shape[2],
            DKP=padded(k.shape[2]), DVP=padded(v.shape[2]),
            STRIDE=keys.stride, OFFSET=keys.offset, ROWS=SUM_ROWS, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv


def _backend(tile: Tile | HopperTile):
    """The module whose kernels take such a tile. Gluon is imported only where it will run."""
    if isinstance(tile, HopperTile):
        from kernels.nsa import flash_hopper

        return flash_hopper
    return flash_triton


def _check(q, k, v) -> None:
    """ValueError, in a sentence, for what no tile is made for."""
    widest = max(q.shape[2], v.shape[2])
    if q.shape[2] % 8 or v.shape[2] % 8 or widest > 256:
        raise ValueError(
            f"NSA kernels take head dimensions that are multiples of 8 up to 256, "
            f"not {q.shape[2]} for keys and {v.shape[2]} for values."
        )
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"NSA kernels take bfloat16, float16 or float32, not {q.dtype}.")


def _num_chunks(programs: int, max_seqlen: int, keys: Keys) -> int:
    """Chunks of queries to split dK/dV over, when the key tiles alone would leave the GPU idle."""
    if keys.window is not None:
        return 1
    wanted = cdiv(PROGRAMS, max(programs, 1))
    return max(min(wanted, max_seqlen // MIN_CHUNK), 1)


@triton.jit(do_not_specialize=["chunk", "num_keys"])
def _sum_chunks(
    dk_parts, dv_parts, dk, dv, tiles, cu_queries, cu_keys, chunk, num_keys,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the partials of ROWS keys in ascending order of chunks: those that dK/dV wrote."""
    tile = tl.program_id(0)
    h = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    length = tl.load(cu_queries + document + 1) - tl.load(cu_queries + document)
    key0 = tl.load(cu_keys + document)
    count = tl.load(cu_keys + document + 1) - key0
    n = first + tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row = (key0 + n).to(tl.int64) * HKV + h
    d = tl.arange(0, DKP)
    e = tl.arange(0, DVP)
    k_mask = (n < count)[:, None] & (d < DK)[None, :]
    v_mask = (n < count)[:, None] & (e < DV)[None, :]
    k_at = row[:, None] * DK + d[None, :]
    v_at = row[:, None] * DV + e[None, :]
    part = tl.cast(num_keys, tl.int64) * HKV
    dk_sum = tl.zeros([ROWS, DKP], tl.float32)
    dv_sum = tl.zeros([ROWS, DVP], tl.float32)
    # The chunks that hold a query of this tile begin with that of the tile's first visible one.
    for c in range((first * STRIDE + OFFSET) // chunk, tl.cdiv(length, chunk)):
        dk_sum += tl.load(dk_parts + c * part * DK + k_at, mask=k_mask, other=0.0)
        dv_sum += tl.load(dv_parts + c * part * DV + v_at, mask=v_mask, other=0.0)
    tl.store(dk + k_at, dk_sum.to(dk.dtype.element_ty), mask=k_mask)
    tl.store(dv + v_at, dv_sum.to(dv.dtype.element_ty), mask=v_mask)
