"""The fused step in Triton: `update_` of reference.py, same arguments, shapes and dtypes (no float64).

Everything is computed in float32 and rounded once on store, half factors excepted: they are multiplied as they are.
Sums have a fixed order. CPU tensors work under TRITON_INTERPRET=1.
"""

import torch

from ..common.dot import precision
from ..common.launch import block_count, configuration, launch
from .tiles import TILES
from .triton_step import fused_update_8bit_kernel, fused_update_kernel


def _strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()


def _numbers(rule):
    first = rule.lr, rule.momentum, rule.fresh, rule.weight_decay, rule.keep
    second = rule.beta2, 1.0 - rule.beta2, rule.eps, rule.root, rule.grad_scale, rule.clip_value
    return [*map(float, first), *map(float, second)]


def update_(weight, first, second, gradient, grad, x, rule):
    (N, K), M = weight.shape, grad.shape[0]
    dtype = torch.promote_types(grad.dtype, x.dtype)
    config = configuration(TILES["update"], (M, N, K), weight, dtype)
    programs = block_count(N, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"])
    matrices = weight, first, second if rule.rule == "adam" else None, gradient
    launch(
        fused_update_kernel,
        programs,
        weight.device,
        *matrices,
        grad.contiguous(),
        x.contiguous(),
        *_numbers(rule),
        M,
        N,
        K,
        *(stride for matrix in matrices for stride in _strides(matrix)),
        NESTEROV=bool(rule.nesterov),
        MANHATTAN=rule.rule == "manhattan",
        PRECISION=precision(dtype),
        **config,
    )


def update_8bit_(weight, first, first_max, second, second_max, gradient, grad, x, rule):
    (N, K), M = weight.shape, grad.shape[0]
    dtype = torch.promote_types(grad.dtype, x.dtype)
    config = configuration(TILES["update_8bit"], (M, N, K), weight, dtype)
    states = first, first_max, *((second, second_max) if rule.rule == "adam" else (None, None))
    launch(
        fused_update_8bit_kernel,
        block_count(N, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"]),
        weight.device,
        weight,
        *states,
        gradient,
        grad.contiguous(),
        x.contiguous(),
        *_numbers(rule),
        M,
        N,
        K,
        *_strides(weight),
        *_strides(gradient),
        NESTEROV=bool(rule.nesterov),
        MANHATTAN=rule.rule == "manhattan",
        PRECISION=precision(dtype),
        **config,
    )
