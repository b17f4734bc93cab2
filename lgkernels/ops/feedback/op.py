"""Registered ops of the family feedback: schema, shapes (fake), and the call of the chosen backend.

The random state goes in as its device tensor (seed, stream, step): no recompilation between layers of different
seeds, and a replayed CUDA graph sees the step of the moment.
"""

import contextlib

import torch

from ...core import dispatch

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")

for _name in ("feedback_product", "feedback_matrix", "feedback_rows", "feedback_pack_signs", "feedback_update_"):
    dispatch.register(
        _name,
        **{
            name: f"lgkernels.ops.feedback.{module}"
            for name, module in (("reference", "reference"), ("cpu", "cpu"), ("triton", "triton"), ("cuda", "cuda"))
        },
    )

for _name in ("direct_forward", "direct_backward_", "feedback_fold"):
    dispatch.register(_name, **{name: f"lgkernels.ops.feedback.{name}" for name in ("reference", "cpu")})


def autocasts(device):
    """Whether autocast is on; the meta device, where memory is planned, has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device):
    """Inside an op the dtypes are settled: an ambient autocast must not touch them."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _random(state, law, law_scale, low):
    return None if state is None else (state, law, law_scale, low)


# F = scale * value | scale * |value| * sign(weight); value = 1 | magnitude | law; see reference.py
_FORMULA = (
    "Tensor? weight, Tensor? magnitude, Tensor? state, str law, float law_scale, float? low, float scale, "
    "bool sign_plus"
)

LIBRARY.define(f"feedback_product(Tensor grad, SymInt columns, {_FORMULA}, str impl) -> Tensor")
LIBRARY.define(
    f"feedback_matrix(SymInt rows, SymInt columns, {_FORMULA}, ScalarType dtype, Device device, str impl) -> Tensor"
)
LIBRARY.define(
    "feedback_rows(Tensor index, SymInt columns, Tensor state, str law, float law_scale, float? low, "
    "float scale, ScalarType dtype, str impl) -> Tensor"
)
LIBRARY.define(
    "feedback_fold(Tensor columns, SymInt[] shape, SymInt[] kernel, SymInt[] positions, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, str impl) -> Tensor"
)
LIBRARY.define("feedback_pack_signs(Tensor weight, str impl) -> Tensor")
LIBRARY.define(
    "feedback_update_(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor grad, Tensor x, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool manhattan, "
    "float grad_scale, str impl) -> ()"
)

LIBRARY.define(
    "direct_forward(Tensor z, Tensor gamma, Tensor beta, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps, float slope, bool max_pool, str impl) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "direct_backward_(Tensor(a!) z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? delta, "
    "Tensor? error, Tensor? state, str law, float law_scale, float? low, float slope, bool max_pool, "
    "str impl) -> (Tensor, Tensor)"
)


def _product(grad, columns, weight, magnitude, state, law, law_scale, low, scale, sign_plus, impl):
    if weight is None and magnitude is not None:  # FA with a given matrix: nothing to make
        with without_autocast(grad.device):
            product = grad @ magnitude.to(grad.dtype)
            return product if scale == 1.0 else product.mul_(scale)
    kernels = dispatch.backend("feedback_product", impl, grad.device, grad.dtype)
    with without_autocast(grad.device):
        return kernels.product(grad, columns, weight, magnitude, _random(state, law, law_scale, low), scale, sign_plus)


def _product_fake(grad, columns, weight, magnitude, state, law, law_scale, low, scale, sign_plus, impl):
    return grad.new_empty((grad.shape[0], columns))


def _matrix(rows, columns, weight, magnitude, state, law, law_scale, low, scale, sign_plus, dtype, device, impl):
    kernels = dispatch.backend("feedback_matrix", impl, device, dtype)
    with without_autocast(device):
        return kernels.matrix(
            (rows, columns), weight, magnitude, _random(state, law, law_scale, low), scale, sign_plus, dtype, device
        )


def _matrix_fake(rows, columns, weight, magnitude, state, law, law_scale, low, scale, sign_plus, dtype, device, impl):
    return torch.empty((rows, columns), dtype=dtype, device=device)


def _rows(index, columns, state, law, law_scale, low, scale, dtype, impl):
    kernels = dispatch.backend("feedback_rows", impl, index.device, dtype)
    return kernels.rows(index, columns, _random(state, law, law_scale, low), scale, dtype)


def _rows_fake(index, columns, state, law, law_scale, low, scale, dtype, impl):
    return torch.empty((index.shape[0], columns), dtype=dtype, device=index.device)


def _fold(columns, shape, kernel, positions, stride, padding, dilation, impl):
    kernels = dispatch.backend("feedback_fold", impl, columns.device, columns.dtype)
    return kernels.fold(columns, shape, kernel, positions, stride, padding, dilation)


def _fold_fake(columns, shape, kernel, positions, stride, padding, dilation, impl):
    return columns.new_empty(shape)


def _pack_signs(weight, impl):
    return dispatch.backend("feedback_pack_signs", impl, weight.device, weight.dtype).pack_signs(weight)


def _pack_signs_fake(weight, impl):
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 31) // 32), dtype=torch.int32)


def _update(
    weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale, impl
):
    kernels = dispatch.backend("feedback_update_", impl, weight.device, weight.dtype)
    with without_autocast(weight.device):
        kernels.sgd_update_(
            weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale
        )


def _update_fake(
    weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale, impl
):
    return None


def _direct_forward(z, gamma, beta, running_mean, running_var, momentum, eps, slope, max_pool, impl):
    kernels = dispatch.backend("direct_forward", impl, z.device, z.dtype)
    return kernels.direct_forward(z, gamma, beta, running_mean, running_var, momentum, eps, slope, max_pool)


def _direct_forward_fake(z, gamma, beta, running_mean, running_var, momentum, eps, slope, max_pool, impl):
    height, width = (z.shape[2] // 2, z.shape[3] // 2) if max_pool else z.shape[2:]
    return z.new_empty((*z.shape[:2], height, width)), torch.empty_like(gamma), torch.empty_like(gamma)


def _direct_backward(z, mean, rstd, gamma, beta, delta, error, state, law, law_scale, low, slope, max_pool, impl):
    kernels = dispatch.backend("direct_backward_", impl, z.device, z.dtype)
    random = _random(state, law, law_scale, low)
    return kernels.direct_backward_(z, mean, rstd, gamma, beta, delta, error, random, slope, max_pool)


def _direct_backward_fake(z, mean, rstd, gamma, beta, delta, error, state, law, law_scale, low, slope, max_pool, impl):
    return torch.empty_like(gamma), torch.empty_like(gamma)


for _name, _implementation, _fake in (
    ("feedback_product", _product, _product_fake),
    ("feedback_matrix", _matrix, _matrix_fake),
    ("feedback_rows", _rows, _rows_fake),
    ("feedback_fold", _fold, _fold_fake),
    ("feedback_pack_signs", _pack_signs, _pack_signs_fake),
    ("feedback_update_", _update, _update_fake),
    ("direct_forward", _direct_forward, _direct_forward_fake),
    ("direct_backward_", _direct_backward, _direct_backward_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgkernels::{_name}", _fake, lib=LIBRARY)
