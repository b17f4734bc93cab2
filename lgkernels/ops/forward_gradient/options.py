"""The options of the family forward_gradient as values; flat in the ops' schemas."""

from typing import NamedTuple, cast

from torch import Tensor

from ...random import Law, random_matrix


class Noise(NamedTuple):
    """Noise shaped like z: the tensor `values`, the law of `state` (seed, stream, step), or none at all.

    By the law the entry of sample n at place i of the sample, in the order of a contiguous tensor, is entry (n, i) of
    the random matrix.
    """

    values: Tensor | None = None
    state: Tensor | None = None
    law: str = "normal"
    law_scale: float = 1.0
    low: float | None = None

    @property
    def exists(self) -> bool:
        return self.values is not None or self.state is not None

    def like(self, z: Tensor, dtype) -> Tensor:
        """The noise as a tensor shaped like z (N, ...)."""
        if self.values is not None:
            return self.values.to(dtype)
        size = z.shape[1:].numel()
        assert self.state is not None
        law = cast(Law, self.law)
        return random_matrix(self.state, len(z), size, law, self.law_scale, self.low).to(dtype).view(z.shape)


class NormOptions(NamedTuple):
    """What follows a linear map: a layer norm without scale and shift over dimension `dim`, a ReLU or none."""

    dim: int
    eps: float
    relu: bool
