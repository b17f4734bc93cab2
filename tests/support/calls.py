"""A valid call of a public function, from which tests/static/test_argument_checks.py makes the wrong ones.

Each family has its own in tests/<family>/calls.py, as `CALLS = {"name of the function": Call(...)}`.
"""

import importlib
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """`arguments` of a valid call, every optional tensor among them.

    free: dimensions of a tensor whose size may change alone (a batch on which no other argument depends); `...`: any
        size and number of dimensions from one up will do, where the last size stays.
    dims: other numbers of dimensions that a tensor may have.
    any_sign: numbers that may be negative.
    any_dtype: fixed tensors, which may be of another floating dtype than the others.
    methods: of a trainer: arguments of methods that take others than any trainer's.
    compiles: whether torch.compile takes the function; it refuses by name else.
    """

    arguments: dict
    free: dict[str, tuple[int, ...] | EllipsisType] = {}
    dims: dict[str, tuple[int, ...]] = {}
    any_sign: tuple[str, ...] = ()
    any_dtype: tuple[str, ...] = ()
    methods: dict[str, dict] = {}
    compiles: bool = True


def all_calls(table: str = "CALLS") -> dict[str, Call]:
    """{public function: Call} of all families; with "MODULES" those of classes; "APPLIED" has
    for modules (a function that makes one, arguments of its forward, public functions that may refuse transforms)."""
    folders = sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/calls.py"))
    modules = [importlib.import_module(f"tests.{folder}.calls") for folder in folders if folder != "support"]
    return {name: call for module in modules for name, call in getattr(module, table, {}).items()}


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def flat(outputs: Any) -> tuple:
    """The outputs of a function: those of tuples and dicts, one after the other."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return tuple(v for out in outputs for v in flat(out)) if isinstance(outputs, tuple) else (outputs,)


def weighted(outputs: Any) -> torch.Tensor:
    """A number in which every element of the (float) outputs has a weight of its own."""
    parts = (o * torch.arange(1.0, o.numel() + 1).view(o.shape) for o in flat(outputs) if is_float(o))
    return sum(part.sum() for part in parts)
