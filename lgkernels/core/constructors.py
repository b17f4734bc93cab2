"""Checks of what modules, optimizers and trainers are made with. They run once each, before anything is made.

Messages as in :mod:`.checks`. What torch's own layers and optimizers take is taken here: NumPy's integers,
padding="same", device strings.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import checks

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# -- objects ----------------------------------------------------------------------------------------------------------


def instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def module(name: str, value: Any) -> None:
    instance(name, value, nn.Module, "a torch.nn.Module")


def optimizer(name: str, value: Any) -> None:
    instance(name, value, torch.optim.Optimizer, "a torch.optim.Optimizer")


def function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def iterable(name: str, value: Any, expected: str) -> None:
    if not isinstance(value, Iterable) or isinstance(value, (dict, str, bytes, Tensor)):
        raise TypeError(f"{name} must be an iterable of {expected}, got {type(value).__name__}")


def item_of(name: str, value: Any, item: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """An item of the iterable `value`."""
    if not isinstance(item, kinds):
        raise TypeError(
            f"{name} must be an iterable of {expected}, got a {type(value).__name__} with {type(item).__name__}"
        )


def several(name: str, value: Any, kinds: type | tuple[type, ...], expected: str, least: int = 1) -> list[Any]:
    """The items of an iterable, each of one of `kinds`, `least` of them or more. A dict's keys are no items."""
    iterable(name, value, expected)
    items = list(value)
    for item in items:
        item_of(name, value, item, kinds, expected)
    if len(items) < least:
        raise ValueError(
            f"{name} must be an iterable of at least one of {expected}, got an empty {type(value).__name__}"
        )
    return items


def modules(name: str, value: Any) -> list[nn.Module]:
    return several(name, value, nn.Module, "torch.nn.Modules")


def parameters(name: str, value: Any) -> list[Any]:
    """Of an optimizer: tensors, (name, tensor) pairs, or groups; what is in them is for torch's optimizer to check."""
    return several(name, value, (Tensor, dict, tuple), "parameters, or of dicts of them")


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text, or an iterable of texts, which may be empty."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Iterable) or isinstance(items, (dict, bytes, Tensor)):
        raise TypeError(f"{name} must be a str or an iterable of them, got {type(value).__name__}")
    items = tuple(items)
    for item in items:
        if not isinstance(item, str):
            raise TypeError(
                f"{name} must be a str or an iterable of them, got a {type(value).__name__} with {type(item).__name__}"
            )
    return items


# -- numbers ----------------------------------------------------------------------------------------------------------


def not_negative(name: str, value: Any) -> None:
    checks.number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def numbers(name: str, value: Any, lengths: tuple[int, ...], expected: str) -> tuple[float, ...]:
    """A sequence (an array or a tensor, too) of one of the lengths, of finite numbers."""
    if (
        isinstance(value, (dict, str, bytes))
        or is_lazy(value)
        or not hasattr(value, "__len__")
        or not hasattr(value, "__iter__")
    ):
        raise TypeError(f"{name} must be {expected}, got {checks.got(value)}")
    items = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else list(value)
    if not isinstance(items, list) or len(items) not in lengths:
        raise ValueError(f"{name} must be {expected}, got {checks.got(value)}")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name} must be {expected}, got a {type(value).__name__} with {type(item).__name__}")
        checks.number(name, item)
    return tuple(items)


def entry(name: str, value: Any, key: str) -> Tensor:
    """The tensor that a dict has under `key`."""
    instance(name, value, Mapping, "a dict of tensors")
    if key not in value:
        raise ValueError(f"{name} must have the key {key!r}, got a {type(value).__name__} with {list(value)}")
    checks.tensor(name, value[key])
    return value[key]


def bound_on_norm(name: str, value: Any) -> float:
    """A number; as torch's clip_grad_norm_ takes it, also in a tensor."""
    value = checks.item(value)
    checks.positive(name, value)
    return value


def size(name: str, value: Any, least: int = 1) -> int:
    """Of a tensor, in a range that torch's integers hold."""
    value = checks.whole_number(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def flags(**values: Any) -> None:
    for name, value in values.items():
        checks.boolean(name, value)


# -- torch's layers ---------------------------------------------------------------------------------------------------


def factory(device: Any, dtype: Any) -> dict[str, Any]:
    """`device` and `dtype` of new parameters, for torch's functions."""
    checks.device("device", device)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATING):
        known = ", ".join(map(str, checks.FLOATING))
        raise TypeError(f"dtype must be one of {known} or None, got {checks.got(dtype)}")
    return {"device": device, "dtype": dtype}


def has_bias(value: Any) -> None:
    """torch's layers take what is true or false: also None, NumPy's bools, 0 and 1."""
    if value is not None and not isinstance(value, (bool, np.bool_)) and not (type(value) is int and value in (0, 1)):
        raise TypeError(f"bias must be a bool, got {type(value).__name__}")


def linear(in_features: Any, out_features: Any, bias: Any, device: Any = None, dtype: Any = None) -> None:
    """nn.Linear's arguments; torch takes layers of no features."""
    size("in_features", in_features, 0)
    size("out_features", out_features, 0)
    has_bias(bias)
    factory(device, dtype)


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = checks.pair(name, value, least)
    for n in pair:
        size(name, n, least)
    return pair


def conv2d(
    in_channels: Any,
    out_channels: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any = 1,
    groups: Any = 1,
    bias: Any = True,
    padding_mode: Any = "zeros",
    device: Any = None,
    dtype: Any = None,
) -> None:
    """nn.Conv2d's arguments."""
    size("in_channels", in_channels, 0)
    size("out_channels", out_channels, 0)
    size("groups", groups)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{name} must be a multiple of groups={groups}, got {channels}")
    _pair("kernel_size", kernel_size, 1)
    steps = _pair("stride", stride, 1)
    _pair("dilation", dilation, 1)
    if isinstance(padding, str):
        checks.choice("padding", padding, ("same", "valid"))
        if padding == "same" and steps != (1, 1):
            raise ValueError(f"padding must be numbers where stride is not 1, got 'same' with stride={stride}")
    else:
        _pair("padding", padding, 0)
    has_bias(bias)
    checks.choice("padding_mode", padding_mode, _PADDING_MODES)
    factory(device, dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters lie; without any, where torch makes tensors."""
    parameter = next(module.parameters(), None)
    return torch.get_default_device() if parameter is None else parameter.device
