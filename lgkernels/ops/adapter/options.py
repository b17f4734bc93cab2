"""The options of the family adapter as values."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """Of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
