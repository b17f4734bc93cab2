"""A step of `OffsetSGD` that can be run again, and how it is known that it may.

What is looked at in each step is gathered by C functions over whole lists: no Python runs for a parameter.
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import environment
from ..ops.offset.options import StepOptions

_grad_of, _dtype_of = attrgetter("grad"), attrgetter("dtype")
_address_of, _numel_of, _stride_of = Tensor.data_ptr, Tensor.numel, Tensor.stride
_is_contiguous: Callable[[Tensor], bool] = Tensor.is_contiguous


class Member(NamedTuple):
    """A parameter of a group that takes part in a step."""

    parameter: Tensor
    grad: Tensor
    state: dict[str, Any]


class Launch(NamedTuple):
    """What one backend steps: its module, its table of addresses, and the places of its members in the group."""

    kernels: ModuleType
    table: Any
    device: torch.device
    members: list[int]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether they hold the same objects. Not ==: two tensors would be compared entry by entry."""
    return len(a) == len(b) and all(map(is_, a, b))


def _mode(options: StepOptions) -> tuple:
    """What chooses backend and kernel beside the tensors."""
    choice = environment.value("LGKERNELS_IMPL", "auto"), environment.value("LGKERNELS_TRUST", "")
    return choice, not options.momentum, not options.offset_scale


def _tensors_of(states: Sequence[dict[str, Any]], name: str) -> list[Tensor | None]:
    return list(map(dict.get, states, repeat(name)))


class Plan:
    """A group's step: the backends' tables of addresses, already checked.

    It may be run again while parameters, momentum buffers and offsets are the same tensors at the same addresses, with
    the same sizes and strides; the gradients have the class, dtype, sizes and strides they had (other addresses go
    into the table); the same backends are chosen, and momentum and offset_scale are 0 or not as before. The options
    may change: each run takes them anew. Offsets, buffers and states are kept alive: only so long does an address
    belong to them.
    """

    def __init__(
        self, options: StepOptions, params: Sequence[Tensor], members: Sequence[Member], launches: list[Launch]
    ) -> None:
        self.mode, self.launches, self.group = _mode(options), launches, list(params)
        self.absent = [i for i, p in enumerate(params) if p.grad is None]
        self.params, grads, self.states = (list(column) for column in zip(*members))
        self.buffers, self.offsets = self._kept()
        kept = [t for t in [*self.buffers, *self.offsets] if t is not None]
        self.fixed: list[Tensor] = [*self.params, *kept]
        self.odd = [i for i, t in enumerate(self.fixed) if not t.is_contiguous()]
        self.places = self._places()
        self.odd_grads = [i for i, g in enumerate(grads) if not g.is_contiguous()]
        self.classes, self.forms = list(map(type, grads)), self._forms(grads)
        self.addresses = list(map(_address_of, grads))
        written = [*self.params, *(t for t in self.buffers if t is not None and options.momentum)]
        self.written = [t for t in written if not t.is_inference()]

    def _kept(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        return _tensors_of(self.states, "momentum_buffer"), _tensors_of(self.states, "offset")

    def _places(self) -> tuple:
        """Where parameters, buffers and offsets lie, and how."""
        fixed = self.fixed
        return (
            list(map(_address_of, fixed)),
            list(map(_numel_of, self.params)),
            list(map(_is_contiguous, self.params)),
            [fixed[i].stride() for i in self.odd],
        )

    def _forms(self, grads: list[Tensor]) -> tuple:
        """What the table relies on, of gradients that may lie elsewhere each time."""
        return (
            list(map(_dtype_of, grads)),
            list(map(_numel_of, grads)),
            list(map(_is_contiguous, grads)),
            [_stride_of(grads[i]) for i in self.odd_grads],
        )

    def fits(self, options: StepOptions, params: Sequence[Tensor]) -> bool:
        """Whether the step to come is this one; takes over the gradients' addresses."""
        if self.mode != _mode(options) or not _same(self.group, params):
            return False
        grads: list[Any] = list(map(_grad_of, params))
        if self.absent:
            if [i for i, grad in enumerate(grads) if grad is None] != self.absent:
                return False
            grads = [grad for grad in grads if grad is not None]
        if list(map(type, grads)) != self.classes:
            return False
        buffers, offsets = self._kept()
        if not _same(self.buffers, buffers) or not _same(self.offsets, offsets):
            return False
        try:
            if self.places != self._places() or self.forms != self._forms(grads):
                return False
            addresses = list(map(_address_of, grads))
        except RuntimeError:  # one is sparse
            return False
        if addresses != self.addresses:
            if addresses.count(0) != self.addresses.count(0):
                return False  # a storage was freed: the checks say so
            self.addresses = addresses
            self.launches = [
                launch._replace(table=launch.kernels.moved(launch.table, [addresses[i] for i in launch.members]))
                for launch in self.launches
            ]
        return True

    def run(self, options: StepOptions) -> None:
        for kernels, table, device, _ in self.launches:
            kernels.run(table, device, options)
        torch.autograd.graph.increment_version(self.written)


class States:
    """The entries of an optimizer's `state` as they were; an entry that is new or another ends all plans."""

    def __init__(self, state: dict[Any, dict[str, Any]]) -> None:
        self.params, self.entries = list(state), list(state.values())

    def are(self, state: dict[Any, dict[str, Any]]) -> bool:
        return _same(self.entries, list(state.values())) and _same(self.params, list(state))
