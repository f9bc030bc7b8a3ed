"""flash.py's kernels for Hopper, scheduled by hand in Gluon: the launches.

Same mathematics, arguments and results as flash_triton.py, for head dimensions that are powers of
two, 16-bit types, and groups of at most 64 heads.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl

from kernels.launch import TileView, launch
from kernels.nsa.flash_hopper_key import dkv_kernel
from kernels.nsa.flash_hopper_query import dq_kernel, forward_kernel
from kernels.nsa.flash_triton import sizes
from kernels.nsa.tiles import tile_map

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def tensor_tiles(x: torch.Tensor, *block: int) -> TileView:
    return TileView(x, block, _layout(block, x.dtype))


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a kernel of which one fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(q, k, v, o, lse, merge, cu_seqlens, keys, tile, scale: float) -> None:
    """Fill o and lse, and what flash.flash_forward says of merge."""
    shape = sizes(q, k, v, keys)
    queries = tile.rows // shape["GP"]
    work = tile_map(cu_seqlens, q.shape[0], queries)
    launch(
        forward_kernel, (multiprocessors(q.device),),
        tensor_tiles(q, queries, shape["GP"], q.shape[2]),
        tensor_tiles(k.flatten(1), tile.keys, k.shape[2]),
        tensor_tiles(v.flatten(1), tile.keys, v.shape[2]), o, lse, *merge,
        work, cu_seqlens, keys.cu_keys, len(work), keys.window or 0, scale,
        **shape, BQ=queries, BN=tile.keys, SLOTS=2, STAGES=tile.stages, num_warps=4,
    )  # fmt: skip


def backward_dq(
    do, q, k, v, lse, delta, stats, dq, add: bool, cu_seqlens, keys, tile, scale: float
) -> None:
    """Fill dq, or add to it, and stats."""
    shape = sizes(q, k, v, keys)
    queries = tile.rows // shape["GP"]
    work = tile_map(cu_seqlens, q.shape[0], queries)
    launch(
        dq_kernel, (multiprocessors(q.device),),
        tensor_tiles(q, queries, shape["GP"], q.shape[2]),
        tensor_tiles(k.flatten(1), tile.keys, k.shape[2]),
        tensor_tiles(v.flatten(1), tile.keys, v.shape[2]),
        tensor_tiles(do, queries, shape["GP"], do.shape[2]), lse, delta, *stats, dq,
        work, cu_seqlens, keys.cu_keys, len(work), keys.window or 0, scale, stats.shape[2],
        **shape, BQ=queries, BN=tile.keys, SLOTS=1, STAGES=tile.stages, ADD=add, num_warps=4,
    )  # fmt: skip


def backward_dkv(
    do, q, k, v, stats, dk, dv, work, num_chunks, chunk, cu_seqlens, keys, tile, scale: float
) -> None:
    """Fill dk and dv, or for several chunks of queries their partials."""
    shape = sizes(q, k, v, keys)
    queries = tile.rows // shape["GP"]
    launch(
        dkv_kernel, (len(work), k.shape[1], num_chunks),
        tensor_tiles(q, queries, shape["GP"], q.shape[2]),
        tensor_tiles(k.flatten(1), tile.keys, k.shape[2]),
        tensor_tiles(v.flatten(1), tile.keys, v.shape[2]),
        tensor_tiles(do, queries, shape["GP"], do.shape[2]),
        *(tensor_tiles(x.view(-1), tile.rows) for x in stats), dk, dv,
        work, cu_seqlens, keys.cu_keys, keys.window or 0, scale, chunk, stats.shape[2], k.shape[0],
        **shape, BQ=queries, BN=tile.keys, STAGES=tile.stages, num_warps=4,
    )  # fmt: skip
