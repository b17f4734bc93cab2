"""The options of the offset step."""

from typing import NamedTuple


class StepOptions(NamedTuple):
    """The numbers of a step, by the names of the formula in `reference.py`."""

    lr: float
    momentum: float
    weight_decay: float
    local_scale: float
    offset_scale: float
    grad_scale: float = 1.0

    def of_kernels(self) -> tuple[float, ...]:
        """What the kernels take: one factor of the gradient. Floats, where somebody gave ints."""
        lr, momentum, weight_decay, local_scale, offset_scale, grad_scale = self
        return float(lr), float(momentum), float(weight_decay), float(local_scale * grad_scale), float(offset_scale)
