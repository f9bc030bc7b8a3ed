"""Selected attention: unions, reverse lists, and both ways through the kernels, against oracles.

On a CPU the kernels run in Triton's interpreter, in fp32 and fp16; on a GPU also in bf16 over a
wide grid. The oracle is a dense mask in float64, built one query at a time.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nsa import csr, reference, selected, selected_backward
from kernels.nsa.csr import block_lists
from kernels.nsa.gates import row_delta
from kernels.nsa.geometry import Geometry
from kernels.nsa.union import block_unions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (5e-3, 1e-2)}
RAGGED = [700, 0, 1, 64, 333, 0, 65, 20]


@pytest.fixture(autouse=True)
def small_sorts(monkeypatch):
    """The interpreter sorts slowly."""
    if DEVICE == "cpu":
        monkeypatch.setattr(csr, "_SORT", 32)


def make_indices(lengths, kv_heads, n, block, seed):
    """Random sets per (KV head, token) with the own block, ascending, -1 at the end."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(kv_heads):
        for length in lengths:
            for t in range(length):
                own = t // block
                count = int(torch.randint(0, n, (1,), generator=generator)) if seed % 2 else n - 1
                others = torch.randperm(own, generator=generator)[:count].tolist()
                row = sorted([*others, own])
                rows.append(row + [-1] * (n - len(row)))
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).view(kv_heads, sum(lengths), n)


def make_inputs(lengths, kv_heads, group, dims, n, block, dtype, seed):
    torch.manual_seed(seed)
    tokens, (dk, dv) = sum(lengths), dims
    shapes = [(tokens, kv_heads * group, dk), (tokens, kv_heads, dk), (tokens, kv_heads, dv)]
    q, k, v = (torch.randn(s, device=DEVICE).to(dtype) for s in shapes)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    indices = make_indices(lengths, kv_heads, n, block, seed)
    stride = next(d for d in (16, 4, 2, 1) if block % d == 0)
    return q, k, v, indices, cu_seqlens, max(lengths), Geometry(stride, stride, block, n, 8)


def oracle(q, k, v, indices, cu_seqlens, block, scale):
    """o and lse in float64 from one dense mask over all tokens."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    begin = torch.zeros(tokens, dtype=torch.long)
    for low, high in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        begin[low:high] = low
    mask = torch.zeros(k.shape[1], tokens, tokens, dtype=torch.bool)
    for h in range(k.shape[1]):
        for t in range(tokens):
            for b in indices[h, t].tolist():
                if b >= 0:
                    first = int(begin[t]) + b * block
                    mask[h, t, first : min(first + block, t + 1)] = True
    mask = mask.to(q.device).repeat_interleave(group, 0)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("thd,shd->hts", q, k) * scale
    s = s.masked_fill(~mask, float("-inf"))
    lse = s.logsumexp(2)
    return torch.einsum("hts,shd->thd", (s - lse[..., None]).exp(), v), lse.T


def relative_error(got, want):
    # A lone token has no gradient but rounding: measure against 0.1 per element at least.
    return ((got.double() - want).norm() / want.norm().clamp(min=0.1 * want.numel() ** 0.5)).item()


def check(inputs, definition=True):
    q, k, v, indices, cu_seqlens, longest, geometry = inputs
    scale = q.shape[2] ** -0.5
    args = (indices, cu_seqlens, longest, geometry, scale)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o, lse = selected.selected_forward(q, k, v, *args)
    do = torch.randn_like(o)
    grads = selected_backward.selected_backward(do, q, k, v, lse, row_delta(do, o), *args)
    if definition:
        want, want_lse = oracle(*exact, indices, cu_seqlens, geometry.select_block, scale)
        want_grads = torch.autograd.grad(want, exact, do.double())
    else:
        exact = [x.detach() for x in exact]
        want, want_lse = reference.selected_forward(*exact, *args)
        delta = reference.row_delta(do.double(), want)
        want_grads = reference.selected_backward(do.double(), *exact, want_lse, delta, *args)
    forward_tolerance, tolerance = TOLERANCE[q.dtype]
    assert o.dtype == q.dtype and lse.dtype == torch.float32
    assert relative_error(o, want.detach()) < forward_tolerance
    torch.testing.assert_close(lse.double(), want_lse.detach(), rtol=1e-4, atol=1e-4)
    for got, x, want in zip(grads, (q, k, v), want_grads, strict=True):
        assert got.dtype == x.dtype and relative_error(got, want) < tolerance
    return o, lse, *grads


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    if not sum(lengths):
        lengths.append(1)
    kv_heads, group = draw(st.sampled_from([(1, 4), (2, 8), (1, 6), (1, 12), (1, 16)]))
    dims = draw(st.sampled_from([(16, 16), (24, 16), (32, 8)]))
    block = draw(st.sampled_from([4, 8, 12, 16]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return lengths, kv_heads, group, dims, draw(st.integers(1, 4)), block, dtype


@settings(max_examples=6, deadline=None)
@given(cases(), st.integers(0, 1000), st.booleans())
def test_equals_the_definition(case, seed, key_major):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "KEY_MAJOR_UNION", 0.0 if key_major else 1e9)
        lengths, kv_heads, group, dims, n, block, dtype = case
        n = max(n, 3)
        check(make_inputs(lengths, kv_heads, group, dims, n, block, dtype, seed))


def test_heads_take_turns_and_lists_split(monkeypatch):
    monkeypatch.setattr(selected, "WORKSPACE", 61 * 3 * 4 * 16 * 4)  # one of the two KV heads
    monkeypatch.setattr(selected, "KEY_MAJOR_UNION", 0.0)
    monkeypatch.setattr(selected.Shape, "item_pairs", lambda self: 16)
    inputs = make_inputs([40, 21], 2, 4, (16, 16), 3, 8, torch.float32, 0)
    check(inputs)
    monkeypatch.setattr(selected, "WORKSPACE", 0)  # less than one head needs: one at a time
    shape = selected.Shape(*inputs[:3], inputs[-1])
    assert shape.may_be_key_major(16)
    check(inputs)
    monkeypatch.setattr(selected, "LARGEST_WORKSPACE", 0)
    assert not shape.may_be_key_major(16)
    check(inputs)


def test_only_the_chosen_heads_get_their_query_gradient_from_the_key_major_kernel():
    q, k, v, indices, cu, longest, geometry = make_inputs(
        [30, 9], 2, 4, (16, 16), 3, 8, torch.float32, 0
    )
    args = indices, cu, longest, geometry, 0.25
    o, lse = selected.selected_forward(q, k, v, *args)
    do = torch.randn_like(o)
    delta = row_delta(do, o)
    want = selected_backward.selected_backward(do, q, k, v, lse, delta, *args)
    shape = selected.Shape(q, k, v, geometry)
    lists = block_lists(indices, cu, geometry.select_block, shape.item_pairs())
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    selected_backward._key_gradients(
        do, q, k, v, lse, delta, dq, dk, dv, lists, indices, cu, shape, 0.25,
        torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    assert (dq[:, :4] == 7.0).all() and torch.equal(dq[:, 4:], want[0][:, 4:])
    torch.testing.assert_close(dk, want[1])
    torch.testing.assert_close(dv, want[2])


def test_a_blocks_own_queries_may_fill_several_items(monkeypatch):
    monkeypatch.setattr(selected.Shape, "item_pairs", lambda self: self.queries)
    check(make_inputs([40], 1, 16, (16, 16), 3, 16, torch.float32, 0))


def test_a_query_without_blocks_is_zero():
    q, k, v, indices, *rest = make_inputs([30], 1, 4, (16, 16), 3, 8, torch.float32, 0)
    indices[:, 11] = -1
    args = (indices, *rest, 0.25)
    o, lse = selected.selected_forward(q, k, v, *args)
    assert not o[11].any() and lse[11].isneginf().all() and lse[:11].isfinite().all()
    do = torch.randn_like(o)
    delta = row_delta(do, o)
    dq, dk, dv = selected_backward.selected_backward(do, q, k, v, lse, delta, *args)
    assert not dq[11].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_blocks_of_the_future_are_ignored():
    inputs = make_inputs([30, 9], 1, 4, (16, 16), 3, 8, torch.float32, 0)
    wrong = inputs[3].clone()
    wrong[wrong < 0] = 3
    expected = selected.selected_forward(*inputs, 0.25)
    got = selected.selected_forward(*inputs[:3], wrong, *inputs[4:], 0.25)
    late = torch.arange(39, device=DEVICE) < 24  # where block 3 lies ahead
    late[30:] = True
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x[late], y[late])


def test_no_tokens():
    inputs = make_inputs([0, 0], 1, 4, (16, 16), 3, 8, torch.float32, 0)
    o, lse = selected.selected_forward(*inputs, 0.25)
    grads = selected_backward.selected_backward(o, *inputs[:3], lse, lse, *inputs[3:], 0.25)
    assert [len(x) for x in (o, lse, *grads)] == [0] * 5


@settings(max_examples=10, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_unions_and_lists_hold_exactly_the_chosen_pairs(case, seed):
    lengths, kv_heads, group, _, n, block, _ = case
    n = max(n, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csr, "_PARTS", 2)
        indices = make_indices(lengths, kv_heads, n, block, seed)
        cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        union = block_unions(indices, cu_seqlens, block, max(64 // group, 1))
        lists = block_lists(indices, cu_seqlens, block, 5)
    starts = cu_seqlens.tolist()
    want = {
        (h, starts[d] + t, starts[d] + b * block)
        for h in range(kv_heads)
        for d, length in enumerate(lengths)
        for t in range(length)
        for b in indices[h, starts[d] + t].tolist()
        if b >= 0
    }
    seen = set()
    for h in range(kv_heads):
        for tile, (document, first) in enumerate(union.tiles.tolist()):
            for i in range(int(union.counts[h, tile])):
                bits = int(union.members[h, tile, i]) & (2**64 - 1)
                for query in range(union.queries):
                    if bits >> query & 1:
                        token = starts[document] + first + query
                        seen.add((h, token, int(union.key_rows[h, tile, i])))
    assert seen == want

    seen, sizes = [], []
    for h in range(kv_heads):
        for b, (document, first) in enumerate(lists.blocks.tolist()):
            low, high = lists.starts[h, b : b + 2].tolist()
            pairs = lists.pairs[h, low:high].tolist()
            assert pairs == sorted(pairs)
            seen += [(h, p // n, starts[document] + first) for p in pairs]
            sizes.append(len(pairs))
    assert len(seen) == len(want) and set(seen) == want
    assert lists.item_ends.diff(prepend=lists.item_ends.new_zeros(1)).tolist() == [
        max(-(-s // 5), 1) for s in sizes
    ]
    assert int(lists.split_ends[-1]) <= lists.split_items
    used = lists.item_lists[: int(lists.item_ends[-1])].tolist()
    assert used == sorted(used) and set(used) == set(range(len(sizes)))


GRID = [  # heads, KV heads, Dk, Dv, block, n
    (64, 4, 128, 128, 64, 16), (16, 4, 64, 64, 64, 16), (16, 1, 128, 128, 64, 8),
    (16, 4, 128, 128, 64, 8), (32, 2, 192, 128, 64, 8), (8, 2, 192, 128, 64, 8),
    (16, 2, 96, 96, 32, 8), (4, 2, 96, 96, 64, 8), (2, 2, 64, 64, 64, 8), (4, 2, 128, 128, 32, 8),
    (6, 2, 64, 64, 64, 4), (12, 2, 64, 64, 64, 8), (8, 1, 128, 128, 64, 8), (12, 1, 64, 64, 64, 8),
    (32, 1, 64, 64, 64, 8), (16, 1, 128, 128, 128, 4), (4, 1, 128, 128, 128, 4),
    (16, 1, 64, 64, 16, 32), (64, 1, 64, 64, 64, 6), (32, 1, 128, 128, 64, 8),
    (64, 1, 128, 128, 64, 6),
]  # fmt: skip


def same_bits_twice(inputs):
    torch.manual_seed(3)
    first = check(inputs, definition=False)
    torch.manual_seed(3)
    assert all(map(torch.equal, first, check(inputs, definition=False)))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [RAGGED, [5, 1], [1500]], ids=str)
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("key_major", [False, True])
def test_wide_grid_in_bf16_and_the_same_bits_twice(shape, lengths, key_major, monkeypatch):
    heads, kv_heads, dk, dv, block, n = shape
    if key_major and heads // kv_heads > selected.KEY_MAJOR_GROUP:
        pytest.skip("large groups are always query-major")
    monkeypatch.setattr(selected, "KEY_MAJOR_UNION", 0.0 if key_major else 1e9)
    group = heads // kv_heads
    inputs = make_inputs(lengths, kv_heads, group, (dk, dv), n, block, torch.bfloat16, 2)
    same_bits_twice(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(64, 4), (16, 4), (16, 2)])
def test_both_ways_at_dimension_128(heads, kv_heads, portable, dtype, monkeypatch):
    if portable:
        monkeypatch.setattr(selected, "on_hopper", lambda *_: False)
    group = heads // kv_heads
    same_bits_twice(make_inputs(RAGGED, kv_heads, group, (128, 128), 16, 64, dtype, 4))


@pytest.mark.gpu
def test_both_ways_agree_where_a_heads_partial_rows_take_the_largest_workspace(monkeypatch):
    """Of 2**31 elements, so that the last one's index just fits into 32 bits."""
    torch.manual_seed(0)
    tokens, group, dim, block, n = 1 << 18, 4, 64, 64, 32
    q, do = (torch.randn(tokens, group, dim, device=DEVICE).bfloat16() for _ in range(2))
    k, v = (torch.randn(tokens, 1, dim, device=DEVICE).bfloat16() for _ in range(2))
    own = torch.arange(tokens, device=DEVICE)[:, None] // block
    drawn = (torch.rand(tokens, n, device=DEVICE) * own).int().sort(1).values
    drawn[:, -1:] = own
    drawn[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = tokens  # drawn twice: to the end
    drawn = drawn.sort(1).values
    indices = torch.where(drawn < tokens, drawn, -1)[None].contiguous()
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    args = indices, cu_seqlens, tokens, Geometry(16, 8, block, n, 512), dim**-0.5
    monkeypatch.setattr(selected, "KEY_MAJOR_UNION", 0.0)
    results = []
    for largest in (selected.LARGEST_WORKSPACE, 0):
        monkeypatch.setattr(selected, "LARGEST_WORKSPACE", largest)
        assert selected.Shape(q, k, v, args[3]).may_be_key_major(dim) == (largest > 0)
        o, lse = selected.selected_forward(q, k, v, *args)
        grads = selected_backward.selected_backward(do, q, k, v, lse, row_delta(do, o), *args)
        results.append((o, *grads))
    for key_major, union in zip(*results, strict=True):
        assert relative_error(key_major, union.double()) < 1e-2
