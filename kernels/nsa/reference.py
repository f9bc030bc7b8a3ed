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
# More queries a tile mean fewer tiles, but more keys that only some of them see: outside the window,
# in the future, or in blocks that only the neighbours selected.
TILE_QUERIES = 128


class Tile(NamedTuple):
    """Queries q[rows] attend to the key rows `keys` where `mask` allows.

    rows: slice over tokens, R of them, the first at `position` in its document. keys: a slice of K
    rows shared by all KV heads, or row numbers int64 [Hkv, K]. mask: bool [Hkv or 1, R, K].
    """

    rows: slice
    position: int
    keys: slice | torch.Tensor
    mask: torch.Tensor


class Document(NamedTuple):
    """Consecutive queries of one document, and the rows where its keys begin."""

    num_queries: int
    first_position: int  # of the first query; more than 0 when earlier tokens are in a cache
    key_row: int
    compressed_row: int


def packed_documents(cu_seqlens: torch.Tensor, geometry: Geometry | None) -> list[Document]:
    """Whole documents, one after another, as in training."""
    documents, key_row, compressed_row = [], 0, 0
    for length in cu_seqlens.diff().tolist():
        documents.append(Document(length, 0, key_row, compressed_row))
        key_row += length
        compressed_row += geometry.num_compressed(length) if geometry else 0
    return documents


def cached_documents(
    cu_seqlens: torch.Tensor, past: list[int], max_length: int, max_compressed: int
) -> list[Document]:
    """New queries of B sequences whose keys lie in caches [B, max_length] and [B, max_compressed].

    cu_seqlens int32 [B + 1] delimits the new queries, past counts the tokens before them.
    """
    return [
        Document(length, start, b * max_length, b * max_compressed)
        for b, (length, start) in enumerate(zip(cu_seqlens.diff().tolist(), past, strict=True))
    ]


def _spans(documents, heads, max_keys) -> Iterator[tuple[slice, int, int, Document]]:
    """Cut documents into runs of queries whose score matrix stays under TILE_SCORES elements.

    max_keys(length) bounds the keys that a query of a document of that length can see. Yields
    (token rows, first position, end position, document).
    """
    row = 0
    for document in documents:
        start, end = document.first_position, document.first_position + document.num_queries
        step = TILE_SCORES // (heads * max(max_keys(end), 1))
        step = max(min(TILE_QUERIES, step), 1)
        for low in range(start, end, step):
            high = min(low + step, end)
            yield slice(row + low - start, row + high - start), low, high, document
        row += document.num_queries


def compressed_tiles(q, documents: list[Document], geometry: Geometry) -> Iterator[Tile]:
    """Each query sees the prefix of compressed blocks that are complete at its position."""
    spans = _spans(documents, q.shape[1], geometry.num_compressed)
    for rows, low, high, document in spans:
        visible = geometry.num_visible(torch.arange(low, high, device=q.device))
        columns = torch.arange(geometry.num_visible(high - 1), device=q.device)
        first = document.compressed_row
        mask = columns < visible[:, None]
        yield Tile(rows, low, slice(first, first + len(columns)), mask[None])


def window_tiles(q, documents: list[Document], window: int) -> Iterator[Tile]:
    """Each query sees the last `window` tokens of its document, itself included."""

    def max_keys(length):
        return min(length, window + TILE_QUERIES)

    for rows, low, high, document in _spans(documents, q.shape[1], max_keys):
        begin, first = max(low - window + 1, 0), document.key_row
        distance = torch.arange(low, high, device=q.device)[:, None]
        distance = distance - torch.arange(begin, high, device=q.device)
        mask = (distance >= 0) & (distance < window)
        yield Tile(rows, low, slice(first + begin, first + high), mask[None])


def selected_tiles(q, indices, documents: list[Document], geometry: Geometry) -> Iterator[Tile]:
    """Each query sees the visible tokens of its blocks; a tile holds the union of its queries'."""
    size, device = geometry.select_block, q.device

    def max_keys(length):
        return min(length, TILE_QUERIES * geometry.num_selected * size)

    for rows, low, high, document in _spans(documents, q.shape[1], max_keys):
        chosen = indices[:, rows].long()  # [Hkv, R, n]
        num_blocks = (high - 1) // size + 1
        member = torch.zeros(*chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=device)
        member.scatter_(2, torch.where(chosen < 0, num_blocks, chosen), True)
        member = member[..., :num_blocks]
        used = member.any(1)  # [Hkv, blocks]
        width = int(used.sum(1).max())
        # The used blocks first, in ascending order; heads with fewer are padded with unused ones,
        # which their mask excludes.
        union = used.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        member = member.gather(2, union[:, None].expand(-1, chosen.shape[1], -1))
        tokens = (union[..., None] * size + torch.arange(size, device=device)).flatten(1)
        causal = tokens[:, None] <= torch.arange(low, high, device=device)[:, None]
        mask = member.repeat_interleave(size, 2) & causal
        # The last block may reach past the tile's last query: those columns are masked already.
        yield Tile(rows, low, document.key_row + tokens.clamp(max=high - 1), mask)


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
    """exp(scores - lse) in place; a row that sees nothing (lse = -inf) becomes zero, not NaN."""
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
        peak = scores.amax(2, keepdim=True)
        p = _softmax(scores, peak)
        total = p.sum(2, keepdim=True)
        out = torch.matmul(p, _heads_first(v, tile.keys)) / total.clamp(min=1)  # empty rows: 0 / 1
        o[tile.rows] = _ungroup(out, rows).to(o.dtype)
        lse[tile.rows] = _ungroup(peak + total.log(), rows)[..., 0]
    return o, lse


def attention_backward(do, q, k, v, lse, delta, tiles: Iterator[Tile], scale: float, dq=None):
    """Gradients dq, dk, dv of attention_forward for the same tiles; a dq given is added to.

    With P = exp(S - lse):  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = dS K,  dK = dS^T Q, where
    delta [T, H] = sum(dO * O).
    """
    num_kv_heads = k.shape[1]
    dq = torch.zeros_like(q) if dq is None else dq
    dk, dv = torch.zeros_like(_arithmetic(k)), torch.zeros_like(_arithmetic(v))
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]
    for tile in tiles:
        rows = tile.mask.shape[1]
        if tile.mask.shape[2] == 0:
            continue
        qt, dot = _group(q[tile.rows], num_kv_heads), _group(do[tile.rows], num_kv_heads)
        lset, deltat = (_group(x[tile.rows, :, None], num_kv_heads) for x in (lse, delta))
        kt, vt = _heads_first(k, tile.keys), _heads_first(v, tile.keys)
        p = _softmax(_logits(qt, kt, tile, scale), lset)
        ds = torch.matmul(dot, vt.transpose(1, 2)).sub_(deltat)
        ds.mul_(p).mul_(scale)
        dq[tile.rows] += _ungroup(torch.matmul(ds, kt), rows).to(dq.dtype)
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
    tiles = compressed_tiles(q, packed_documents(cu_seqlens, geometry), geometry)
    return attention_forward(q, k_cmp, v_cmp, tiles, scale)


def compressed_backward(
    do, q, k_cmp, v_cmp, lse, delta, cu_seqlens, max_seqlen, geometry: Geometry, scale: float,
    dq=None,
):  # fmt: skip
    """Gradients dq, dk_cmp, dv_cmp of compressed_forward; rows no document uses are zero."""
    tiles = compressed_tiles(q, packed_documents(cu_seqlens, geometry), geometry)
    return attention_backward(do, q, k_cmp, v_cmp, lse, delta, tiles, scale, dq)


def select_blocks(q, k_cmp, lse, cu_seqlens, max_seqlen, geometry: Geometry, scale: float):
    """The n most important blocks of each token and KV head (Eq. 8 to 12).

    lse [T, H] is the compressed branch's. Returns int32 [Hkv, T, n]: document-relative block
    numbers in ascending order, -1 after the last. The initial and local blocks are always in;
    equal importance goes to the lower block number.
    """
    documents = packed_documents(cu_seqlens, geometry)
    return choose_blocks(q, k_cmp, lse, documents, geometry, scale)


def choose_blocks(q, k_cmp, lse, documents: list[Document], geometry: Geometry, scale: float):
    """select_blocks for any documents, cached ones included."""
    num_kv_heads, n, size = k_cmp.shape[1], geometry.num_selected, geometry.select_block
    indices = torch.full((num_kv_heads, q.shape[0], n), -1, dtype=torch.int32, device=q.device)
    first, weights = geometry.overlap_weights()
    ratio = size // geometry.compress_stride
    for tile in compressed_tiles(q, documents, geometry):
        rows, num_queries = tile.rows, tile.mask.shape[1]
        own = torch.arange(tile.position, tile.position + num_queries, device=q.device) // size
        num_blocks = (tile.position + num_queries - 1) // size + 1
        importance = lse.new_zeros(num_kv_heads, num_queries, num_blocks)
        if tile.mask.shape[2]:
            qt = _group(q[rows], num_kv_heads)
            lset = _group(lse[rows, :, None], num_kv_heads)
            p = _softmax(_logits(qt, _heads_first(k_cmp, tile.keys), tile, scale), lset)
            p = p.view(num_kv_heads, num_queries, -1, p.shape[2]).sum(2)
            # Align column 0 with the first compressed block that overlaps selection block 0.
            width = (num_blocks - 1) * ratio + len(weights)
            p = F.pad(p, (-first, width + first - p.shape[2]))
            for m, weight in enumerate(weights):
                importance += weight * p[..., m : m + (num_blocks - 1) * ratio + 1 : ratio]
        block = torch.arange(num_blocks, device=q.device)
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
    tiles = selected_tiles(q, indices, packed_documents(cu_seqlens, None), geometry)
    return attention_forward(q, k, v, tiles, scale)


def selected_backward(
    do, q, k, v, lse, delta, indices, cu_seqlens, max_seqlen, geometry: Geometry, scale: float
):
    """Gradients dq, dk, dv of selected_forward; none flows through the indices."""
    tiles = selected_tiles(q, indices, packed_documents(cu_seqlens, None), geometry)
    return attention_backward(do, q, k, v, lse, delta, tiles, scale)


def window_forward(q, k, v, cu_seqlens, max_seqlen, window: int, scale: float):
    """Causal attention to the last `window` tokens of the document, the own one included.

    A window of at least max_seqlen is full causal attention. Returns o [T, H, Dv], lse [T, H].
    """
    tiles = window_tiles(q, packed_documents(cu_seqlens, None), window)
    return attention_forward(q, k, v, tiles, scale)


def window_and_merge(
    q, k, v, gates, o_cmp, o_sel, cu_seqlens, max_seqlen, window: int, scale: float
):
    """The merged output of the three branches, then o and lse of window_forward."""
    o, lse = window_forward(q, k, v, cu_seqlens, max_seqlen, window, scale)
    return merge_branches(gates, o_cmp, o_sel, o), o, lse


def window_backward(
    do, q, k, v, lse, delta, cu_seqlens, max_seqlen, window: int, scale: float, dq=None
):
    """Gradients dq, dk, dv of window_forward."""
    tiles = window_tiles(q, packed_documents(cu_seqlens, None), window)
    return attention_backward(do, q, k, v, lse, delta, tiles, scale, dq)


def merge_branches(gates, o_cmp, o_sel, o_win):
    """sum_c g^c * o^c (Eq. 5): gates [T, H, 3], branch outputs [T, H, Dv]."""
    g = gates.unsqueeze(-1).unbind(2)
    return (g[0] * o_cmp + g[1] * o_sel + g[2] * o_win).to(o_cmp.dtype)


def gate_backward(dout, gates, outs, lses):
    """What the three branches' backwards start from; see kernels/nsa/gates.py.

    dout [T, H, Dv], gates [T, H, 3], not negative, outs and lses the branches' o and lse. Returns
    dgates [T, H, 3], the gated lse [3, T, H] and delta [3, T, H].
    """
    delta = torch.stack([row_delta(dout, o) for o in outs])
    gates_first = _arithmetic(gates).movedim(2, 0)
    lse = torch.stack(lses) - gates_first.log()
    lse = lse.masked_fill(gates_first == 0, float("inf"))
    return delta.movedim(0, 2).to(gates.dtype).contiguous(), lse, delta


def row_delta(do, o):
    """sum(dO * O) over Dv: [T, H]."""
    return (_arithmetic(do) * _arithmetic(o)).sum(-1)


def nsa_cached(
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, past: list[int],
    geometry: Geometry, scale: float,
):  # fmt: skip
    """One step of generation: new tokens of B sequences against their caches, prefill or decode.

    q [T, H, Dk] and gates [T, H, 3] hold the new tokens, delimited by cu_seqlens int32 [B + 1];
    past counts each sequence's tokens before them. Caches are [B, S, Hkv, D] and, compressed,
    [B, S // d, Hkv, D]; the new tokens' keys are in them already. Returns [T, H, Dv].
    """
    geometry.check_selects()
    docs = cached_documents(cu_seqlens, past, k_sel.shape[1], k_cmp.shape[1])
    k_cmp, v_cmp, k_sel, v_sel, k_win, v_win = (
        x.flatten(0, 1) for x in (k_cmp, v_cmp, k_sel, v_sel, k_win, v_win)
    )
    tiles = compressed_tiles(q, docs, geometry)
    o_cmp, lse = attention_forward(q, k_cmp, v_cmp, tiles, scale)
    indices = choose_blocks(q, k_cmp, lse, docs, geometry, scale)
    tiles = selected_tiles(q, indices, docs, geometry)
    o_sel, _ = attention_forward(q, k_sel, v_sel, tiles, scale)
    tiles = window_tiles(q, docs, geometry.window)
    o_win, _ = attention_forward(q, k_win, v_win, tiles, scale)
    return merge_branches(gates, o_cmp, o_sel, o_win)
