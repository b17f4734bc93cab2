"""Argument checks. Every message names the argument, what was got and what was expected.

They run at each call, so the usual types are tried first, and a message is put together only where one is raised.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter, UninitializedTensorMixin, is_lazy  # type: ignore[attr-defined]

from . import dispatch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)

_STRIDED, _INT64, _INFINITY = torch.strided, 2**63, float("inf")
_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


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
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    return repr(value) if isinstance(value, (str, *_NUMBERS)) else type(value).__name__


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensor(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """A dense tensor: sparse and oneDNN tensors have layouts of their own."""
    kind = type(value)
    if kind is not Tensor and kind is not Parameter:
        any_tensor(name, value, expected)
    if value.layout is not _STRIDED or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}; use .to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {layout}")


def any_tensor(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """Of any layout (it goes to modules, which may take sparse ones) and class, if it has a shape."""
    if not isinstance(value, Tensor):
        if isinstance(value, torch.fx.Proxy):
            raise TypeError(
                f"{name} must be {expected}, got a Proxy of torch.fx.symbolic_trace, which cannot look into this "
                "layer: use torch.export, or a Tracer with is_leaf_module true for it"
            )
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if isinstance(value, UninitializedTensorMixin):  # is_lazy, which Dynamo does not trace
        raise TypeError(
            f"{name} must be {expected} with a shape, got an {type(value).__name__}: run the lazy module once"
        )


def floating(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    tensor(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d)[6:] for d in dtypes)}, got {dtype_of(value)}")


def integer(name: str, value: Any, meaning: str = "class indices are expected") -> None:
    tensor(name, value)
    if value.dtype not in INTEGER:
        raise TypeError(f"{name} must hold integers (int64, int32, ...), got {dtype_of(value)}; {meaning}")


def precision(name: str, value: Tensor, of: str, other: Tensor) -> None:
    """What is computed together in float32, or in float64 where both are: halves mix with float32 and lose nothing."""
    if value.dtype != other.dtype and torch.float64 in (value.dtype, other.dtype):
        raise TypeError(f"{name} must be float64 if and only if {of} is, got {dtype_of(value)} and {dtype_of(other)}")


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


def class_indices(
    name: str, value: Tensor, num_classes: int, ignore_index: int | None = None, what: str = "class indices"
) -> None:
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
        raise ValueError(f"{name} must hold {what} in [0, {num_classes - 1}]{ignored}, got {int(wrong[0])}")


# -- numbers, flags, names --------------------------------------------------------------------------------------------
#
# A number is Python's, NumPy's, or a tensor of one number that requires no gradient, as torch takes it. Each check
# returns Python's: what is computed from it does not wrap around, and fits into int64 or float32.


def _plain(value: Any) -> Any:
    """NumPy's number, or that of a tensor, as Python's; anything else as it is."""
    if isinstance(value, Tensor):
        if is_lazy(value) or value.numel() != 1 or value.requires_grad or value.dtype not in FLOATING + INTEGER:
            return value
        return value if value.layout is not _STRIDED or value.device.type == "meta" else value.item()
    return value.item() if isinstance(value, (np.integer, np.floating)) else value


def _kind(value: Any) -> str:
    lost = isinstance(value, Tensor) and value.requires_grad
    return type(value).__name__ + (" with a gradient, which would be lost: pass .item()" if lost else "")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    return integer_between(name, value, -_INT64, _INT64)


def positive_integer(name: str, value: Any, below: int = _INT64) -> int:
    if type(value) is int and 0 < value < below:
        return value
    number = whole_number(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return integer_between(name, number, 1, below)


def integer_between(name: str, value: Any, low: int, high: int) -> int:
    """In [low, high)."""
    if type(value) is int and low <= value < high:
        return value
    number = _plain(value)
    if not _is(number, _INTEGERS):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if not low <= number < high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}), got {got(number)}")
    return number


def _real(name: str, value: Any, expected: str) -> Any:
    number = _plain(value)
    if not _is(number, _NUMBERS):
        raise TypeError(f"{name} must be {expected}, got {_kind(value)}")
    return number


def item(value: Any) -> Any:
    """The number of a tensor that holds one, for optimizers, whose learning rate may be such a tensor."""
    if not isinstance(value, Tensor) or torch.nn.parameter.is_lazy(value) or value.is_meta or value.numel() != 1:
        return value  # for a check to refuse
    return value.item()


def number(name: str, value: Any, expected: str = "a number") -> float:
    """A finite number."""
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value
    number = _real(name, value, expected)
    if not -_LARGEST <= number <= _LARGEST:
        where = "" if number != number or number in (_INFINITY, -_INFINITY) else " in float32"
        raise ValueError(f"{name} must be finite{where}, got {got(number)}")
    return float(number)


def positive(name: str, value: Any, expected: str = "a number") -> float:
    """A number by which float32 can be multiplied and divided."""
    if type(value) is float and _SMALLEST <= value <= _LARGEST:
        return value
    real = _real(name, value, expected)
    if not real > 0:
        raise ValueError(f"{name} must be greater than 0, got {got(real)}")
    if real < _SMALLEST:
        raise ValueError(f"{name} must be at least {_SMALLEST:.2g}, float32's smallest normal number, got {got(real)}")
    return number(name, real)


def between(name: str, value: Any, low: float, high: float) -> float:
    if type(value) is float and low <= value <= high:
        return value
    number = _real(name, value, "a number")
    if not low <= number <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {got(number)}")
    return float(number)


def boolean(name: str, value: Any) -> None:
    """torch refuses NumPy's bools and tensors too."""
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
    """What torch.device takes, where this torch and this machine have it; or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name} must be a torch.device, a str, an int or None, got {type(value).__name__}")
    try:
        if torch.device(value).type not in ("cpu", "meta"):
            torch.empty(0, device=value, dtype=torch.float32)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        shown = got(value) if isinstance(value, int) else repr(value)
        raise ValueError(f"{name} must be a device of this machine, as 'cpu' is, got {shown}: {why}") from None


def sizes(name: str, value: Any, meaning: str) -> tuple[int, ...]:
    """The sizes of a tensor of at least one dimension; an int is one size."""
    one = _plain(value)
    result = (one,) if isinstance(one, _INTEGERS) else value
    if not isinstance(result, (tuple, list)):
        raise TypeError(f"{name} must be {meaning}, got {_kind(value)}")
    result = tuple([_plain(n) for n in result])
    if not result or not all(_is(n, _INTEGERS) and n >= 0 for n in result):
        raise ValueError(f"{name} must be {meaning}, none negative, got {got(value)}")
    if math.prod(result) >= _INT64:
        raise ValueError(f"{name} must be {meaning}, fewer than 2**63 elements, got {got(value)}")
    return result


def pair(name: str, value: Any, least: int, below: int = 2**31) -> tuple[int, int]:
    """An int twice, or two of them, each in [least, below)."""
    if type(value) is int and least <= value < below:
        return value, value
    one = _plain(value)
    both: Any = (one, one) if isinstance(one, _INTEGERS) else value
    both = tuple([_plain(n) for n in both]) if isinstance(both, (tuple, list)) else ()
    if len(both) != 2 or not all(_is(n, _INTEGERS) for n in both):
        raise TypeError(f"{name} must be an int or two of them, got {got(value)}")
    if min(both) < least:
        raise ValueError(f"{name} must be at least {least}, got {got(value)}")
    if max(both) >= below:
        raise ValueError(f"{name} must be below {below}, got {got(value)}")
    return both


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
    """As torch has it: one dtype, or under autocast any but float64, which autocast leaves alone."""
    for name, value in (("x", x), ("bias", bias)):
        if value is not None and value.dtype != weight.dtype:
            if not autocasts(x.device):
                raise TypeError(
                    f"{name} must have weight's dtype {dtype_of(weight)} (outside of autocast), got {dtype_of(value)}"
                )
            precision(name, value, "weight", weight)


def linear(x: Any, weight: Any, bias_: Any) -> None:
    """As torch's linear takes them."""
    floating("x", x)
    floating("weight", weight)
    dims("weight", weight, (2,), "(N, K)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}) (K of weight), got shape {shape_of(x)}")
    _layer(x, weight, bias_)


def _layer(x: Tensor, weight: Tensor, bias_: Any) -> None:
    """What linear and convolution have in common."""
    bias("bias", bias_, weight)
    same_device(weight=weight, x=x, bias=bias_)
    _one_dtype(x, weight, bias_)


def conv2d(
    x: Any, weight: Any, bias_: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int], tuple[int, int], int], bool]:
    """`(x, (stride, padding, dilation, groups), batched)`: x with a batch, padding two numbers.

    padding="same" as torch: where the total is odd, x gets one more zero at the end.
    """
    floating("x", x)
    floating("weight", weight)
    dims("weight", weight, (4,), "(O, C / groups, kh, kw)")
    groups = positive_integer("groups", groups)
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"x must be (B, {weight.shape[1] * groups}, H, W) (weight's channels times groups) or the "
            f"same without B, got shape {shape_of(x)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide weight's {weight.shape[0]} outputs, got {groups}")
    if 0 in weight.shape:
        raise ValueError(f"weight must have no empty dimension, got shape {shape_of(weight)}")
    _layer(x, weight, bias_)
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
