"""Argument checks. Every message names the argument, what was got and what was expected.

They run at each call, so the usual types are tried first, and a message is put together only where one is raised.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dispatch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)

_STRIDED = torch.strided
_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
_INFINITY = float("inf")


# -- what messages say ------------------------------------------------------------------------------------------------


def shape_of(value: Tensor) -> str:
    return str(tuple(value.shape))


def dtype_of(value: Tensor) -> str:
    return str(value.dtype)[6:]


def got(value: Any) -> str:
    """A value in a message: its type where the value itself would be long or say nothing."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (tuple, list)):
        return f"{value!r}" if all(isinstance(v, _NUMBERS) for v in value) else f"a {type(value).__name__}"
    return repr(value) if isinstance(value, (str, *_NUMBERS)) else type(value).__name__


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensor(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """A dense tensor: sparse and oneDNN tensors have layouts of their own."""
    if not isinstance(value, Tensor):
        if isinstance(value, torch.fx.Proxy):
            raise TypeError(
                f"{name} must be {expected}, got a Proxy of torch.fx.symbolic_trace, which cannot look into this "
                "layer: use torch.export, or a Tracer with is_leaf_module true for it"
            )
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if value.layout is not _STRIDED or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}; use .to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {layout}")


def floating(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    tensor(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d)[6:] for d in dtypes)}, got {dtype_of(value)}")


def integer(name: str, value: Any, meaning: str = "class indices are expected") -> None:
    tensor(name, value)
    if value.dtype not in INTEGER:
        raise TypeError(f"{name} must hold integers (int64, int32, ...), got {dtype_of(value)}; {meaning}")


def dims(name: str, value: Tensor, allowed: tuple[int, ...], meaning: str) -> None:
    if value.dim() not in allowed:
        raise ValueError(f"{name} must be {meaning}, got shape {shape_of(value)}")


def shape(name: str, value: Tensor, expected: Sequence[int], why: str) -> None:
    if value.shape != expected and tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({why}), got {shape_of(value)}")


def not_empty(name: str, value: Tensor) -> None:
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must have no empty dimension but the first, got shape {shape_of(value)}")


def same_device(**tensors: Tensor | None) -> None:
    """All given tensors (None allowed) on one device."""
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first_name, first = name, value.device
        elif value.device != first:
            raise ValueError(
                f"{name} must be on {first} like {first_name}, got {value.device}; move it with .to({str(first)!r})"
            )


def class_targets(name: str, value: Any, rows: Tensor, of: str) -> None:
    """One class index for each row of the argument `of`."""
    integer(name, value)
    if value.dim() != 1 or value.shape[0] != rows.shape[0]:
        shape(name, value, rows.shape[:1], f"one class index per row of {of}")


def class_indices(name: str, value: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Range check of class indices (`ignore_index` allowed, where there is one).

    It reads the tensor, so callers run it on CPU tensors, or under LGKERNELS_CHECK=1.
    """
    if value.numel() == 0:
        return
    values: Any = value
    if value.device.type == "cpu":
        values = value.detach().numpy()  # a few microseconds, where torch's reductions take tens
    if 0 <= int(values.min()) and int(values.max()) < num_classes:
        return
    wrong = (values < 0) | (values >= num_classes)
    wrong = values[wrong if ignore_index is None else wrong & (values != ignore_index)]
    if len(wrong):
        ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(f"{name} must hold class indices in [0, {num_classes - 1}]{ignored}, got {int(wrong[0])}")


# -- numbers, flags, names --------------------------------------------------------------------------------------------


def whole_number(name: str, value: Any) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _INTEGERS)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def positive_integer(name: str, value: Any) -> None:
    whole_number(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def integer_between(name: str, value: Any, low: int, high: int) -> None:
    """In [low, high)."""
    whole_number(name, value)
    if not low <= value < high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}), got {value}")


def _real(name: str, value: Any, expected: str = "a number") -> None:
    """A tensor is refused: its gradient would be lost, and reading it waits for its device."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def item(value: Any) -> Any:
    """The number of a tensor that holds one, for optimizers, whose learning rate may be such a tensor."""
    if not isinstance(value, Tensor) or torch.nn.parameter.is_lazy(value) or value.is_meta or value.numel() != 1:
        return value  # for a check to refuse
    return value.item()


def number(name: str, value: Any, expected: str = "a number") -> None:
    """A finite number, NumPy's too."""
    _real(name, value, expected)
    if not -_INFINITY < value < _INFINITY:
        raise ValueError(f"{name} must be finite, got {value}")


def positive(name: str, value: Any, expected: str = "a number") -> None:
    _real(name, value, expected)
    if not 0 < value < _INFINITY:
        raise ValueError(f"{name} must be {'finite' if value == _INFINITY else 'greater than 0'}, got {value}")


def between(name: str, value: Any, low: float, high: float) -> None:
    _real(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a bool, got {'a NumPy bool' if kind in ('bool', 'bool_') else kind}")


def choice(name: str, value: Any, options: Sequence[Any]) -> None:
    if isinstance(value, str) and value in options:
        return
    if not any(value is option for option in options):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be one of {', '.join(map(repr, options))}, got {got(value)}")


def impl(value: Any) -> None:
    choice("impl", value, dispatch.IMPLEMENTATIONS)


def device(name: str, value: Any) -> None:
    """What torch.device takes, or None."""
    if value is None or isinstance(value, torch.device):
        return
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"{name} must be a torch.device, a str, an int or None, got {type(value).__name__}")
    try:
        torch.device(value)
    except RuntimeError:
        raise ValueError(f"{name} must name a device, as 'cpu' or 'cuda:0' do, got {value!r}") from None


def _plain_integer(value: Any) -> Any:
    """A NumPy integer as an int: what is computed from it must not wrap around."""
    return int(value) if isinstance(value, np.integer) else value


def sizes(name: str, value: Any, meaning: str) -> tuple[int, ...]:
    """The sizes of a tensor of at least one dimension; an int is one size."""
    result = (value,) if isinstance(value, _INTEGERS) else value
    if not isinstance(result, (tuple, list)):
        raise TypeError(f"{name} must be {meaning}, got {type(value).__name__}")
    if not result or any(isinstance(n, bool) or not isinstance(n, _INTEGERS) or n < 0 for n in result):
        raise ValueError(f"{name} must be {meaning}, none negative, got {value!r}")
    return tuple([_plain_integer(n) for n in result])


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """An int twice, or two of them, each at least `least`."""
    if type(value) is int and value >= least:
        return value, value
    both: Any = (value, value) if isinstance(value, _INTEGERS) else value
    if (
        not isinstance(both, (tuple, list))
        or len(both) != 2
        or any(isinstance(n, bool) or not isinstance(n, _INTEGERS) for n in both)
    ):
        raise TypeError(f"{name} must be an int or two of them, got {got(value)}")
    if both[0] < least or both[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return _plain_integer(both[0]), _plain_integer(both[1])


# -- layers -----------------------------------------------------------------------------------------------------------


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; the meta device, where memory is planned, has none."""
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    )


def bias(name: str, value: Any, weight: Tensor) -> None:
    if value is not None:
        floating(name, value)
        if value.dim() != 1 or value.shape[0] != weight.shape[0]:
            shape(name, value, weight.shape[:1], "one for each output of weight")


def _one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("bias", bias)):
        if value is not None and value.dtype != weight.dtype and not autocasts(x.device):
            raise TypeError(
                f"{name} must have weight's dtype {dtype_of(weight)} (outside of autocast), got {dtype_of(value)}"
            )


def linear(x: Any, weight: Any, bias_: Any, *, one_dtype: bool = True) -> None:
    """As torch's linear takes them; without `one_dtype` the caller casts weight and bias to x's dtype."""
    floating("x", x)
    floating("weight", weight)
    dims("weight", weight, (2,), "(N, K)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}) (K of weight), got shape {shape_of(x)}")
    _layer(x, weight, bias_, one_dtype)


def _layer(x: Tensor, weight: Tensor, bias_: Any, one_dtype: bool) -> None:
    """What linear and convolution have in common."""
    bias("bias", bias_, weight)
    same_device(weight=weight, x=x, bias=bias_)
    if one_dtype:
        _one_dtype(x, weight, bias_)


def conv2d(
    x: Any, weight: Any, bias_: Any, stride: Any, padding: Any, dilation: Any, groups: Any, *, one_dtype: bool = True
) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int], tuple[int, int], int], bool]:
    """`(x, (stride, padding, dilation, groups), batched)`: x with a batch, padding two numbers.

    padding="same" as torch: where the total is odd, x gets one more zero at the end.
    """
    floating("x", x)
    floating("weight", weight)
    dims("weight", weight, (4,), "(O, C / groups, kh, kw)")
    positive_integer("groups", groups)
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"x must be (B, {weight.shape[1] * groups}, H, W) (weight's channels times groups) or the "
            f"same without B, got shape {shape_of(x)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide weight's {weight.shape[0]} outputs, got {groups}")
    if 0 in weight.shape[2:]:
        raise ValueError(f"weight must have a window of at least (1, 1), got shape {shape_of(weight)}")
    _layer(x, weight, bias_, one_dtype)
    batched = x.dim() == 4
    x = x if batched else x.unsqueeze(0)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    height, width = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    if isinstance(padding, str):
        choice("padding", padding, ("same", "valid"))
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding must be numbers where stride is not 1, got 'same' with stride={stride}")
        if padding == "same" and (height % 2 or width % 2):
            x = torch.nn.functional.pad(x, (0, width % 2, 0, height % 2))
        padding = (height // 2, width // 2) if padding == "same" else (0, 0)
    else:
        padding = pair("padding", padding, 0)
    if x.shape[2] + 2 * padding[0] <= height or x.shape[3] + 2 * padding[1] <= width:
        raise ValueError(
            f"x must reach over weight's kernel, {(height + 1, width + 1)} with dilation, when padded "
            f"by {padding}, got shape {shape_of(x)}"
        )
    return x, (stride, padding, dilation, groups), batched
