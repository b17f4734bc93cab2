"""The registered op of the family: shapes, checks, and the call of the chosen backend."""

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import define
from .blocks import blocks_of
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


def _check_8bit(weight, first, first_max, second, second_max, gradient, grad, x, rule):
    if (second is None) != (second_max is None):
        raise ValueError("second and second_max must both be given, or both be None")
    _check(weight, first, second, gradient, grad, x, rule)
    expected = weight.shape[0], blocks_of(weight.shape[1])
    for name, codes, absmax in (("first", first, first_max), ("second", second, second_max)):
        if codes is None:
            continue
        if absmax.shape != expected:
            checks.shape(f"{name}_max", absmax, expected, "one for each block of 256 entries of a row of weight")
        for what, tensor in ((name, codes), (f"{name}_max", absmax)):
            if not tensor.is_contiguous():
                raise ValueError(f"{what} must be contiguous, got strides {tuple(tensor.stride())}")


@define(
    backends_of="fused_update_",
    package=__package__,
    fake=lambda *_: None,
    check=_check_8bit,
    mutates=("weight", "first", "first_max", "second", "second_max"),
    dtypes={
        **dict.fromkeys(("first", "second"), (torch.uint8,)),
        **dict.fromkeys(("first_max", "second_max"), (torch.float32,)),
    },
)
def fused_update_8bit_(
    kernels,
    weight: Tensor,
    first: Tensor,
    first_max: Tensor,
    second: Tensor | None,
    second_max: Tensor | None,
    gradient: Tensor | None,
    grad: Tensor,
    x: Tensor,
    rule: UpdateRule,
) -> None:
    kernels.update_8bit_(weight, first, first_max, second, second_max, gradient, grad, x, rule)
