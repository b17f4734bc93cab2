"""Argument checks. Every message names the argument, what was got and what was expected."""

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def shape_of(tensor):
    return str(tuple(tensor.shape))


def tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def floating(name, value, dtypes=FLOATING):
    tensor(name, value)
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; use .to_dense()")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d)[6:] for d in dtypes)}, got {str(value.dtype)[6:]}")


def integer(name, value):
    tensor(name, value)
    if value.dtype not in INTEGER:
        raise TypeError(
            f"{name} must hold integers (int64, int32, ...), got {str(value.dtype)[6:]}; class indices are expected"
        )


def dims(name, value, allowed, meaning):
    if value.dim() not in allowed:
        raise ValueError(f"{name} must be {meaning}, got shape {shape_of(value)}")


def shape(name, value, expected, why):
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({why}), got {shape_of(value)}")


def same_device(**tensors):
    """All given tensors (None allowed) on one device."""
    first_name, first = None, None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first_name, first = name, value.device
        elif value.device != first:
            raise ValueError(
                f"{name} must be on {first} like {first_name}, got {value.device}; move it with .to({str(first)!r})"
            )


def positive_integer(name, value):
    whole_number(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def choice(name, value, options):
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def _is_number(name, value):
    if type(value) not in (int, float) and (isinstance(value, (bool, str)) or not hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def number(name, value):
    """A finite number, or a tensor that holds one."""
    _is_number(name, value)
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def boolean(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def whole_number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def positive(name, value):
    _is_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    number(name, value)


def between(name, value, low, high):
    _is_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def class_indices(name, value, num_classes, ignore_index=None):
    """Range check of class indices (`ignore_index` allowed, where there is one).

    It reads the tensor, so callers run it on CPU tensors, or under LGKERNELS_CHECK=1.
    """
    if value.numel() == 0:
        return
    if value.device.type == "cpu":
        value = value.detach().numpy()  # a few microseconds, where torch's reductions take tens
    if 0 <= int(value.min()) and int(value.max()) < num_classes:
        return
    wrong = (value < 0) | (value >= num_classes)
    wrong = value[wrong if ignore_index is None else wrong & (value != ignore_index)]
    if len(wrong):
        ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(f"{name} must hold class indices in [0, {num_classes - 1}]{ignored}, got {int(wrong[0])}")
