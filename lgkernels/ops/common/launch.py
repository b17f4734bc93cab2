"""Starting a Triton kernel: block sizes, device guard, current stream, and the interpreter on CPU tensors.

Triton's own `kernel[grid](...)` binds and specialises its arguments and looks up its options at every launch. `start`
lets it do that once, and remembers the compiled kernel that it chose, under a key at least as fine as Triton's: dtypes
and alignment to 16 bytes of tensors, values of ints, which arguments are None, constants with their types, warps and
stages, device. After that the kernel is launched with addresses, without a look at the memory behind them: the op's
door has checked that it is on the device. Whatever is not as expected goes through Triton every time: a profiler's
hook, debug mode, an argument of another class, another version's internals.

`start` and `architecture` are read from this module at every launch, so that a test that puts its own in their place
sees the launches of all families.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ...core import dry
from ...core.dispatch import interpreting
from ...core.tiles import architecture, select, type_of

try:
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    _ENTER, _LEAVE = knobs.runtime_knobs.launch_enter_hook, knobs.runtime_knobs.launch_exit_hook
    if knobs.runtime_knobs.debug or not (type(_ENTER.calls) is type(_LEAVE.calls) is list):
        JITFunction = None
except (ImportError, AttributeError):  # no Triton, or one whose internals are others
    JITFunction = None

DEVICE_TYPES = {"cuda"}  # tests put "cpu" here, and a driver of their own into Triton
_MOST = 4096
_PARTS = ("run", "function", "packed_metadata")  # of a compiled kernel
_remembered: dict[tuple, "_Launch"] = {}


class _Launch(NamedTuple):
    """A specialisation that Triton has compiled and started before."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple  # those of the kernel's parameters that follow the arguments
    kernel: Any  # kept alive: only so long is its id its own


def block_count(size, block):
    """How many blocks of `block` elements hold `size` of them."""
    return -(-size // block)


def new(like, *shape):
    """A float32 tensor on the device of `like`, with no values yet."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def configuration(tile, sizes, like, dtype=None):
    """Block sizes, warps and stages by an entry of the family's TILES, for the device and the dtype of `like`."""
    arch = dry.architecture() if like.is_meta else architecture(like.device)
    return select(tile, sizes, dtype or like.dtype, arch)


def _remember(key, kernel, compiled, args, meta):
    """Keep what Triton has just started, if all that a launch needs of it is there."""
    names = list(getattr(kernel, "arg_names", ()))
    constants, options = names[len(args) :], getattr(getattr(compiled, "metadata", None), "_fields", ())
    if (
        all(name in meta for name in constants)
        and all(name in constants or name in options for name in meta)
        and all(hasattr(compiled, part) for part in _PARTS)
    ):
        if len(_remembered) >= _MOST:
            _remembered.clear()
        values = tuple(meta[name] for name in constants)
        _remembered[key] = _Launch(compiled.run, compiled.function, compiled.packed_metadata, values, kernel)


def _start_elsewhere(kernel, programs, device, meta, args):
    """In the interpreter, on the meta device, or by another Triton than `start` knows."""
    if device.type == "meta":
        return dry.note(kernel, args, meta)
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"the triton backend got tensors on {device}: move them to a CUDA device, choose another "
            "impl=, or set TRITON_INTERPRET=1 before triton is imported"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **meta)


def start(kernel, programs, device, args, meta):
    """Run `kernel` on `device`'s current stream, or in the interpreter."""
    if type(kernel) is not JITFunction or type_of(device) not in DEVICE_TYPES:
        return _start_elsewhere(kernel, programs, device, meta, args)
    active = driver.active
    index = active.get_current_device()
    if device.index != index and device.index is not None:
        with torch.cuda.device(device):
            return start(kernel, programs, device, args, meta)
    key = [id(kernel), index, *meta, *meta.values(), *map(type, meta.values())]  # True is another constant than 1
    values, foreign = [], False  # foreign: a class of tensor that must not be kept alive in a key
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            address = value.data_ptr()
            values.append(address)
            key.append((value.dtype,) if address & 15 else value.dtype)
        else:
            values.append(value)
            # A float is its type to Triton, an int may be a constant or a multiple of 16, a bool is no int.
            if kind is int or value is None:
                key.append(value)
            elif kind is float:
                key.append(float)
            else:
                key.append((kind, value))
                foreign = foreign or kind is not bool
    known = _remembered.get(tuple(key))
    own = knobs.runtime.__dict__  # what somebody has set: a hook, debug mode
    watched = _ENTER.calls or _LEAVE.calls or kernel.pre_run_hooks or kernel.debug or own and any(own.values())
    if known is not None and not watched:
        run, function, metadata, constants, _ = known
        stream = active.get_current_stream(index)
        return run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)
    compiled = kernel[(programs,)](*args, **meta)
    if not watched and not foreign:
        _remember(tuple(key), kernel, compiled, args, meta)


def launch(kernel, programs, device, *args, **meta):
    """Run `kernel` on a one-dimensional grid of `programs`; nothing to do where there are none."""
    if programs:
        start(kernel, programs, device, args, meta)
