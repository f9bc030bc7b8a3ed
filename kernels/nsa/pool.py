"""The gated mean of compress.py as one Triton kernel forward and one backward.

Gathering blocks of l tokens every d copies each token l/d times, and the gradient of such a gather
sorts; here a program reads its tokens where they lie. Backward is token-major: a token adds up what
its l/d blocks send it, so nothing is added atomically.

With w = softmax_i(score_i + position_i) over a block's tokens and y = sum_i w_i x_i:
    dx_i = w_i dy,   dlogit_i = w_i (dy . x_i - dy . y).
"""

import torch
import triton
import triton.language as tl

from kernels.launch import launch, next_power_of_2
from kernels.nsa.gates import row_delta
from kernels.nsa.geometry import Geometry
from kernels.nsa.tiles import compressed_offsets, tile_map

BLOCKS = 8  # compressed rows of one forward program
TOKENS = 32  # tokens of one backward program


def pool_forward(x, score, position, cu_seqlens, geometry: Geometry):
    """y [C, Hkv, D] in x's dtype, zero in rows that no document uses, and lse [C, Hkv] fp32.

    x [T, Hkv, D], score [T, Hkv] and position [l, Hkv], all contiguous.
    """
    tokens, heads, dim = x.shape
    rows = geometry.capacity(tokens)
    y = x.new_zeros(rows, heads, dim)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=x.device)
    if tokens:
        offsets = compressed_offsets(cu_seqlens, geometry)
        work = tile_map(offsets, rows, BLOCKS)
        launch(
            _forward_kernel, (len(work), heads),
            x, score, position, y, lse, work, cu_seqlens, offsets,
            **_sizes(x, geometry), BLOCKS=BLOCKS, num_warps=4,
        )  # fmt: skip
    return y, lse


def pool_backward(dy, x, score, position, y, lse, cu_seqlens, geometry: Geometry):
    """dx, dscore and dposition of pool_forward, in their inputs' dtypes."""
    tokens, heads, _ = x.shape
    dx, dscore = torch.empty_like(x), torch.empty_like(score)
    # The gradient of the logit of every (block, token): each has a place of its own.
    dlogits = lse.new_zeros(len(y), geometry.compress_block, heads)
    if tokens:
        work = tile_map(cu_seqlens, tokens, TOKENS)
        launch(
            _backward_kernel, (len(work), heads),
            dy, x, score, position, lse, row_delta(dy, y), dx, dscore, dlogits,
            work, cu_seqlens, compressed_offsets(cu_seqlens, geometry),
            **_sizes(x, geometry), TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    return dx, dscore, dlogits.sum(0).to(position.dtype)


def _sizes(x, geometry: Geometry) -> dict[str, int]:
    return dict(
        H=x.shape[1], D=x.shape[2], DP=next_power_of_2(x.shape[2]),
        L=geometry.compress_block, STRIDE=geometry.compress_stride,
    )  # fmt: skip


@triton.jit
def _forward_kernel(
    x, score, position, y, lse, tiles, cu_seqlens, cu_rows,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    h = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    block = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCKS)
    row0 = tl.load(cu_rows + document)
    valid = block < tl.load(cu_rows + document + 1) - row0
    token = (tl.load(cu_seqlens + document) + block * STRIDE).to(tl.int64)
    d = tl.arange(0, DP)
    mask = valid[:, None] & (d < D)[None, :]
    peak = tl.full([BLOCKS], -1.0e30, tl.float32)
    total = tl.zeros([BLOCKS], tl.float32)
    acc = tl.zeros([BLOCKS, DP], tl.float32)
    for i in range(L):
        at = (token + i) * H + h
        logit = tl.load(score + at, mask=valid, other=0.0).to(tl.float32)
        logit += tl.load(position + i * H + h).to(tl.float32)
        new_peak = tl.maximum(peak, logit)
        decay, weight = tl.exp(peak - new_peak), tl.exp(logit - new_peak)
        rows = tl.load(x + at[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = acc * decay[:, None] + weight[:, None] * rows
        total = total * decay + weight
        peak = new_peak
    out = (row0 + block).to(tl.int64) * H + h
    tl.store(lse + out, peak + tl.log(total), mask=valid)
    acc = (acc / total[:, None]).to(y.dtype.element_ty)
    tl.store(y + out[:, None] * D + d[None, :], acc, mask=mask)


@triton.jit
def _backward_kernel(
    dy, x, score, position, lse, delta, dx, dscore, dlogits, tiles, cu_seqlens, cu_rows,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    h = tl.program_id(1)
    document = tl.load(tiles + 2 * tile)
    if document < 0:
        return
    place = tl.load(tiles + 2 * tile + 1) + tl.arange(0, TOKENS)
    token0 = tl.load(cu_seqlens + document)
    valid = token0 + place < tl.load(cu_seqlens + document + 1)
    row0 = tl.load(cu_rows + document)
    count = tl.load(cu_rows + document + 1) - row0
    at = (token0 + place).to(tl.int64) * H + h
    d = tl.arange(0, DP)
    mask = valid[:, None] & (d < D)[None, :]
    rows = tl.load(x + at[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    own_score = tl.load(score + at, mask=valid, other=0.0).to(tl.float32)
    dx_sum = tl.zeros([TOKENS, DP], tl.float32)
    dscore_sum = tl.zeros([TOKENS], tl.float32)
    for m in tl.static_range(L // STRIDE):
        block = place // STRIDE - m
        i = place % STRIDE + m * STRIDE
        inside = valid & (block >= 0) & (block < count)
        source = (row0 + block).to(tl.int64) * H + h
        logit = own_score + tl.load(position + i * H + h, mask=inside, other=0.0).to(tl.float32)
        weight = tl.exp(logit - tl.load(lse + source, mask=inside, other=float("inf")))
        grad = tl.load(
            dy + source[:, None] * D + d[None, :], mask=inside[:, None] & mask, other=0.0
        ).to(tl.float32)
        dlogit = weight * (tl.sum(grad * rows, 1) - tl.load(delta + source, mask=inside, other=0.0))
        tl.store(dlogits + ((row0 + block).to(tl.int64) * L + i) * H + h, dlogit, mask=inside)
        dx_sum += weight[:, None] * grad
        dscore_sum += dlogit
    tl.store(dx + at[:, None] * D + d[None, :], dx_sum.to(dx.dtype.element_ty), mask=mask)
    tl.store(dscore + at, dscore_sum.to(dscore.dtype.element_ty), mask=valid)
