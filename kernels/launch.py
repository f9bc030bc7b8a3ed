"""A short way to launch a kernel that has been launched before.

Every launch of `kernel[grid](...)` in Triton 3.6 binds the arguments by name, asks after the class
of each, spells its options out, compares the globals, builds what a profiler's hooks would read and
asks the driver about every pointer. An NSA forward is two dozen launches of kernels that take 20 to
40 arguments, a backward three dozen, and at short lengths the GPU waits for them: what that still
costs with `launch` is the difference between "nsa 85 %" and "nsa 85 %, CUDA graph" in
scripts/bench_attention.py (nsa/results/h100.json; nsa/PERFORMANCE.md has the times before).

All that decides which compiled kernel a call gets, and what it decides by is little: the constants,
and of each argument its type, whether an address or a number is a multiple of 16, and whether a
number is 1. `launch` makes a key of these, gives the first call of each key to Triton, keeps the
compiled kernel that comes back, and calls that one's own launcher from then on. Keys distinguish at
least what Triton does (also where a kernel says do_not_specialize), so two calls that share one
would have got the same kernel. Nothing of a tensor is kept: its address is read at every call.

What is left out: Triton's complaint about a global that changed after a kernel was compiled, its
debugging and instrumentation switches if they are turned later, and constants that are equal but of
different types (1 and True), which are one here: a caller keeps to one type.
What goes to Triton as before: other versions than were read for this (VERSIONS), the interpreter,
arguments of other types than below, tensors that are not on a GPU, and everything while a profiler
has set its hooks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

VERSIONS = ("3.6",)
_SHORT = triton.__version__.rsplit(".", 1)[0] in VERSIONS
_HOOKS = triton.knobs.runtime

# Key -> kernel, launcher, function, its metadata, and the constants, which count as arguments.
_compiled: dict[tuple, tuple] = {}


class TileView:
    """A tensor as the TMA unit's copies see it: a TensorDescriptor that is cheap to make.

    block: the shape of a tile. layout: how a tile lies in shared memory, for Gluon kernels.
    """

    __slots__ = ("base", "shape", "strides", "block", "layout")
    padding = "zero"  # outside the tensor; Triton's launcher reads it

    def __init__(self, base: torch.Tensor, block: tuple[int, ...], layout: Any = None):
        self.base, self.shape, self.strides = base, base.shape, base.stride()
        self.block, self.layout = block, layout

    def descriptor(self):
        """Triton's or Gluon's own, which checks shape, strides and alignment."""
        if self.layout is None:
            return TensorDescriptor.from_tensor(self.base, list(self.block))
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor.from_tensor(self.base, list(self.block), self.layout)


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """kernel[grid](*args, **constants), its TileViews as descriptors.

    grid: one to three integers. args: what the kernel reads at run time, in its order: tensors,
    TileViews, int, bool, float, None. constants: its tl.constexpr arguments and Triton's options.
    """
    known = kinds = None
    if _SHORT and isinstance(kernel, JITFunction) and not _hooked():
        kinds, values = sort_arguments(args)
    if kinds is not None:
        device = driver.active.get_current_device()
        # The entry keeps the kernel, so that no other one can ever have its id.
        key = (id(kernel), device, *kinds, *constants.items())
        known = _compiled.get(key)
    if known is not None:
        _, run, function, metadata, rest = known
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        run(x, y, z, stream, function, metadata, None, None, None, *values, *rest)
        return
    if kinds is not None:
        rest = _constants_in_order(kernel, len(args), constants)
    own = [x.descriptor() if type(x) is TileView else x for x in args]
    compiled = kernel[grid](*own, **constants)
    if kinds is not None and isinstance(compiled, CompiledKernel):
        how = compiled.run, compiled.function, compiled.packed_metadata
        _compiled[key] = kernel, *how, rest


def sort_arguments(args: tuple) -> tuple[list | None, list]:
    """(kinds, values): what of each argument decides over the compiled kernel, and what to pass.

    A tensor is passed as its address, which spares the driver's look at it. The kinds are None
    where an argument is of none of the types that are known here, or not on a GPU.
    """
    kinds, values = [], list(args)
    for i, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            if not x.is_cuda:
                return None, values
            values[i] = address = x.data_ptr()
            kinds.append(x.dtype if address % 16 == 0 else (x.dtype,))
        elif type(x) is int:
            kinds.append(integer_kind(x))
        elif type(x) is TileView:
            if not x.base.is_cuda or x.base.data_ptr() % 16:  # the latter is an error for Triton
                return None, values
            kinds.append((x.base.dtype, x.block, x.layout))
        elif x is None or type(x) is float or type(x) is bool:
            kinds.append(type(x))
        else:
            return None, values
    return kinds, values


def integer_kind(x: int) -> tuple[int, bool] | int:
    """1 for one; otherwise the bits it needs (65: as an unsigned number) and if 16 divides it."""
    if x == 1:
        return 1
    bits = 32 if -(1 << 31) <= x < 1 << 31 else 64 if -(1 << 63) <= x < 1 << 63 else 65
    return bits, x % 16 == 0


def _constants_in_order(kernel, num_args: int, constants: dict) -> tuple:
    """The kernel's arguments after the first num_args, all of which must be constants."""
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr != (i >= num_args):
            how = "by name, as a constant" if parameter.is_constexpr else "by position"
            raise TypeError(f"{kernel.__name__}: {parameter.name} must be given {how}.")
    return tuple(constants.get(p.name, p.default) for p in kernel.params[num_args:])


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches: by a chain that is not empty, or a function."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(enter and getattr(enter, "calls", True) or leave and getattr(leave, "calls", True))


def next_power_of_2(n: int) -> int:
    """triton.next_power_of_2 without the way through a compile-time function."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, divisor: int) -> int:
    """triton.cdiv, likewise."""
    return -(-n // divisor)
