"""What a unit of a whole model may take: a tensor, or as the first unit a mapping of the model's arguments."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core import checks


def check(x: Any) -> None:
    """Of the argument x: a dense tensor, or a mapping that holds tensors."""
    if not isinstance(x, Mapping):
        checks.tensor("x", x)
    elif not any(isinstance(part, Tensor) for part in x.values()):
        raise TypeError(f"x must be a torch.Tensor, or a mapping that holds one, got a dict of {list(x)}")


def detached(x: Any) -> Any:
    if not isinstance(x, Mapping):
        return x.detach()
    return {name: part.detach() if isinstance(part, Tensor) else part for name, part in x.items()}


def rows(x: Any) -> int:
    """The batch's size."""
    first = x if isinstance(x, Tensor) else next(part for part in x.values() if isinstance(part, Tensor))
    return first.shape[0]
