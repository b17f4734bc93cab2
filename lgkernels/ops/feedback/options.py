"""The options of the family feedback as values: from the op's door to the kernels' structs."""

from typing import NamedTuple


class Formula(NamedTuple):
    """F without its tensors: scale * value, or scale * |value| * sign(weight). `scale` may be "mean_abs" (of W)."""

    signs: str = "none"  # "none", "weight", or "packed": +-1 from packed bits
    law: str = "uniform"
    law_scale: float = 1.0
    low: float | None = None
    scale: float | str = 1.0
    sign_plus: bool = False


class SgdOptions(NamedTuple):
    """Of torch.optim.SGD's step, or (`manhattan`) Batch Manhattan's, with the gradient grad_scale * grad^T x."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    manhattan: bool = False
    grad_scale: float = 1.0
