"""One decode step against the twin and the definition, for sequences of different lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nsa import reference
from kernels.nsa.decode import nsa_decode
from kernels.nsa.geometry import Geometry
from tests.kernels import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


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
@given(cases(), st.integers(0, 1000), st.sampled_from([torch.float32, torch.float16]))
def test_equals_the_twin(case, seed, dtype):
    tensors, lengths = make_inputs(*case, dtype, seed)
    got = nsa_decode(*tensors, lengths, case[-1])
    assert got.dtype == dtype
    assert relative_error(got, twin(tensors, lengths, case[-1])) < TOLERANCE[dtype]


def test_equals_the_last_token_of_the_definition():
    geometry = Geometry(8, 4, 8, 4, 10)
    tensors, lengths = make_inputs([37], 37, 2, 2, (16, 16), geometry, torch.float32, 0)
    q, *caches, gates = (x.double() for x in tensors)
    queries = torch.zeros(37, 4, 16, dtype=torch.float64, device=DEVICE)
    queries[-1] = q[0]
    gate_rows = gates.expand(37, 4, 3)
    want, _ = oracle.nsa(queries, *(c[0] for c in caches), gate_rows, [0, 37], geometry, 16**-0.5)
    assert relative_error(nsa_decode(*tensors, lengths, geometry)[0], want[-1]) < 1e-5


def test_an_empty_sequence_is_zero_beside_others():
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([0, 9], 16, 1, 2, (16, 16), geometry, torch.float32, 0)
    out = nsa_decode(*tensors, lengths, geometry)
    assert not out[0].any() and out.isfinite().all() and out[1].any()


def test_rows_past_the_length_do_not_matter():
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([9], 32, 1, 2, (16, 16), geometry, torch.float32, 0)
    expected = nsa_decode(*tensors, lengths, geometry)
    done = geometry.num_compressed(9)
    for i, x in enumerate(tensors[1:7]):
        x[:, done if i < 2 else 9 :] = float("nan")
    assert torch.equal(nsa_decode(*tensors, lengths, geometry), expected)


def test_shapes_that_do_not_fit_are_named():
    geometry = Geometry(4, 2, 4, 3, 5)
    tensors, lengths = make_inputs([9], 16, 1, 2, (16, 16), geometry, torch.float32, 0)
    tensors[6] = tensors[6][:, :8]
    with pytest.raises(ValueError, match="v_win"):
        nsa_decode(*tensors, lengths, geometry)


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
