"""Native Sparse Attention by definition: dense masks in float64, one document and query at a time.

Slow and obvious on purpose; it shares no code with the implementations it judges.
"""

import torch


def selected_sets(q, k_cmp, length, l, d, size, n, initial, local, scale, kv_heads):
    """The chosen blocks of one document: list over tokens of list over KV heads of sets."""
    heads = q.shape[1]
    group = heads // kv_heads
    chosen = []
    for t in range(length):
        visible = [i for i in range(len(k_cmp)) if i * d + l - 1 <= t]
        own = t // size
        forced = {j for j in range(own + 1) if j < initial or j > own - local}
        row = []
        for h in range(kv_heads):
            importance = [0.0] * (own + 1)
            for g in range(group):
                logits = k_cmp[visible, h] @ q[t, h * group + g] * scale
                p = torch.softmax(logits, 0).tolist()
                for i, mass in zip(visible, p, strict=True):
                    for j in range(own + 1):
                        shared = min(i * d + l, (j + 1) * size) - max(i * d, j * size)
                        importance[j] += max(shared, 0) / d * mass
            order = sorted(range(own + 1), key=lambda j: (j not in forced, -importance[j], j))
            row.append(set(order[:n]))
        chosen.append(row)
    return chosen


def attend(q, k, v, visible, scale):
    """One query [Dk] against the rows of k [K, Dk], v [K, Dv] listed in `visible`."""
    if not visible:
        return v.new_zeros(v.shape[1]) + 0.0 * q.sum()
    p = torch.softmax(k[visible] @ q * scale, 0)
    return p @ v[visible]


def nsa(
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates, cu_seqlens, geometry, scale, chosen=None
):
    """Output [T, H, Dv] and the chosen sets per document; differentiable in every tensor."""
    geo, heads, kv_heads = geometry, q.shape[1], k_sel.shape[1]
    l, d, size = geo.compress_block, geo.compress_stride, geo.select_block
    rows, picks, compressed_row = [], [], 0
    for document, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        length = end - start
        blocks = sum(1 for i in range(length) if i * d + l <= length)
        part = slice(compressed_row, compressed_row + blocks)
        compressed_row += blocks
        kc, vc, ks, vs = k_cmp[part], v_cmp[part], k_sel[start:end], v_sel[start:end]
        kw, vw, qd = k_win[start:end], v_win[start:end], q[start:end]
        if chosen is None:
            sets = selected_sets(
                qd.detach(), kc.detach(), length, l, d, size, geo.num_selected,
                geo.num_initial, geo.num_local, scale, kv_heads,
            )  # fmt: skip
        else:
            sets = chosen[document]
        picks.append(sets)
        for t in range(length):
            for head in range(heads):
                h = head * kv_heads // heads
                seen = [i for i in range(blocks) if i * d + l - 1 <= t]
                tokens = [s for s in range(t + 1) if s // size in sets[t][h]]
                recent = [s for s in range(t + 1) if t - s < geo.window]
                x = qd[t, head]
                branches = torch.stack(
                    [
                        attend(x, kc[:, h], vc[:, h], seen, scale),
                        attend(x, ks[:, h], vs[:, h], tokens, scale),
                        attend(x, kw[:, h], vw[:, h], recent, scale),
                    ]
                )
                rows.append(gates[start + t, head] @ branches)
    out = torch.stack(rows).view(q.shape[0], heads, -1) if rows else q.new_zeros(q.shape)
    return out, picks
