"""One decode step against the twin and the definition, for sequences of different lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kernels.nsa import decode_triton, reference
from kernels.nsa.decode import nsa_decode, window_decode
from kernels.nsa.geometry import Geometry
from tests.kernels import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def kernel(*args):
    """The Triton kernels on any device: in the interpreter on a CPU."""
    *tensors, geometry = args
    return decode_triton.decode_step(*tensors, geometry, tensors[0].shape[2] ** -0.5)


both = pytest.mark.parametrize("decode", [kernel, nsa_decode], ids=["kernel", "operator"])


def make_inputs(lengths, capacity, kv_heads, group, dims, geometry, dtype, seed):
    torch.manual_seed(seed)
    batch, heads, (dk, dv) = len(lengths), kv_heads * group, dims
    shapes = [(batch, heads, dk)]
    for rows in (geometry.capacity(capacity), capacity, capacity):
        shapes += [(batch, rows, kv_heads, dk), (batch, rows, kv_heads, dv)]
    tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
    gates = torch.rand(batch, heads, 3, device=DEVICE).to(dtype)
    return [*tensors, gates], torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def twin(tensors, lengths, geometry):
    exact = [x.double() for x in tensors]
    cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
    past = (lengths - 1).tolist()
    return reference.nsa_cached(*exact, cu_seqlens, past, geometry, exact[0].shape[2] ** -0.5)


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@st.composite
def cases(draw):
    d = draw(st.sampled_from([1, 2, 4]))
    geometry = Geometry(
        compress_block=d * draw(st.integers(1, 3)),
        compress_stride=d,
        select_block=d * draw(st.integers(1, 4)),
        num_selected=draw(st.integers(3, 6)),
        window=draw(st.integers(1, 40)),
        num_initial=draw(st.integers(0, 1)),
        num_local=draw(st.integers(1, 2)),
    )
    capacity = draw(st.integers(1, 90))
    lengths = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (1, 4), (1, 17)]))
    return lengths, capacity, kv_heads, group, draw(st.sampled_from([(16, 16), (24, 8)])), geometry


@settings(max_examples=25, deadline=None)
@given(
    cases(),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([dict(), dict(STEP=16, MAX_CHUNK=8, PAIRS=64)]),
)
def test_equals_the_twin(case, seed, dtype, sizes):
    tensors, lengths = make_inputs(*case, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:  # several parts, chunks and blocks a program
        for name, value in sizes.items():
            patch.setattr(decode_triton, name, value)
        got = kernel(*tensors, lengths, case[-1])
    assert got.dtype == dtype
    assert relative_error(got, twin(tensors, lengths, case[-1])) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 7, 200])
def test_window_and_full_equal_the_twin(window):
    geometry = Geometry(4, 2, 4, 3, 5)
    args = ([1, 70, 150, 0], 150, 2, 3, (24, 16), geometry, torch.float32, 0)
    (q, _, _, k, v, *_), lengths = make_inputs(*args)
    want = torch.zeros(4, 6, 16, dtype=torch.float64, device=DEVICE)
    for b, length in enumerate(lengths.tolist()[:3]):
        seen = slice(max(length - window, 0), length)
        kb, vb = (x[b, seen].double().repeat_interleave(3, 1) for x in (k, v))
        p = (torch.einsum("hd,thd->ht", q[b].double(), kb) * 24**-0.5).softmax(1)
        want[b] = torch.einsum("ht,thd->hd", p, vb)
    for step in (decode_triton.window_step, window_decode):
        got = step(q, k, v, lengths, window, 24**-0.5)
        assert relative_error(got, want) < 1e-5 and not got[3].any()


@both
def test_equals_the_last_token_of_the_definition(decode):
    geometry = Geometry(8, 4, 8, 4, 10)
    tensors, lengths = make_inputs([37], 37, 2, 2, (16, 16), geometry, torch.float32, 0)
    q, *caches, gates = (x.double() for x in tensors)
    queries = torch.zeros(37, 4, 16, dtype=torch.float64, device=DEVICE)
    queries[-1] = q[0]
    gate_rows = gates.expand(37, 4, 3)
    want, _ = oracle.nsa(queries, *(c[0] for c in caches), gate_rows, [0, 37], geometry, 16**-0.5)
    assert relative_error(decode(*tensors, lengths, geometry)[0], want[-1]) < 1e-5


@both
def test_an_empty_sequence_is_zero_beside_others(decode):
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([0, 9], 16, 1, 2, (16, 16), geometry, torch.float32, 0)
    out = decode(*tensors, lengths, geometry)
    assert not out[0].any() and out.isfinite().all() and out[1].any()


@both
def test_equal_importance_goes_to_the_lower_block(decode):
    """Keys of zero make every compressed block equal: the lowest blocks must be taken."""
    geometry = Geometry(4, 4, 4, 5, 4, num_initial=0, num_local=1)
    tensors, lengths = make_inputs([64], 64, 1, 2, (16, 16), geometry, torch.float32, 0)
    tensors[1].zero_()
    tensors[7][..., [0, 2]] = 0  # the selected branch alone
    tensors[4][:, :16] = tensors[4][:, 60:] = 1.0  # its values: four lowest blocks and the own one
    tensors[4][:, 16:60] = float("nan")
    out = decode(*tensors, lengths, geometry)
    torch.testing.assert_close(out, tensors[7][..., 1:2].expand_as(out))


@both
def test_rows_past_the_length_do_not_matter(decode):
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([9], 32, 1, 2, (16, 16), geometry, torch.float32, 0)
    expected = decode(*tensors, lengths, geometry)
    done = geometry.num_compressed(9)
    for i, x in enumerate(tensors[1:7]):
        x[:, done if i < 2 else 9 :] = float("nan")
    assert torch.equal(decode(*tensors, lengths, geometry), expected)


def test_what_does_not_fit_is_named():
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([9], 16, 1, 2, (16, 16), geometry, torch.float32, 0)
    with pytest.raises(ValueError, match="lengths must be int32"):
        nsa_decode(*tensors, lengths.long(), geometry)
    tensors[6] = tensors[6][:, :8]
    with pytest.raises(ValueError, match="v_win"):
        nsa_decode(*tensors, lengths, geometry)
    q, k, v = tensors[0], tensors[3], tensors[4]
    with pytest.raises(ValueError, match="Decode v must be contiguous"):
        window_decode(q, k, v.repeat_interleave(2, 3)[..., ::2], lengths, 3, 1.0)


@torch.no_grad()
def test_operators_pass_opcheck():
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([9, 30], 32, 1, 2, (16, 16), geometry, torch.float32, 0)
    numbers = [4, 2, 4, 3, 5, 1, 2]
    torch.library.opcheck(torch.ops.nsa.decode, (*tensors, lengths, numbers, 0.25))
    q, k, v = tensors[0], tensors[3], tensors[4]
    torch.library.opcheck(torch.ops.nsa.decode_window, (q, k, v, lengths, 7, 0.25))


@torch.no_grad()
def test_operations_are_those_of_full_caches():
    """2 sequences, 2 heads, 16 + 16 dimensions; room for 16 blocks, 3 blocks of 4, a window."""
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([9, 30], 32, 1, 2, (16, 16), geometry, torch.float32, 0)
    q, k, v = tensors[0], tensors[3], tensors[4]
    with FlopCounterMode(display=False) as counter:
        nsa_decode(*tensors, lengths, geometry)
    assert counter.get_total_flops() == 2 * 2 * 2 * 32 * (16 + 3 * 4 + 5)
    with FlopCounterMode(display=False) as counter:
        window_decode(q, k, v, lengths, 7, 1.0)
    assert counter.get_total_flops() == 2 * 2 * 2 * 32 * 7


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (96, 96)], ids=str)
@pytest.mark.parametrize("kv_heads, group", [(4, 16), (4, 4), (1, 16), (2, 1), (2, 12)])
def test_wide_grid_in_bf16(dims, kv_heads, group):
    geometry = Geometry()
    lengths = [1, 64, 777, 4096]
    args = (lengths, 4096, kv_heads, group, dims, geometry, torch.bfloat16, 0)
    tensors, lengths = make_inputs(*args)
    got = nsa_decode(*tensors, lengths, geometry)
    assert relative_error(got, twin(tensors, lengths, geometry)) < 5e-3


@pytest.mark.gpu
def test_a_captured_step_follows_the_lengths():
    geometry = Geometry()
    args = ([500, 100], 2048, 2, 4, (64, 64), geometry, torch.bfloat16, 0)
    tensors, lengths = make_inputs(*args)
    nsa_decode(*tensors, lengths, geometry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nsa_decode(*tensors, lengths, geometry)
    for step in (1, 700):
        lengths += step
        graph.replay()
        assert torch.equal(out, nsa_decode(*tensors, lengths, geometry))
