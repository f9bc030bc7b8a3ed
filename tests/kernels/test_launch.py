"""launch.py: which calls share a compiled kernel, what goes to Triton, and the same results as its own."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import native_specialize_impl

from kernels import launch as launching
from kernels.launch import TileView, cdiv, integer_kind, launch, next_power_of_2, sort_arguments

INTEGERS = [
    -(1 << 63), -(1 << 31) - 1, -(1 << 31), -16, -1, 0, 1, 2, 15, 16, 17, 32, (1 << 31) - 1, 1 << 31,
    1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
]  # fmt: skip


@triton.jit(do_not_specialize=["shift"])
def _scaled(x, more, out, count, shift, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, mask=i < count, other=0.0) * scale + shift
    if more is not None:
        y += tl.load(more + i, mask=i < count, other=0.0)
    if TWICE:
        y += y
    tl.store(out + i, y, mask=i < count)


@triton.jit
def _copied(tiles, out, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    tile = tiles.load([row, column])
    r, c = row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out + r[:, None] * WIDTH + c[None, :], tile)


def test_sizes():
    for n in range(1, 70):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert cdiv(n, 8) == triton.cdiv(n, 8)


@pytest.mark.parametrize("specialize", [True, False])
def test_integers_of_one_kind_are_one_to_triton(specialize):
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = {}
    for x in INTEGERS:
        theirs = native_specialize_impl(backend, x, False, specialize, True)
        assert found.setdefault(integer_kind(x), theirs) == theirs


@pytest.mark.parametrize("values", [(True, False), (0.0, 1.0, 2.5, 16.0), (None,)], ids=str)
def test_values_of_other_types_do_not_matter(values):
    backend = make_backend(GPUTarget("cuda", 90, 32))
    assert len({native_specialize_impl(backend, x, False, True, True) for x in values}) == 1
    assert {tuple(sort_arguments((x,))[0]) for x in values} == {(type(values[0]),)}


class OnGpu(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.mark.parametrize("specialize", [True, False])
def test_tensors_of_one_kind_are_one_to_triton(specialize):
    backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64):
        for start in (0, 1, 2, 4, 8, 11):
            x = torch.zeros(32, dtype=dtype)[start:]
            (kind,), (address,) = sort_arguments((x.as_subclass(OnGpu),))
            theirs = native_specialize_impl(backend, x, False, specialize, True)
            assert found.setdefault(kind, theirs) == theirs and address == x.data_ptr()


def test_tiles_differ_by_type_block_and_layout_only():
    def kind(x, *how):
        kinds, _ = sort_arguments((TileView(x.as_subclass(OnGpu), *how),))
        return kinds and kinds[0]

    x = torch.zeros(64, 64)
    assert kind(x, (16, 32)) == kind(x[8:, 16:], (16, 32))
    others = kind(x, (32, 16)), kind(x.half(), (16, 32)), kind(x, (16, 32), "layout")
    assert len({kind(x, (16, 32)), *others}) == 4
    assert kind(x.view(-1)[1:], (16,)) is None  # misaligned: Triton says so


def test_kinds():
    kinds, values = sort_arguments((3, 16, 2.5, None, True))
    assert kinds == [(32, False), (32, True), float, type(None), bool]
    assert values == [3, 16, 2.5, None, True]
    assert sort_arguments((1.0, "a string"))[0] is None
    assert sort_arguments((torch.zeros(2),))[0] is None


def _body(a, b, SIZE: tl.constexpr, LAST: tl.constexpr = 5):
    pass


class Recorded(JITFunction):
    """A kernel that notes what Triton and what its compiled form were asked to launch."""

    def __init__(self):
        super().__init__(_body)
        self.by_triton, self.directly = [], []

    def run(self, *args, grid, warmup, **constants):
        self.by_triton.append((grid, args, constants))
        compiled = CompiledKernel.__new__(CompiledKernel)
        compiled.module, compiled._run = None, lambda *args: self.directly.append(args)
        compiled.function, compiled.packed_metadata = "function", "metadata"
        return compiled


@pytest.fixture
def recorded(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 99)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "_SHORT", True)
    return Recorded()


def test_a_call_that_is_known_goes_straight_to_the_compiled_kernel(recorded):
    launch(recorded, (4, 2), 3, 0.5, SIZE=8, num_warps=4)
    launch(recorded, (5,), 7, 1.5, SIZE=8, num_warps=4)
    assert recorded.by_triton == [((4, 2), (3, 0.5), dict(SIZE=8, num_warps=4))]
    hooks = (None, None, None)
    assert recorded.directly == [(5, 1, 1, 99, "function", "metadata", *hooks, 7, 1.5, 8, 5)]


def test_what_compiles_anew_goes_to_triton(recorded):
    calls = [((3, 0.5), 8, 4), ((16, 0.5), 8, 4), ((1, 0.5), 8, 4), ((3, None), 8, 4)]
    calls += [((3, 0.5), 16, 4), ((3, 0.5), 8, 8), ((1 << 40, 0.5), 8, 4)]
    for _ in range(2):
        for args, size, warps in calls:
            launch(recorded, (1,), *args, SIZE=size, num_warps=warps)
    assert len(recorded.by_triton) == len(recorded.directly) == len(calls)
    other = Recorded()
    launch(other, (1,), *calls[0][0], SIZE=8, num_warps=4)
    assert len(other.by_triton) == 1


@pytest.mark.parametrize("given, wrong", [((3,), "b"), ((3, 0.5, 8), "SIZE")])
def test_arguments_by_position_constants_by_name(recorded, given, wrong):
    with pytest.raises(TypeError, match=f"{wrong} must be given"):
        launch(recorded, (1,), *given)


def test_triton_launches_what_is_not_known_here(recorded, monkeypatch):
    for _ in range(2):
        launch(recorded, (1,), "a string", 0.5, SIZE=8)
    hook = launching._HOOKS.launch_enter_hook
    hook.add(print)
    try:
        for _ in range(2):
            launch(recorded, (1,), 3, 0.5, SIZE=8)
    finally:
        hook.remove(print)
    hooks = SimpleNamespace(
        launch_enter_hook=None, launch_exit_hook=print
    )  # a function, not a chain
    with monkeypatch.context() as profiled:
        profiled.setattr(launching, "_HOOKS", hooks)
        for _ in range(2):
            launch(recorded, (1,), 3, 0.5, SIZE=8)
    monkeypatch.setattr(launching, "_SHORT", False)
    launch(recorded, (1,), 3, 0.5, SIZE=8)
    assert len(recorded.by_triton) == 7 and not recorded.directly


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _both(count, start, shift, more, twice):
    """out by launch, and by Triton."""
    x = torch.randn(start + count + 64, device=_device())[start:]
    addend = torch.randn(count + 64, device=_device())[start:] if more else None
    results = []
    for by in (launch, lambda kernel, grid, *args, **constants: kernel[grid](*args, **constants)):
        out = torch.zeros(start + count, device=_device())[start:]
        by(
            _scaled, (cdiv(count, 128),),
            x, addend, out, count, shift, 0.5, BLOCK=128, TWICE=twice, num_warps=2,
        )  # fmt: skip
        results.append(out)
    return results


@pytest.mark.parametrize("twice", [False, True])
def test_the_same_as_by_triton(twice):
    """Addresses that are not multiples of 16, numbers that are 1, multiples of 16, or wide."""
    for _ in range(2):
        for count in (1, 16, 100, 128, 1000):
            for start, shift, more in (
                (0, 3, True),
                (1, 16, False),
                (4, 1, True),
                (3, 1 << 33, True),
            ):
                ours, theirs = _both(count, start, shift, more, twice)
                assert ours.any() and torch.equal(ours, theirs)


def test_tiles_of_changing_tensors():
    for _ in range(2):
        for rows, width, start in ((16, 64, 0), (48, 64, 32), (40, 128, 64), (16, 256, 8)):
            x = torch.randn(rows + 1, width, device=_device()).view(-1)[start:]
            x = x[: rows * width].view(rows, width)
            out = torch.zeros(64, 32, device=_device())
            tiles = TileView(x, (16, 32))
            launch(_copied, (4,), tiles, out, 16, WIDTH=32, ROWS=16, COLUMNS=32, num_warps=4)
            assert torch.equal(out[:rows], x[:, 16:48]) and not out[rows:].any()


def test_a_misaligned_tile_is_an_error():
    x = torch.zeros(65 * 64, device=_device())[1 : 1 + 64 * 64].view(64, 64)
    out = torch.zeros(64, 32, device=_device())
    with pytest.raises(AssertionError, match="aligned"):
        constants = dict(WIDTH=32, ROWS=16, COLUMNS=32, num_warps=4)
        launch(_copied, (4,), TileView(x, (16, 32)), out, 16, **constants)


@pytest.mark.gpu
def test_a_repeated_call_does_not_meet_triton(monkeypatch):
    if not launching._SHORT:
        pytest.skip(f"Triton {triton.__version__} launches by itself.")

    def call(x, count):
        out = torch.zeros(512, device="cuda")
        launch(_scaled, (4,), x, None, out, count, 2, 0.5, BLOCK=128, num_warps=1)
        return out

    call(torch.zeros(512, device="cuda"), 500)
    monkeypatch.setattr(_scaled, "run", None)
    for count in (20, 499):
        x = torch.randn(512, device="cuda")
        want = torch.where(torch.arange(512, device="cuda") < count, x * 0.5 + 2, 0.0)
        assert torch.equal(call(x, count), want)
    with pytest.raises(TypeError):  # 1 is a kernel of its own
        call(x, 1)


@pytest.mark.gpu
def test_a_tensor_that_is_not_on_the_gpu_is_an_error():
    x = torch.zeros(128, device="cuda")
    for _ in range(2):
        launch(_scaled, (1,), x, None, x, 128, 2, 0.5, BLOCK=128, num_warps=4)
    with pytest.raises(ValueError, match="cannot be accessed"):
        launch(_scaled, (1,), x.cpu(), None, x, 128, 2, 0.5, BLOCK=128, num_warps=4)
