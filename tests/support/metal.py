"""A device without float64, as Apple's GPUs are: tensors that say they lie on "mps", whose values are on the CPU.

with Metal() as metal:
    metal.put(torch.ones(3)) * 2
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lgkernels.core import ops, trust

DEVICE = torch.device("mps", 0)
_WIDE = (torch.float64, torch.complex128)


class OnMetal(torch.Tensor):
    """A wrapper. Autograd, which knows no such device here, takes it for one of the CPU."""

    device = property(lambda self: DEVICE)  # type: ignore[assignment]

    def cpu(self):
        return self.values_

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device
        )
        made.values_ = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})


def _inner(value):
    return value.values_ if isinstance(value, OnMetal) else value


def _is_metal(device):
    return device is not None and torch.device(device).type == "mps"


def compute(function, arguments, options):
    """On the CPU. What was on the device stays there, unless a copy goes elsewhere. Of our ops every operation."""
    if function.namespace == "lgkernels":
        with Metal():
            return trust.OPS[function._schema.name.partition("::")[2]].function.implementation(*arguments, **options)
    found = []
    tree_map(lambda v: found.append(v) if isinstance(v, OnMetal) else None, (arguments, options))
    target = options.get("device")
    there = _is_metal(target) if target is not None else bool(found)
    options = dict(options, device="cpu") if _is_metal(target) else options
    result = function(*tree_map(_inner, arguments), **tree_map(_inner, options))

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        for old in found:  # an operation in place
            if value is old.values_:
                return old
        if not there:
            return value
        if value.dtype in _WIDE:
            raise TypeError(f"Cannot convert a MPS Tensor to {value.dtype}: {function}")
        return OnMetal(value)

    return tree_map(placed, result)


ops._plain_types[OnMetal] = True  # the ops' door lets it pass, as it lets the device's own tensors


class Metal(TorchDispatchMode):
    """Inside, tensors can be made on the device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})

    @staticmethod
    def put(value):
        """A copy of a tensor on the device; anything else as it is."""
        return OnMetal(value.detach().clone()) if isinstance(value, torch.Tensor) else value
