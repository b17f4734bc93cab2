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
