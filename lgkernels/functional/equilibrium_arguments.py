"""Checks that the functions of the family equilibrium share."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..core.autograd import refuse_transforms
from ..core.ops import class_indices, wide_dtype
from ..ops.equilibrium.network import READOUT, Network, network, state_shapes, widths
from ..ops.equilibrium.options import ACTIVATIONS, HOLOMORPHIC, LOSSES


class Checked(NamedTuple):
    """A net, the sizes of its states without the batch, and the number of its classes (by cross entropy)."""

    found: Network
    shapes: list[tuple[int, ...]]
    classes: int
    units: int


def refuse_compiled(name: str) -> None:
    """Of what watches a net, or loops in Python: not for a graph."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{name} does not support torch.compile: call it outside of what is compiled")


def net_and_input(name: str, weights: Any, x: Any) -> Checked:
    refuse_transforms(name)
    found = network(weights)
    sizes = widths(found, weights)
    checks.floating("x", x)
    meaning = f"(B, {sizes[0]}, H, W)" if found.conv else f"(B, {sizes[0]})"
    if x.dim() != (4 if found.conv else 2) or x.shape[1] != sizes[0]:
        raise ValueError(f"x must be {meaning} as the weights take it, got shape {checks.shape_of(x)}")
    first = next(iter(weights.values()))
    checks.precision("x", x, "weights", first)
    checks.same_device(weights=first, x=x)
    shapes = state_shapes(found, sizes, tuple(x.shape[2:]))
    units = torch.Size(shapes[-1]).numel()
    if found.readout and units != sizes[-1]:
        raise ValueError(
            f"x must be of a size that leaves one pixel for the readout, got {x.shape[2]}x{x.shape[3]}, "
            f"which leaves {shapes[-1][1]}x{shapes[-1][2]}"
        )
    classes = weights[f"{READOUT}/kernel"].shape[1] if found.readout else units
    return Checked(found, shapes, classes, units)


def activation_and_loss(activation: Any, loss: Any = "mse") -> None:
    checks.choice("activation", activation, ACTIVATIONS)
    checks.choice("loss", loss, LOSSES)


def holomorphic(name: str, activation: str) -> None:
    if activation not in HOLOMORPHIC:
        allowed = " or ".join(map(repr, HOLOMORPHIC))
        raise ValueError(f"activation must be {allowed} where {name}, got {activation!r}")


def layers(
    name: str, values: Any, net: Checked, x: Tensor, lead: tuple[int, ...] = (), imaginary: bool = False
) -> list[Tensor]:
    """The tensors of a dict layer -> value, in order; each (*lead, B, *)."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a dict of tensors by layer, got {type(values).__name__}")
    names = net.found.names
    if set(values) != set(names):
        got = f"a {type(values).__name__} {list(values)}"
        raise ValueError(f"{name} must have the layers {', '.join(names)}, got {got}")
    for layer, shape in zip(names, net.shapes):
        value = values[layer]
        kinds = (*checks.FLOATING, torch.complex64, torch.complex128) if imaginary else checks.FLOATING
        checks.floating(name, value, kinds)
        checks.shape(name, value, (*lead, len(x), *shape), f"{layer} of {len(x)} samples")
        if (value.dtype in (torch.float64, torch.complex128)) != (x.dtype == torch.float64):
            raise TypeError(f"{name} must be in x's precision {checks.dtype_of(x)}, got {checks.dtype_of(value)}")
        checks.same_device(x=x, **{name: value})
    return [values[layer] for layer in names]


def targets(target: Any, net: Checked, x: Tensor, loss: str) -> Tensor:
    """(B, C) in the dtype that is computed in, of class indices (B,) or numbers (B, C)."""
    classes = net.classes if loss == "cross_entropy" else net.units
    checks.tensor("target", target)
    dtype = wide_dtype(x.dtype)
    if target.dtype in checks.INTEGER:
        checks.class_targets("target", target, x, "x")
        checks.same_device(x=x, target=target)
        return F.one_hot(class_indices("target", target, classes), classes).to(dtype)
    checks.floating("target", target)
    checks.shape("target", target, (len(x), classes), "class indices (B,), or a number for each output")
    checks.same_device(x=x, target=target)
    return target.detach().to(dtype)


def complex_number(name: str, value: Any) -> complex | float:
    """Complex where its type is, numpy's too."""
    if isinstance(value, Tensor) and value.is_complex():
        got = f"a tensor of {checks.dtype_of(value)}"
        raise TypeError(f"{name} must be a number, real or complex, got {got}: take the .item() of one number")
    if isinstance(value, np.complexfloating):
        value = complex(value)
    if isinstance(value, complex):
        checks.number(name, value.real)
        checks.number(name, value.imag)
        return value
    return checks.number(name, value)
