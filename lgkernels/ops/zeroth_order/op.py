"""Registered ops of the family zeroth_order: shapes, checks, and the call of the chosen backend.

Coefficients and random states go in as tensors: a step with other numbers compiles nothing anew.
"""

from functools import partial

import torch
from torch import Tensor

from ...core import checks, dispatch
from ...core.ops import define
from ..common.matrix import check_law
from .options import Noise

_define = partial(define, package=__package__, dtypes={"states": (torch.int64,)})


def _check_noise(weight, coefficients, noise):
    checks.dims("weight", weight, (2,), "(N, K)")
    checks.dims("coefficients", coefficients, (1,), "one for each member")
    check_law(noise.law)
    if (noise.values is None) == (noise.states is None):
        raise ValueError(f"states must be given where values are not, got {'none' if noise.states is None else 'both'}")
    if noise.values is not None:
        checks.shape("values", noise.values, weight.shape, "that of weight")
        return 1
    states = noise.states
    if states.dim() != 2 or states.shape[1] != 3 or not states.is_contiguous():
        raise ValueError(
            f"states must be a contiguous (S, 3) tensor of (seed, stream, step), got {tuple(states.shape)}"
        )
    return len(states)


def _check_linear(x, weight, bias, coefficients, noise):
    matrices = _check_noise(weight, coefficients, noise)
    checks.dims("x", x, (3,), "(M, R, K)")
    if x.shape[2] != weight.shape[1]:
        checks.shape("x", x, (*x.shape[:2], weight.shape[1]), "members, rows, inputs of weight")
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1], "one for each output of weight")
    if coefficients.shape != x.shape[:1]:
        checks.shape("coefficients", coefficients, x.shape[:1], "one for each member of x")
    if matrices not in (1, len(x)):
        raise ValueError(f"states must be one, or one for each of the {len(x)} members of x, got {matrices}")


def _backend(impl, x, weight, bias, coefficients, noise):
    """Noise that is a tensor is for torch's products, on any device."""
    if noise.values is not None and impl != "reference" and x.dtype != torch.float64:
        dispatch.choose("perturbed_linear", impl, x.device, x.dtype)  # raises for one that is not here
        return dispatch.backend("perturbed_linear", "torch", x.device, x.dtype)
    return dispatch.backend("perturbed_linear", impl, x.device, x.dtype)


@_define(
    backends_of="perturbed_linear",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:2], weight.shape[0])),
    check=_check_linear,
    choose=_backend,
)
def perturbed_linear(
    kernels, x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, noise: Noise
) -> Tensor:
    return kernels.perturbed_linear(x, weight, bias, coefficients, noise)


def _check_update(weight, coefficients, noise, keep):
    matrices = _check_noise(weight, coefficients, noise)
    if noise.values is not None:
        raise ValueError("values must be None: the step along a tensor is torch's own addition, got a tensor")
    if coefficients.shape != (matrices,):
        checks.shape("coefficients", coefficients, (matrices,), "one for each state")


@_define(backends_of="formula_update_", fake=lambda *_: None, check=_check_update, mutates=("weight",))
def formula_update_(kernels, weight: Tensor, coefficients: Tensor, noise: Noise, keep: float) -> None:
    if len(coefficients):
        kernels.formula_update_(weight, coefficients, noise, keep)
