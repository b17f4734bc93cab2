"""The fused step in Triton: `update_` of reference.py, same arguments, shapes and dtypes (no float64).

Everything is computed in float32 and rounded once on store, half factors excepted: they are multiplied as they are.
Sums have a fixed order. CPU tensors work under TRITON_INTERPRET=1.
"""

import torch

from ..common.dot import precision
from ..common.launch import block_count, configuration, launch
from .tiles import TILES
from .torch import update_8bit_  # noqa: F401  no kernel of its own yet
from .triton_step import fused_update_kernel


def _strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()


def update_(weight, first, second, gradient, grad, x, rule):
    (N, K), M = weight.shape, grad.shape[0]
    dtype = torch.promote_types(grad.dtype, x.dtype)
    config = configuration(TILES["update"], (M, N, K), weight, dtype)
    programs = block_count(N, config["BLOCK_N"]) * block_count(K, config["BLOCK_K"])
    matrices = weight, first, second if rule.rule == "adam" else None, gradient
    numbers = (rule.lr, rule.momentum, rule.fresh, rule.weight_decay, rule.keep)
    launch(
        fused_update_kernel,
        programs,
        weight.device,
        *matrices,
        grad.contiguous(),
        x.contiguous(),
        *map(float, numbers),
        *map(float, (rule.beta2, 1.0 - rule.beta2, rule.eps, rule.root, rule.grad_scale, rule.clip_value)),
        M,
        N,
        K,
        *(stride for matrix in matrices for stride in _strides(matrix)),
        NESTEROV=bool(rule.nesterov),
        MANHATTAN=rule.rule == "manhattan",
        PRECISION=precision(dtype),
        **config,
    )
