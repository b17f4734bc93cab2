"""The options of the fused step: from the op's door to the kernels' struct."""

from typing import NamedTuple


class UpdateRule(NamedTuple):
    """An optimizer's step, by the names of the formula in `reference.py`; the defaults are those of plain SGD.

    `rule`: "sgd", "manhattan" (Batch Manhattan: SGD on the gradient's sign) or "adam". What a rule does not use is
    ignored.
    """

    rule: str
    lr: float  # of Adam: lr / (1 - beta1^t)
    momentum: float = 0.0  # of Adam: beta1
    fresh: float = 1.0  # the gradient's part in the momentum: 1 - dampening; of Adam 1 - beta1
    weight_decay: float = 0.0  # added to the gradient
    keep: float = 1.0  # of the weight; decoupled weight decay: 1 - lr * weight_decay
    nesterov: bool = False
    beta2: float = 0.0
    eps: float = 0.0
    root: float = 1.0  # sqrt(1 - beta2^t)
    grad_scale: float = 1.0
    clip_value: float = float("inf")  # of each entry of the gradient


RULES = ("sgd", "manhattan", "adam")
