"""Native Sparse Attention in plain torch: the CPU backend, and the twin each kernel is tested against.

Queries are taken a tile at a time, so memory is linear in the sequence length. A tile is a run of
neighbouring queries of one document, together with the key rows that any of them may see and a mask
that says which. The branches differ in their tiles only; forward and backward are written once.

Shapes: T tokens, H query heads, Hkv key/value heads, G = H // Hkv, Dk and Dv head dimensions,
C compressed rows, n selected blocks. Layouts are packed: q [T, H, Dk], k [T, Hkv, Dk],
v [T, Hkv, Dv], documents delimited by cu_seqlens int32 [N+1].
Logits, softmax and sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.nsa.geometry import Geometry

# Elements of one tile's score matrix. 4M fp32 logits are 16 MB: a few such temporaries stay close
# to the cache and are nothing beside the activations.
TILE_SCORES = 1 << 22
MAX_TILE_QUERIES = 512
# A tile of the selected branch visits the union of its queries' blocks. Fewer queries mean a
# smaller union but more tiles; 64 balances the two at long context.
SELECTED_TILE_QUERIES = 64


class Tile(NamedTuple):
    """Queries q[rows] attend to the key rows `keys` where `mask` allows.

    rows: slice over tokens, R of them. keys: a slice of K rows shared by all KV heads, or row
    numbers int64 [Hkv, K]. mask: bool [Hkv or 1, R, K].
    """

    rows: slice
    keys: slice | torch.Tensor
    mask: torch.Tensor


class Span(NamedTuple):
    """Neighbouring queries of one document: token rows, their positions, and where its keys start."""

    rows: slice
    positions: torch.Tensor
    key_row: int
    compressed_row: int


def _spans(q, cu_seqlens, geometry: Geometry | None, max_keys, max_queries) -> Iterator[Span]:
    """Cut every document into spans whose score matrix stays under TILE_SCORES elements.

    max_keys(length) bounds the keys that a query of a document of that length can see.
    """
    key_row = compressed_row = 0
    for length in cu_seqlens.diff().tolist():
        per_query = q.shape[1] * max(max_keys(length), 1)
        step = max(min(max_queries, TILE_SCORES // per_query), 1)
        for start in range(0, length, step):
            end = min(start + step, length)
            positions = torch.arange(start, end, device=q.device)
            yield Span(slice(key_row + start, key_row + end), positions, key_row, compressed_row)
        key_row += length
        compressed_row += geometry.num_compressed(length) if geometry else 0


def _compressed_tiles(q, cu_seqlens, geometry: Geometry) -> Iterator[Tile]:
    """Each query sees the prefix of compressed blocks that are complete at its position."""
    spans = _spans(q, cu_seqlens, geometry, geometry.num_compressed, MAX_TILE_QUERIES)
    for rows, positions, _, first in spans:
        visible = geometry.num_visible(positions)
        columns = torch.arange(int(visible[-1]), device=q.device)
        mask = columns < visible[:, None]
        yield Tile(rows, slice(first, first + len(columns)), mask[None])


def _window_tiles(q, cu_seqlens, window: int) -> Iterator[Tile]:
    """Each query sees the last `window` tokens of its document, itself included."""

    def max_keys(length):
        return min(length, window + MAX_TILE_QUERIES)

    for rows, positions, first, _ in _spans(q, cu_seqlens, None, max_keys, MAX_TILE_QUERIES):
        low, high = max(int(positions[0]) - window + 1, 0), int(positions[-1]) + 1
        columns = torch.arange(low, high, device=q.device)
        distance = positions[:, None] - columns
        yield Tile(rows, slice(first + low, first + high), ((distance >= 0) & (distance < window))[None])


def _selected_tiles(q, indices, cu_seqlens, geometry: Geometry) -> Iterator[Tile]:
    """Each query sees the visible tokens of its blocks; a tile holds the union of its queries'."""
    size, num_kv_heads = geometry.select_block, indices.shape[0]
    short = SELECTED_TILE_QUERIES * geometry.num_selected * size

    def max_keys(length):
        return min(length, short)

    # In a short document the union is nearly everything anyway: larger tiles are then faster.
    longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    max_queries = MAX_TILE_QUERIES if longest <= 4096 else SELECTED_TILE_QUERIES
    for rows, positions, first, _ in _spans(q, cu_seqlens, None, max_keys, max_queries):
        chosen = indices[:, rows].long()  # [Hkv, R, n]
        num_blocks = int(positions[-1]) // size + 1
        member = torch.zeros(*chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=q.device)
        member.scatter_(2, torch.where(chosen < 0, num_blocks, chosen), True)
        member = member[..., :num_blocks]
        used = member.any(1)  # [Hkv, blocks]
        width = int(used.sum(1).max())
        # The used blocks first, in ascending order; heads with fewer are padded with unused ones,
        # which their mask excludes.
        union = used.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        member = member.gather(2, union[:, None].expand(-1, chosen.shape[1], -1))
        tokens = union[..., None] * size + torch.arange(size, device=q.device)
        tokens = tokens.reshape(num_kv_heads, -1)
        causal = tokens[:, None] <= positions[:, None]
        mask = member.repeat_interleave(size, 2) & causal
        # The document's last block may reach past its end: those columns are masked already.
        yield Tile(rows, first + tokens.clamp(max=int(positions[-1])), mask)


def _heads_first(x: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
    """Rows `keys` of x [T, Hkv, D] as [Hkv, K, D] in the arithmetic type."""
    if isinstance(keys, slice):
        x = x[keys].transpose(0, 1)
    else:
        x = x[keys, torch.arange(x.shape[1], device=x.device)[:, None]]
    return _arithmetic(x)


def _arithmetic(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _group(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[R, H, D] -> [Hkv, R*G, D]: the rows that share one KV head."""
    rows, heads, dim = x.shape
    x = x.view(rows, num_kv_heads, heads // num_kv_heads, dim).transpose(0, 1)
    return _arithmetic(x.reshape(num_kv_heads, -1, dim))


def _ungroup(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[Hkv, R*G, D] -> [R, H, D]."""
    num_kv_heads, _, dim = x.shape
    return x.view(num_kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, -1, dim)


def _logits(q, k, tile: Tile, scale: float) -> torch.Tensor:
    """Masked logits [Hkv, R*G, K] of grouped queries q against k [Hkv, K, Dk]."""
    scores = torch.matmul(q, k.transpose(1, 2)).mul_(scale)
    group = q.shape[1] // tile.mask.shape[1]
    hidden = ~tile.mask.repeat_interleave(group, 1) if group > 1 else ~tile.mask
    return scores.masked_fill_(hidden, float("-inf"))


def _softmax(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse) in place; a row that sees nothing (lse = -inf) is zero, not NaN."""
    return scores.sub_(lse.masked_fill(lse.isneginf(), 0.0)).exp_()


def attention_forward(q, k, v, tiles: Iterator[Tile], scale: float):
    """Softmax attention over tiles: o [T, H, Dv] in q's dtype, lse [T, H] (natural log)."""
    num_kv_heads = k.shape[1]
    o = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = _arithmetic(q.new_empty(0)).new_full(q.shape[:2], float("-inf"))
    for tile in tiles:
        rows = tile.mask.shape[1]
        if tile.mask.shape[2] == 0:
            continue
        qt = _group(q[tile.rows], num_kv_heads)
        scores = _logits(qt, _heads_first(k, tile.keys), tile, scale)
        tile_lse = scores.logsumexp(2, keepdim=True)
        out = torch.matmul(_softmax(scores, tile_lse), _heads_first(v, tile.keys))
        o[tile.rows] = _ungroup(out, rows).to(o.dtype)
        lse[tile.rows] = _ungroup(tile_lse, rows)[..., 0]
    return o, lse


def attention_backward(do, q, k, v, o, lse, tiles: Iterator[Tile], scale: float):
    """Gradients dq, dk, dv of attention_forward for the same tiles.

    With P = exp(S - lse):  dV = P^T dO,  dS = P * (dO V^T - sum(dO * O)),  dQ = dS K, dK = dS^T Q.
    """
    num_kv_heads = k.shape[1]
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(_arithmetic(k)), torch.zeros_like(_arithmetic(v))
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]
    for tile in tiles:
        rows = tile.mask.shape[1]
        if tile.mask.shape[2] == 0:
            continue
        qt, dot = _group(q[tile.rows], num_kv_heads), _group(do[tile.rows], num_kv_heads)
        ot, lset = _group(o[tile.rows], num_kv_heads), _group(lse[tile.rows, :, None], num_kv_heads)
        kt, vt = _heads_first(k, tile.keys), _heads_first(v, tile.keys)
        p = _softmax(_logits(qt, kt, tile, scale), lset)
        ds = torch.matmul(dot, vt.transpose(1, 2)).sub_((dot * ot).sum(2, keepdim=True))
        ds.mul_(p).mul_(scale)
        dq[tile.rows] = _ungroup(torch.matmul(ds, kt), rows).to(dq.dtype)
        for grad, left, right in ((dk, ds, qt), (dv, p, dot)):
            update = torch.matmul(left.transpose(1, 2), right)  # [Hkv, K, D]
            if isinstance(tile.keys, slice):
                grad[tile.keys] += update.transpose(0, 1)
            else:
                grad.index_put_((tile.keys, heads), update, accumulate=True)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def compressed_forward(q, k_cmp, v_cmp, cu_seqlens, max_seqlen, geometry: Geometry, scale: float):
    """Attention to the compressed blocks k_cmp [C, Hkv, Dk], v_cmp [C, Hkv, Dv] (Eq. 7).

    Returns o [T, H, Dv] and lse [T, H]; a query before the first complete block gets o = 0 and
    lse = -inf.
    """
    return attention_forward(q, k_cmp, v_cmp, _compressed_tiles(q, cu_seqlens, geometry), scale)


def compressed_backward(
    do, q, k_cmp, v_cmp, o, lse, cu_seqlens, max_seqlen, geometry: Geometry, scale: float
):
    """Gradients dq, dk_cmp, dv_cmp of compressed_forward; rows no document uses are zero."""
    tiles = _compressed_tiles(q, cu_seqlens, geometry)
    return attention_backward(do, q, k_cmp, v_cmp, o, lse, tiles, scale)


def select_blocks(q, k_cmp, lse, cu_seqlens, max_seqlen, geometry: Geometry, scale: float):
    """The n most important blocks of each token and KV head (Eq. 8 to 12).

    lse [T, H] is the compressed branch's. Returns int32 [Hkv, T, n]: document-relative block
    numbers in ascending order, -1 after the last. The initial and local blocks are always in;
    equal importance goes to the lower block number.
    """
    num_kv_heads, n, size = k_cmp.shape[1], geometry.num_selected, geometry.select_block
    indices = torch.full((num_kv_heads, q.shape[0], n), -1, dtype=torch.int32, device=q.device)
    first, weights = geometry.overlap_weights()
    ratio = size // geometry.compress_stride
    spans = _spans(q, cu_seqlens, geometry, geometry.num_compressed, MAX_TILE_QUERIES)
    for tile, (rows, positions, _, _) in zip(
        _compressed_tiles(q, cu_seqlens, geometry), spans, strict=True
    ):
        own = positions // size
        num_blocks = int(own[-1]) + 1
        block = torch.arange(num_blocks, device=q.device)
        importance = lse.new_zeros(num_kv_heads, len(positions), num_blocks)
        if tile.mask.shape[2]:
            qt = _group(q[rows], num_kv_heads)
            lset = _group(lse[rows, :, None], num_kv_heads)
            p = _softmax(_logits(qt, _heads_first(k_cmp, tile.keys), tile, scale), lset)
            p = p.view(num_kv_heads, len(positions), -1, p.shape[2]).sum(2)
            # Align column 0 with the first overlapping compressed block of selection block 0.
            width = (num_blocks - 1) * ratio + len(weights)
            p = F.pad(p, (-first, width + first - p.shape[2]))
            for m, weight in enumerate(weights):
                importance += weight * p[..., m : m + (num_blocks - 1) * ratio + 1 : ratio]
        forced = (block < geometry.num_initial) | (block > own[:, None] - geometry.num_local)
        importance = importance.masked_fill(forced, float("inf"))
        importance = importance.masked_fill(block > own[:, None], -1.0)
        keep = min(n, num_blocks)
        # A stable sort breaks ties by the lower block number, which topk does not promise.
        best = importance.sort(dim=2, descending=True, stable=True).indices[..., :keep]
        best = torch.where(best <= own[:, None], best, num_blocks).sort(dim=2).values
        indices[:, rows, :keep] = torch.where(best < num_blocks, best, -1).int()
    return indices


def selected_forward(q, k, v, indices, cu_seqlens, max_seqlen, geometry: Geometry, scale: float):
    """Attention to the visible tokens of the selected blocks, indices int32 [Hkv, T, n].

    Returns o [T, H, Dv] and lse [T, H].
    """
    return attention_forward(q, k, v, _selected_tiles(q, indices, cu_seqlens, geometry), scale)


def selected_backward(
    do, q, k, v, o, lse, indices, cu_seqlens, max_seqlen, geometry: Geometry, scale: float
):
    """Gradients dq, dk, dv of selected_forward; none flows through the indices."""
    tiles = _selected_tiles(q, indices, cu_seqlens, geometry)
    return attention_backward(do, q, k, v, o, lse, tiles, scale)


def window_forward(q, k, v, cu_seqlens, max_seqlen, window: int, scale: float):
    """Causal attention to the last `window` tokens of the document, the own one included.

    A window of at least max_seqlen is full causal attention. Returns o [T, H, Dv], lse [T, H].
    """
    return attention_forward(q, k, v, _window_tiles(q, cu_seqlens, window), scale)


def window_backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, window: int, scale: float):
    """Gradients dq, dk, dv of window_forward."""
    return attention_backward(do, q, k, v, o, lse, _window_tiles(q, cu_seqlens, window), scale)
