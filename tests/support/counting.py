"""Operations that a computation runs, and the bytes that they read and write: what its speed is made of."""

import importlib
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lgkernels.core import dispatch

_ALLOCATIONS = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
_INITIALISATIONS = {getattr(torch.ops.aten, name) for name in ("zeros", "zeros_like", "new_zeros", "full", "new_full")}
_NO_WORK = {getattr(torch.ops.aten, name) for name in ("detach", "alias", "_unsafe_view", "is_same_size", "sym_size")}


class Count(NamedTuple):
    operations: int
    bytes: int


def _bytes(tensor: Tensor) -> int:
    """Of distinct elements: one that is expanded is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


class Counter(TorchDispatchMode):
    """Inside, counts aten operations and the bytes of their tensors, inputs and outputs. Views and bare allocations do
    no work and count nothing. An op of lgkernels is opened: what its backend runs is counted.

    `names`: operations in order, to see where a count comes from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    @property
    def operations(self) -> int:
        return len(self.names)

    @property
    def count(self) -> Count:
        return Count(self.operations, self.bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "lgkernels":
            with self:  # a dispatch mode is off inside of its own handler
                return _implementation(function.name().partition("::")[2])(*args)
        with self:
            result = function.decompose(*args, **kwargs)  # inside of an op, matmul and the like arrive whole
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in _ALLOCATIONS or packet in _NO_WORK or function.is_view:
            return result
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        # an `out=` argument is in the results; one that is written in place (add_, addmm_) is read too
        inputs = [t for t in tree_leaves((args, kwargs.get("weight"))) if isinstance(t, Tensor)]
        if packet in _INITIALISATIONS:
            inputs = []
        self.names.append(str(packet))
        self.bytes += sum(map(_bytes, inputs)) + sum(map(_bytes, results or _written(function, args)))
        return result


@cache
def _implementation(name):
    """The Python function of an op of lgkernels."""
    modules = [importlib.import_module(f"lgkernels.ops.{family}.op") for family in dispatch.families()]
    return next(getattr(module, name).implementation for module in modules if hasattr(module, name))


def _written(function, args):
    """What an operation without results (`torch._foreach_add_`) writes."""
    mutated = [a for a, arg in zip(args, function._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    return [t for t in tree_leaves(mutated) if isinstance(t, Tensor)]


def count(function, *arguments) -> Count:
    """Operations and bytes of `function(*arguments)`, without a gradient's bookkeeping."""
    with torch.no_grad(), Counter() as counter:
        function(*arguments)
    return counter.count


@contextmanager
def at_most(operations: int):
    """Raise if more than `operations` run inside."""
    with Counter() as counter:
        yield counter
    assert counter.operations <= operations, f"{counter.operations} operations, at most {operations}: {counter.names}"


def assert_lean(name: str, ours: Count, lean: Count, factor: float = 1.15) -> None:
    """No more than `factor` times the operations and bytes of a lean contestant."""
    assert ours.operations <= factor * lean.operations, f"{name}: {ours.operations} operations, lean {lean.operations}"
    assert ours.bytes <= factor * lean.bytes, f"{name}: {ours.bytes:,} bytes, lean {lean.bytes:,}"
