"""Registered ops of the family zeroth_order: shapes, checks, and the call of the chosen backend.

Coefficients and random states go in as tensors: a step with other numbers compiles nothing anew.
"""

from functools import partial

import torch
from torch import Tensor

from ...core import checks, dispatch
from ...core.ops import class_indices, define, wide_dtype
from ..common.matrix import check_law
from .options import Geometry, Noise

_STATES = {"states": (torch.int64,)}
_define = partial(define, package=__package__)


def _check_noise(weight, coefficients, noise):
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


def _check_members(x, weight, bias, coefficients, noise):
    matrices = _check_noise(weight, coefficients, noise)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1], "one for each output of weight")
    members = len(coefficients) if x is None else len(x)
    if len(coefficients) != members:
        checks.shape("coefficients", coefficients, (members,), "one for each member of x")
    if matrices not in (1, members):
        raise ValueError(f"states must be one, or one for each of the {members} members of x, got {matrices}")


def _check_linear(x, weight, bias, coefficients, noise):
    checks.dims("weight", weight, (2,), "(N, K)")
    checks.dims("x", x, (3,), "(M, R, K)")
    if x.shape[2] != weight.shape[1]:
        checks.shape("x", x, (*x.shape[:2], weight.shape[1]), "members, rows, inputs of weight")
    _check_members(x, weight, bias, coefficients, noise)


def _backend(op, noise_at, impl, *arguments):
    """Noise that is a tensor is for torch's products, on any device."""
    first, noise = arguments[0], arguments[noise_at]
    if noise.values is not None and impl != "reference" and first.dtype != torch.float64:
        dispatch.choose(op, impl, first.device, first.dtype)  # raises for one that is not here
        impl = "torch"
    return dispatch.backend(op, impl, first.device, first.dtype)


@_define(
    backends_of="perturbed_linear",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:2], weight.shape[0])),
    check=_check_linear,
    dtypes=_STATES,
    choose=partial(_backend, "perturbed_linear", 4),
)
def perturbed_linear(
    kernels, x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, noise: Noise
) -> Tensor:
    return kernels.perturbed_linear(x, weight, bias, coefficients, noise)


def _check_conv(x, weight, bias, coefficients, noise, geometry):
    checks.dims("x", x, (5,), "(M, B, C, H, W)")
    if coefficients.dim() == 1:  # one batch for all members
        checks.conv2d(x.flatten(0, 1), weight, None, *geometry)
    _check_members(x, weight, bias, coefficients, noise)


def _conv_fake(x, weight, bias, coefficients, noise, geometry):
    sizes = zip(x.shape[3:], weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    positions = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return x.new_empty((*x.shape[:2], weight.shape[0], *positions))


@_define(
    backends_of="perturbed_conv2d",
    fake=_conv_fake,
    check=_check_conv,
    dtypes=_STATES,
    choose=partial(_backend, "perturbed_conv2d", 4),
)
def perturbed_conv2d(
    kernels, x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, noise: Noise, geometry: Geometry
) -> Tensor:
    if not len(x):
        return _conv_fake(x, weight, bias, coefficients, noise, geometry)
    return kernels.perturbed_conv2d(x, weight, bias, coefficients, noise.as_matrix(), geometry)


def _check_rows(weight, x, coefficients, noise, wide):
    checks.dims("weight", weight, (2,), "(N, K)")
    if x is not None:
        checks.dims("x", x, (2,), "(M, R)")
    _check_members(x, weight, None, coefficients, noise)


def _rows_fake(weight, x, coefficients, noise, wide):
    shape = (len(coefficients), len(weight)) if x is None else x.shape
    return weight.new_empty((*shape, weight.shape[1]), dtype=wide_dtype(weight.dtype) if wide else weight.dtype)


@_define(
    backends_of="perturbed_rows",
    fake=_rows_fake,
    check=_check_rows,
    choose=partial(_backend, "perturbed_rows", 3),
    dtypes={**_STATES, "x": (torch.int64,)},
)
def perturbed_rows(kernels, weight: Tensor, x: Tensor | None, coefficients: Tensor, noise: Noise, wide: bool) -> Tensor:
    """`wide`: in the dtype that is computed in, not weight's."""
    if x is not None:
        x = class_indices("x", x, len(weight), what="row numbers of weight")
    if not len(coefficients) or not weight.numel() or x is not None and not x.numel():
        return _rows_fake(weight, x, coefficients, noise, wide)
    dtype = wide_dtype(weight.dtype) if wide else weight.dtype
    return kernels.perturbed_rows(weight, x, coefficients, noise, dtype)


def _check_update(weight, coefficients, noise, keep):
    checks.dims("weight", weight, (2,), "(N, K)")
    matrices = _check_noise(weight, coefficients, noise)
    if noise.values is not None:
        raise ValueError("values must be None: the step along a tensor is torch's own addition, got a tensor")
    if coefficients.shape != (matrices,):
        checks.shape("coefficients", coefficients, (matrices,), "one for each state")


@_define(backends_of="formula_update_", fake=lambda *_: None, check=_check_update, mutates=("weight",), dtypes=_STATES)
def formula_update_(kernels, weight: Tensor, coefficients: Tensor, noise: Noise, keep: float) -> None:
    if len(coefficients):
        kernels.formula_update_(weight, coefficients, noise, keep)
