"""Registered ops of the family direct: shapes, checks, and the call of the chosen backend."""

from functools import partial

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import define
from ..common.matrix import DTYPES, check_law, check_state
from .options import ActivationOptions, NormOptions, SignalLaw

_define = partial(define, package=__package__)


def _out_size(z, activation):
    return (z.shape[2] // 2, z.shape[3] // 2) if activation.max_pool else tuple(z.shape[2:])


def _check_channels(z, **vectors):
    checks.dims("z", z, (4,), "(B, C, H, W)")
    for name, vector in vectors.items():
        if vector is not None:
            checks.shape(name, vector, z.shape[1:2], "one a channel of z")


def _check_forward(z, gamma, beta, running_mean, running_var, norm, activation):
    _check_channels(z, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    if running_mean is not None and {running_mean.dtype, running_var.dtype} - {torch.float32, torch.float64}:
        raise TypeError(
            "running_mean and running_var must be float32 (or float64), got "
            f"{str(running_mean.dtype)[6:]} and {str(running_var.dtype)[6:]}: they would lose what a step adds"
        )


def _forward_fake(z, gamma, beta, running_mean, running_var, norm, activation):
    return z.new_empty((*z.shape[:2], *_out_size(z, activation))), torch.empty_like(gamma), torch.empty_like(gamma)


@_define(
    backends_of="direct_forward", fake=_forward_fake, check=_check_forward, mutates=("running_mean", "running_var")
)
def direct_forward(
    kernels,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: NormOptions,
    activation: ActivationOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.direct_forward(z, gamma, beta, running_mean, running_var, norm, activation)


def _check_backward(z, mean, rstd, gamma, beta, delta, error, state, signal, activation):
    _check_channels(z, mean=mean, rstd=rstd, gamma=gamma, beta=beta)
    check_state(state)
    check_law(signal.law)
    if delta is not None:
        checks.shape("delta", delta, (*z.shape[:2], *_out_size(z, activation)), "that of the block's output")
    elif error is None or state is None:
        raise ValueError("error and state must be given where delta is not")
    elif error.dim() != 2 or error.shape[0] != z.shape[0]:
        raise ValueError(f"error must be ({z.shape[0]}, classes), got shape {checks.shape_of(error)}")


@_define(
    backends_of="direct_backward_",
    fake=lambda z, mean, rstd, gamma, *_: (torch.empty_like(gamma), torch.empty_like(gamma)),
    check=_check_backward,
    dtypes=DTYPES,
    mutates=("z",),
)
def direct_backward_(
    kernels,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    delta: Tensor | None,
    error: Tensor | None,
    state: Tensor | None,
    signal: SignalLaw,
    activation: ActivationOptions,
) -> tuple[Tensor, Tensor]:
    return kernels.direct_backward_(z, mean, rstd, gamma, beta, delta, error, state, signal, activation)
