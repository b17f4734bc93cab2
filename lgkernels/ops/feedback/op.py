"""Registered ops of the family feedback: schema, shapes (fake), and the call of the chosen backend.

The random state goes in as its device tensor (seed, stream, step): no recompilation between layers of different
seeds, and a replayed CUDA graph sees the step of the moment.
"""
import contextlib

import torch

from ...core import dispatch

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")

for _name in ("feedback_product", "feedback_matrix", "feedback_rows", "feedback_pack_signs", "feedback_update_"):
    dispatch.register(_name, **{name: f"lgkernels.ops.feedback.{module}" for name, module in (
        ("reference", "reference"), ("cpu", "cpu"), ("triton", "triton_kernels"), ("cuda", "cuda"))})


def without_autocast(device):
    """Inside an op the dtypes are settled: an ambient autocast must not touch them."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _random(state, law, law_scale, low):
    return None if state is None else (state, law, law_scale, low)


# F = scale * value | scale * |value| * sign(weight); value = 1 | magnitude | law; see reference.py
_FORMULA = ("Tensor? weight, Tensor? magnitude, Tensor? state, str law, float law_scale, float? low, float scale, "
            "bool sign_plus")

LIBRARY.define(f"feedback_product(Tensor grad, SymInt columns, {_FORMULA}, str impl) -> Tensor")
LIBRARY.define(f"feedback_matrix(SymInt rows, SymInt columns, {_FORMULA}, ScalarType dtype, Device device, str impl) "
               "-> Tensor")
LIBRARY.define("feedback_rows(Tensor index, SymInt columns, Tensor state, str law, float law_scale, float? low, "
               "float scale, ScalarType dtype, str impl) -> Tensor")
LIBRARY.define("feedback_pack_signs(Tensor weight, str impl) -> Tensor")
LIBRARY.define("feedback_update_(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor grad, Tensor x, float lr, "
               "float momentum, float dampening, float weight_decay, bool nesterov, bool manhattan, "
               "float grad_scale, str impl) -> ()")


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
        return kernels.matrix((rows, columns), weight, magnitude, _random(state, law, law_scale, low), scale,
                              sign_plus, dtype, device)


def _matrix_fake(rows, columns, weight, magnitude, state, law, law_scale, low, scale, sign_plus, dtype, device, impl):
    return torch.empty((rows, columns), dtype=dtype, device=device)


def _rows(index, columns, state, law, law_scale, low, scale, dtype, impl):
    kernels = dispatch.backend("feedback_rows", impl, index.device, dtype)
    return kernels.rows(index, columns, _random(state, law, law_scale, low), scale, dtype)


def _rows_fake(index, columns, state, law, law_scale, low, scale, dtype, impl):
    return torch.empty((index.shape[0], columns), dtype=dtype, device=index.device)


def _pack_signs(weight, impl):
    return dispatch.backend("feedback_pack_signs", impl, weight.device, weight.dtype).pack_signs(weight)


def _pack_signs_fake(weight, impl):
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 31) // 32), dtype=torch.int32)


def _update(weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale,
            impl):
    kernels = dispatch.backend("feedback_update_", impl, weight.device, weight.dtype)
    with without_autocast(weight.device):
        kernels.sgd_update_(weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov,
                            manhattan, grad_scale)


def _update_fake(weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan,
                 grad_scale, impl):
    return None


for _name, _implementation, _fake in (
        ("feedback_product", _product, _product_fake), ("feedback_matrix", _matrix, _matrix_fake),
        ("feedback_rows", _rows, _rows_fake), ("feedback_pack_signs", _pack_signs, _pack_signs_fake),
        ("feedback_update_", _update, _update_fake)):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgkernels::{_name}", _fake, lib=LIBRARY)
