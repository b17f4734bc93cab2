"""The options of the family zeroth_order as values; flat in the ops' schemas."""

from typing import NamedTuple, cast

from torch import Tensor

from ...random import Law, random_matrix, random_rows


class Geometry(NamedTuple):
    """Of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Noise(NamedTuple):
    """Noise shaped like a weight, as a matrix (N, K): the tensor `values`, or matrices by formula, one for each row of
    `states`.

    states (S, 3): (seed, stream, step) of each matrix. All have one law, scale and low end.
    """

    values: Tensor | None = None
    states: Tensor | None = None
    law: str = "normal"
    law_scale: float = 1.0
    low: float | None = None

    def rows(self, i: int, first: int, count: int, columns: int, dtype) -> Tensor:
        """Rows [first, first + count) of matrix i; matrix 0 where there is one for all."""
        if self.values is not None:
            return self.values[first : first + count].to(dtype)
        return random_matrix(self._state(i), count, columns, *self._law(), offset=(first, 0)).to(dtype)

    def picked(self, i: int, index: Tensor, columns: int, dtype) -> Tensor:
        """Rows `index` of matrix i."""
        if self.values is not None:
            return self.values[index].to(dtype)
        return random_rows(self._state(i), index, columns, *self._law()).to(dtype)

    def as_matrix(self) -> "Noise":
        """Values as (N, K)."""
        return self if self.values is None else self._replace(values=self.values.reshape(len(self.values), -1))

    def one(self, i: int) -> "Noise":
        """That of member i alone."""
        return self if self.states is None or len(self.states) == 1 else self._replace(states=self.states[i : i + 1])

    def _state(self, i: int) -> Tensor:
        assert self.states is not None
        return self.states[i if len(self.states) > 1 else 0]

    def _law(self) -> tuple[Law, float, float | None]:
        return cast(Law, self.law), self.law_scale, self.low
