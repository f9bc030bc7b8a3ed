"""Compressed and window attention and block selection against their definitions.

The oracle here is a dense mask in float64 over one document at a time. On a CPU the kernels run in
Triton's interpreter, in fp32 and fp16; on a GPU in fp16, and over a wide grid in bf16.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nsa import compressed, flash, reference, selection, window
from kernels.nsa.flash import Tile, Tiles
from kernels.nsa.gates import row_delta
from kernels.nsa.geometry import Geometry
from kernels.nsa.tiles import compressed_offsets, max_tiles, tile_map
from tests.kernels import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FORWARD_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def attention(q, k, v, cu_seqlens, cu_keys, mask, scale):
    """o [T, H, Dv] and lse [T, H] in float64; mask(t, n) is true where position t sees key n."""
    group = q.shape[1] // k.shape[1]
    outputs, norms = [], []
    for i in range(len(cu_seqlens) - 1):
        rows = slice(cu_seqlens[i], cu_seqlens[i + 1])
        keys = slice(cu_keys[i], cu_keys[i + 1])
        kd, vd = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        t = torch.arange(rows.stop - rows.start, device=q.device)[:, None]
        seen = mask(t, torch.arange(keys.stop - keys.start, device=q.device))
        s = torch.einsum("thd,nhd->htn", q[rows], kd) * scale
        s = s.masked_fill(~seen, float("-inf"))
        norm = s.logsumexp(2) if kd.shape[0] else s.new_full(s.shape[:2], float("-inf"))
        p = (s - norm.masked_fill(norm.isinf(), 0.0)[..., None]).exp()
        outputs.append(torch.einsum("htn,nhd->thd", p, vd))
        norms.append(norm.T)
    return torch.cat(outputs), torch.cat(norms)


def check(forward, backward, q, k, v, args, oracle_args):
    """Forward, logarithm of the sum, and all gradients of one branch against the oracle."""
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want, norm = attention(*exact, *oracle_args)
    o, lse = forward(q, k, v, *args)
    assert o.dtype == q.dtype and lse.dtype == torch.float32
    blind = norm.isneginf()
    assert torch.equal(lse.isneginf(), blind)
    assert not o.isnan().any() and not o[blind].any()
    assert relative_error(o, want.detach()) < FORWARD_TOLERANCE[q.dtype]
    torch.testing.assert_close(lse[~blind].double(), norm[~blind].detach(), rtol=1e-4, atol=1e-4)

    do = torch.randn_like(o)
    grads = backward(do, q, k, v, lse, row_delta(do, o), *args)
    expected = torch.autograd.grad(want, exact, do.double())
    for x, got, grad in zip((q, k, v), grads, expected, strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        # What rounding of O and dO leaves where the true gradient vanishes, as it does for dQ and
        # dK of a query with a single key.
        error = (got.double() - grad).norm() / grad.norm().clamp(min=0.1 * grad.numel() ** 0.5)
        assert error.item() < TOLERANCE[q.dtype]


def inputs(lengths, rows, kv_heads, group, dims, dtype, seed):
    torch.manual_seed(seed)
    shapes = (sum(lengths), kv_heads * group), (rows, kv_heads), (rows, kv_heads)
    q, k, v = (
        torch.randn(*shape, dim, device=DEVICE).to(dtype)
        for shape, dim in zip(shapes, (dims[0], *dims), strict=True)
    )
    return q, k, v, torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def check_window(lengths, kv_heads, group, dims, dtype, size, seed):
    q, k, v, cu = inputs(lengths, sum(lengths), kv_heads, group, dims, dtype, seed)
    scale = dims[0] ** -0.5
    offsets = cu.tolist()

    def mask(t, n):
        return (n <= t) & (n > t - size)

    args = cu, max(lengths), size, scale
    run = window.window_forward, window.window_backward
    check(*run, q, k, v, args, (offsets, offsets, mask, scale))


def check_compressed(lengths, kv_heads, group, dims, dtype, geometry, seed):
    rows = geometry.capacity(sum(lengths))
    q, k, v, cu = inputs(lengths, rows, kv_heads, group, dims, dtype, seed)
    scale = dims[0] ** -0.5
    counts = [sum(i * geometry.compress_stride + geometry.compress_block <= length
                  for i in range(length)) for length in lengths]  # fmt: skip
    offsets = torch.tensor([0, *counts]).cumsum(0).tolist()

    def mask(t, n):
        return n * geometry.compress_stride + geometry.compress_block - 1 <= t

    args = cu, max(lengths), geometry, scale
    run = compressed.compressed_forward, compressed.compressed_backward
    check(*run, q, k, v, args, (cu.tolist(), offsets, mask, scale))


@st.composite
def cases(draw, most=70):
    """Documents, heads, head dimensions and type, small enough for the interpreter."""
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=4))
    if not sum(lengths):
        lengths.append(1)
    dtype = EXACT if draw(st.booleans()) else torch.float16
    dims = draw(st.sampled_from([(16, 16), (16, 32), (24, 16), (32, 24)]))
    group = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    return lengths, draw(st.integers(1, 2)), group, dims, dtype


geometries = st.builds(
    lambda d, l, s, n, i, k: Geometry(d * l, d, d * s, n, 8, i, k),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(5, 9),
    st.integers(0, 2),
    st.integers(1, 3),
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that few tokens take every path: masked and full steps, several chunks."""
    masked, peeled = (Tiles(*3 * [Tile(32, 16, 4, 1, peel)]) for peel in (False, True))
    monkeypatch.setattr(flash, "_tiles", lambda q, k, v, keys: masked if keys.window else peeled)
    monkeypatch.setattr(flash, "MIN_CHUNK", 8)
    monkeypatch.setattr(selection, "_tile", lambda *_: (32, 16, 4, 1))
    monkeypatch.setattr(selection, "FIRST_CHUNK", 32)


once = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize("rows_per_tile", [1, 4, 16])
@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 16, 17, 0], [1] * 300, [64, 0, 700]])
def test_tiles_cover_every_document_and_never_cross_one(lengths, rows_per_tile):
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    room = sum(lengths) + 7
    want = [[i, s] for i, n in enumerate(lengths) for s in range(0, n, rows_per_tile)]
    spare = max_tiles(room, len(lengths), rows_per_tile) - len(want)
    assert tile_map(cu, room, rows_per_tile).tolist() == want + [[-1, 0]] * spare


def test_work_lists_live_as_long_as_their_documents_stay_the_same():
    cu = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    first = tile_map(cu, 9, 4)
    assert tile_map(cu, 9, 4) is first and tile_map(cu, 9, 2) is not first
    assert tile_map(cu.clone(), 9, 4) is not first
    cu[1] = 2
    assert tile_map(cu, 9, 4)[:3].tolist() == [[0, 0], [1, 0], [1, 4]]


@pytest.mark.parametrize("lengths", [[5], [0, 31, 32, 0, 47, 48, 500], [40] * 300])
def test_offsets_equal_the_geometry(lengths):
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    want = Geometry().compressed_offsets(cu)
    assert torch.equal(compressed_offsets(cu, Geometry()), want)


@once
@given(cases(), st.integers(1, 80), st.integers(0, 99))
def test_window_equals_its_definition(case, size, seed):
    check_window(*case, size, seed)


@once
@given(cases(), geometries, st.integers(0, 99))
def test_compressed_equals_its_definition(case, geometry, seed):
    check_compressed(*case, geometry, seed)


@pytest.mark.parametrize("seed", range(6))
def test_every_path_of_the_loops(small_tiles, seed):
    lengths = [[150], [0, 37, 1, 64], [97, 16, 0, 15]][seed % 3]
    heads = [(2, 2), (1, 3), (1, 8), (2, 1), (1, 4), (1, 6)][seed]
    check_window(lengths, *heads, (16, 16), EXACT, [17, 5, 64, 33, 1, 200][seed], seed)
    check_window(lengths, *heads, (16, 16), EXACT, 1000, seed)
    geometry = Geometry(*[(4, 2), (8, 4), (2, 1), (1, 1), (6, 3), (32, 16)][seed], 48, window=8)
    check_compressed(lengths, *heads, (16, 16), EXACT, geometry, seed)


def check_selection(lengths, kv_heads, group, dims, dtype, geometry, seed):
    rows = geometry.capacity(sum(lengths))
    q, k, v, cu = inputs(lengths, rows, kv_heads, group, dims, dtype, seed)
    geo, args = geometry, (cu, max(lengths), geometry, 0.5)
    _, lse = reference.compressed_forward(q, k, v, *args)
    got = selection.select_blocks(q, k, lse, *args).tolist()
    offsets = geometry.compressed_offsets(cu).tolist()
    token = 0
    for document, length in enumerate(lengths):
        part = slice(offsets[document], offsets[document + 1])
        chosen = oracle.selected_sets(
            q[token : token + length].double(), k[part].double(), length,
            geo.compress_block, geo.compress_stride, geo.select_block, geo.num_selected,
            geo.num_initial, geo.num_local, 0.5, kv_heads,
        )  # fmt: skip
        for row in chosen:
            for h, blocks in enumerate(row):
                padding = [-1] * (geometry.num_selected - len(blocks))
                assert got[h][token] == sorted(blocks) + padding
            token += 1


@once
@given(cases(most=30), geometries, st.integers(0, 99))
def test_selection_equals_its_definition(case, geometry, seed):
    check_selection(*case, geometry, seed)


@pytest.mark.parametrize("seed", range(4))
def test_selection_over_many_steps_and_chunks(small_tiles, seed):
    geometry = [(8, 4, 16, 5), (6, 2, 6, 4), (12, 2, 4, 5), (20, 1, 1, 9)][seed]
    geometry = Geometry(*geometry)  # the last two: one block reaches over several that follow
    check_selection([[90], [40, 0, 55], [70], [60]][seed], 1, 2, (16, 16), EXACT, geometry, seed)


def test_equal_importance_goes_to_the_lower_block():
    geometry = Geometry(4, 4, 4, 4, num_initial=1, num_local=1)
    q = torch.zeros(40, 1, 16, device=DEVICE, dtype=EXACT)
    k = torch.zeros(10, 1, 16, device=DEVICE, dtype=EXACT)
    args = torch.tensor([0, 40], device=DEVICE, dtype=torch.int32), 40, geometry, 1.0
    _, lse = compressed.compressed_forward(q, k, k, *args)
    assert selection.select_blocks(q, k, lse, *args)[0, 39].tolist() == [0, 1, 2, 9]


RAGGED = [900, 0, 31, 1, 1000, 64, 0, 300]
SHAPES = [
    (2, 1, (64, 64)), (1, 2, (64, 64)), (1, 3, (96, 96)), (2, 4, (64, 64)), (2, 4, (128, 128)),
    (1, 6, (64, 64)), (1, 8, (128, 128)), (1, 12, (128, 128)), (1, 16, (128, 128)),
    (2, 16, (192, 128)), (1, 32, (128, 128)), (4, 1, (128, 128)), (1, 4, (192, 128)),
    (2, 3, (128, 128)),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads, group", [(2, 4), (1, 3)])
def test_fp16_at_dimension_128(kv_heads, group):
    check_window(RAGGED, kv_heads, group, (128, 128), torch.float16, 512, 0)
    check_compressed(RAGGED, kv_heads, group, (128, 128), torch.float16, Geometry(), 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads, group, dims", SHAPES)
def test_bf16_on_ragged_documents(kv_heads, group, dims):
    for size in (1, 200, 512, 5000):
        check_window(RAGGED, kv_heads, group, dims, torch.bfloat16, size, size)
    for geometry in (Geometry(), Geometry(16, 8, 32, 8), Geometry(64, 16, 48)):
        check_compressed(RAGGED, kv_heads, group, dims, torch.bfloat16, geometry, 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads, group, dims", SHAPES)
def test_bf16_selection_agrees_with_the_twin(kv_heads, group, dims):
    for geometry in (Geometry(), Geometry(16, 8, 32, 8), Geometry(64, 16, 48)):
        rows = geometry.capacity(sum(RAGGED))
        q, k, v, cu = inputs(RAGGED, rows, kv_heads, group, dims, torch.bfloat16, 0)
        args = cu, max(RAGGED), geometry, dims[0] ** -0.5
        _, lse = compressed.compressed_forward(q, k, v, *args)
        got = selection.select_blocks(q, k, lse, *args)
        exact = [x.double() for x in (q, k, v)]
        _, lse = reference.compressed_forward(*exact, *args)
        want = reference.select_blocks(*exact[:2], lse, *args)
        # A row differs where two importances are equal to fp32 rounding.
        assert (got != want).any(-1).float().mean().item() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_two_runs_are_bitwise_equal():
    geometry, lengths = Geometry(), [9000, 0, 700]
    rows = geometry.capacity(sum(lengths))
    q, kc, vc, cu = inputs(lengths, rows, 2, 4, (128, 128), torch.bfloat16, 0)
    _, k, v, _ = inputs(lengths, sum(lengths), 2, 4, (128, 128), torch.bfloat16, 1)
    do, scale = torch.randn_like(q), 0.1

    def run():
        docs = cu, max(lengths)
        cmp = compressed.compressed_forward(q, kc, vc, *docs, geometry, scale)
        win = window.window_forward(q, k, v, *docs, 512, scale)
        return (
            *cmp,
            *win,
            selection.select_blocks(q, kc, cmp[1], *docs, geometry, scale),
            *compressed.compressed_backward(
                do, q, kc, vc, cmp[1], row_delta(do, cmp[0]), *docs, geometry, scale
            ),
            *window.window_backward(do, q, k, v, win[1], row_delta(do, win[0]), *docs, 512, scale),
        )

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
