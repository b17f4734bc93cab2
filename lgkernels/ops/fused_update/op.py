"""The registered op of the family: shapes, checks, and the call of the chosen backend."""

from torch import Tensor

from ...core import checks
from ...core.ops import define
from .options import RULES, UpdateRule


def _check(weight, first, second, gradient, grad, x, rule):
    checks.dims("weight", weight, (2,), "(N, K)")
    for name, tensor in (("first", first), ("second", second), ("gradient", gradient)):
        if tensor is not None and tensor.shape != weight.shape:
            checks.shape(name, tensor, weight.shape, "that of weight")
    if grad.shape != (x.shape[0], weight.shape[0]):
        checks.shape("grad", grad, (x.shape[0], weight.shape[0]), "rows of x, outputs of weight")
    if x.shape != (x.shape[0], weight.shape[1]):
        checks.shape("x", x, (x.shape[0], weight.shape[1]), "samples, inputs of weight")
    checks.choice("rule", rule.rule, RULES)
    if rule.rule == "adam" and (first is None or second is None):
        raise ValueError("rule='adam' needs first and second (exp_avg and exp_avg_sq), got None")


@define(
    backends_of="fused_update_",
    package=__package__,
    fake=lambda *_: None,
    check=_check,
    mutates=("weight", "first", "second"),
)
def fused_update_(
    kernels,
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    gradient: Tensor | None,
    grad: Tensor,
    x: Tensor,
    rule: UpdateRule,
) -> None:
    kernels.update_(weight, first, second, gradient, grad, x, rule)
