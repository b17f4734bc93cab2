"""The options of the family zeroth_order as values; flat in the ops' schemas."""

from typing import NamedTuple, cast

from torch import Tensor

from ...random import Law, random_matrix


class Noise(NamedTuple):
    """Noise shaped like a weight (N, K): the tensor `values`, or matrices by formula, one for each row of `states`.

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
        assert self.states is not None
        state = self.states[i if len(self.states) > 1 else 0]
        law = cast(Law, self.law)
        return random_matrix(state, count, columns, law, self.law_scale, self.low, offset=(first, 0)).to(dtype)
