"""Arguments of other sizes: views of a call's, from which a trial (core/trial.py) takes shapes, strides and alignment.

A size is named by the places that have it: (argument, dimension) of tensors and lists, (argument, 0) of numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Places = Sequence[tuple[str, int]]
_VECTOR = 16  # a size that is cut keeps its remainder by that at least: strides stay as aligned as they were
_TILES = 2  # of the largest block, which stay, and what they leave over


class Size(NamedTuple):
    """One that a trial may cut, as its first place tells it."""

    places: Places
    together: int | None = 2  # dimensions from this one on are tiled as one; None: only the library runs over it


def _here(value: Any, dim: int) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[dim] if dim < value.dim() else None
    if isinstance(value, (list, tuple)):
        return value[dim] if dim < len(value) else None
    return value


def elements(value: Any) -> int:
    """Of a tensor, or of the one that a list of sizes is of."""
    return value.numel() if isinstance(value, Tensor) else math.prod(value) if _is_shape(value) else 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(n) is int for n in value)


def size_of(arguments: dict, places: Places) -> int | None:
    """The size, at the first of its places that is there."""
    found = (_here(arguments.get(name), dim) for name, dim in places)
    return next((size for size in found if size is not None), None)


def _dense(shape: Sequence[int], stride: Sequence[int], new: Sequence[int]) -> list[int]:
    """Strides of another shape that is laid out alike: dense where it was, the same distance where there is a gap."""
    result, old_extent, extent = list(stride), 1, 1
    for dim in sorted(range(len(shape)), key=lambda dim: stride[dim]):
        if stride[dim] and shape[dim] > 1:
            result[dim] = extent if stride[dim] == old_extent else stride[dim]
            old_extent, extent = stride[dim] * shape[dim], result[dim] * new[dim]
    return result


def resized(arguments: dict, places: Places, size: int, dense: bool = True) -> dict:
    """The arguments with a smaller size: in a place that has a multiple of it (latents: a channel has several), or
    words of 32 signs, that too becomes smaller. Without `dense` the strides stay as they are."""
    old, made = size_of(arguments, places), dict(arguments)
    for name, dim in places:
        value = made.get(name)
        here = _here(value, dim)
        if here is None or not old:
            continue
        if here % old == 0:
            new = here // old * size
        elif here == -(-old // 32):
            new = -(-size // 32)
        else:
            continue
        if isinstance(value, Tensor):
            shape = [*value.shape[:dim], new, *value.shape[dim + 1 :]]
            made[name] = value.as_strided(
                shape, _dense(value.shape, value.stride(), shape) if dense else value.stride()
            )
        else:
            made[name] = [*value[:dim], new, *value[dim + 1 :]] if isinstance(value, (list, tuple)) else new
    return made


def smaller(arguments: dict, size: Size, blocks: dict[str, int]) -> list[dict]:
    """The arguments with the sizes that one may be cut to, smallest first; `blocks`: the largest of the kernels'."""
    number, least, fewest = size_of(arguments, size.places) or 0, _VECTOR, 0
    if size.together is not None:
        name, dim = size.places[0]
        shape, block = getattr(arguments[name], "shape", arguments[name]), max(blocks.values(), default=1)
        if dim >= size.together:  # positions
            beside = math.prod(shape[size.together :]) // max(number, 1)
            fewest = -(-_TILES * blocks.get("BLOCK_P", block) // max(beside, 1))
        else:
            least = max(least, _TILES * block)
    steps = [least << n for n in range(number.bit_length())]
    kept = [step + number % step for step in steps]
    return [resized(arguments, size.places, n) for n in kept if fewest <= n < number]


def first(candidates: Sequence[Any], holds: Callable[[Any], bool]) -> Any:
    """By bisection a candidate of which it holds, as near to the first as can be; None where there is none."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(candidates[middle]) else (middle + 1, high)
    return candidates[low] if low < len(candidates) else None
