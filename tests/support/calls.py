"""A valid call of a public function, from which tests/static/test_argument_checks.py makes the wrong ones.

Each family has its own in tests/<family>/calls.py, as `CALLS = {"name of the function": Call(...)}`.
"""

from types import EllipsisType
from typing import NamedTuple


class Call(NamedTuple):
    """`arguments` of a valid call, every optional tensor among them.

    free: dimensions of a tensor whose size may change alone (a batch on which no other argument depends); `...`: any
        size and number of dimensions from one up will do, where the last size stays.
    dims: other numbers of dimensions that a tensor may have.
    any_sign: numbers that may be negative.
    any_dtype: fixed tensors, which may be of another floating dtype than the others.
    """

    arguments: dict
    free: dict[str, tuple[int, ...] | EllipsisType] = {}
    dims: dict[str, tuple[int, ...]] = {}
    any_sign: tuple[str, ...] = ()
    any_dtype: tuple[str, ...] = ()
