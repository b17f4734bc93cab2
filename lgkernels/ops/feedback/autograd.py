"""autograd entries of the family feedback: the library's forward, and a backward that reads F where W would stand.

    dX = grad @ F,   dW = grad^T x,   db = sum grad          (a convolution's alike)

F is made in the backward and only where a dX is asked for: never for the first layer, in evaluation or under
no_grad. Saved are x, the weight (signs) or its packed signs, and the 24-byte random state. That state is checked by
autograd as every saved tensor is: advancing it between a forward and its backward raises.

The bias gradient and the activation's derivative have passes of their own: on two Zen 4 cores db takes 0.1 % of a
layer's step and a ReLU's derivative 0.1 % for 9216 -> 4096 with M = 128, 0.9 % and 1.3 % for 768 -> 3072 with M = 512,
so fusing them does not pay for a linear layer. Of a block of DFA, where batch norm and a pool come with them, they are
in the pass of direct.py.
"""

import math

import torch
import torch.nn.functional as F

from ...core import dispatch
from ...core.autograd import apply, first_order_only, refuse_transforms, settled_dtypes
from ...core.ops import autocasts, class_indices
from . import op  # noqa: F401  registers the ops
from .options import Formula

_ops = torch.ops.lgkernels


def _mean_abs(weight):
    """Row by row: torch adds up a norm one element after the other, and 10^7 of them are lost in float32's digits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = torch.linalg.vector_norm(weight, 1, dim=tuple(range(1, weight.dim())), dtype=dtype)
    return rows.sum() / max(weight.numel(), 1)


def _save(ctx, x, packed, magnitude, state, factor, formula, weight):
    """What the backward reads."""
    signs = weight if formula.signs == "weight" else packed
    down = (signs, magnitude, state, factor) if ctx.needs_input_grad[0] else (None,) * 4
    ctx.save_for_backward(x, *down)
    ctx.formula, ctx.weight_dtype = formula, weight.dtype


def _formula_arguments(formula, signs, magnitude, state):
    scale = 1.0 if formula.scale == "mean_abs" else formula.scale
    return (signs, magnitude, state, formula.law, formula.law_scale, formula.low, scale, formula.sign_plus)


def _rows(tensor):
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # -1 is ambiguous where a size is 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, packed, magnitude, state, factor, formula, dtype, impl):
        _save(ctx, x if ctx.needs_input_grad[1] else None, packed, magnitude, state, factor, formula, weight)
        ctx.columns, ctx.impl = x.shape[1], impl
        return F.linear(x, weight if dtype is None else weight.to(dtype), bias)

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        x, signs, magnitude, state, factor = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs[0] and signs is None and magnitude is not None and factor is None and ctx.formula.scale == 1.0:
            grad_x = grad @ magnitude.to(grad.dtype)  # FA with a given tensor: nothing to make
        elif needs[0]:
            grad_x = _ops.feedback_product(
                grad if factor is None else grad * factor,
                ctx.columns,
                *_formula_arguments(ctx.formula, signs, magnitude, state),
                ctx.impl,
            )
        if needs[2]:
            grad_bias = grad.sum(0)
        if needs[1]:
            grad_weight = (grad.t() @ x).to(ctx.weight_dtype)
        inputs = (x, grad, signs)
        return (
            first_order_only("feedback_linear", grad_x, *inputs),
            first_order_only("feedback_linear", grad_weight, *inputs),
            first_order_only("feedback_linear", grad_bias, grad),
            *(None,) * 7,
        )


def _channels_last(weight):
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _conv_feedback(shape, signs, magnitude, state, factor, formula, dtype, device, impl):
    """F (O, C / groups, kh, kw) in `dtype`, in the memory format of the weight that it stands for."""
    arguments = _formula_arguments(formula, signs, magnitude, state)[1:]
    columns = shape[1] * shape[2] * shape[3]
    if signs is None and magnitude is not None:  # FA with a given tensor: nothing to make
        return magnitude.to(dtype)
    by_memory = signs is not None and signs.dim() == 4 and _channels_last(signs)
    if by_memory and magnitude is None and state is None:  # no value depends on its place: take W as it lies
        lying = signs.permute(0, 2, 3, 1)
        feedback = _ops.feedback_matrix(shape[0], columns, lying.flatten(1), *arguments, dtype, device, impl)
        feedback = feedback.view(lying.shape).permute(0, 3, 1, 2)
    else:
        signs = signs.flatten(1) if signs is not None and signs.dim() == 4 else signs
        arguments = (None if magnitude is None else magnitude.flatten(1), *arguments[1:])
        feedback = _ops.feedback_matrix(shape[0], columns, signs, *arguments, dtype, device, impl).view(shape)
        if by_memory:
            feedback = feedback.contiguous(memory_format=torch.channels_last)
    return feedback if factor is None else feedback.mul_(factor)


def _few_positions(positions, outputs):
    """So few that a CPU had better make F in registers, multiply, and fold the columns back, than write F for the
    library's convolution; they also take less memory than F. Signs alone, on two Zen 4 cores, 3 x 3 kernels: with 512
    channels and 98 positions 2.3 against 3.9 ms, 392 positions 8.3 against 9.7; 256 channels and 392 positions 2.8
    against 2.9; 128 channels and 1568 positions 4.2 against 2.8. Random magnitudes gain nothing,
    nor does a processor without AVX-512 (an EPYC of family 23, 512 channels, the whole layer: 27.9 against 28.1 ms with
    98 positions, 92.8 against 88.8 with 392)."""
    return outputs >= 256 and positions <= outputs


def _multiplies(grad, signs, magnitude, state, groups, impl):
    """True where a convolution's dX goes by feedback_product."""
    if (
        torch.compiler.is_compiling()
        or grad.device.type != "cpu"
        or grad.dtype != torch.float32
        or grad.dim() != 4
        or groups != 1
        or grad.numel() == 0
    ):
        return False
    if signs is None or not signs.is_contiguous():
        return False  # another memory format would have to be copied
    outputs = grad.shape[1]
    return (
        magnitude is None
        and state is None
        and _few_positions(grad.numel() // outputs, outputs)
        and getattr(dispatch.backend("feedback_product", impl, grad.device, grad.dtype), "SIGNS_BY_LOOK_UP", False)
    )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, packed, magnitude, state, factor, formula, dtype, geometry, impl):
        _save(ctx, x, packed, magnitude, state, factor, formula, weight)
        ctx.shape, ctx.strides, ctx.geometry, ctx.impl = weight.shape, weight.stride(), geometry, impl
        return torch.conv2d(x, weight if dtype is None else weight.to(dtype), bias, *geometry)

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        x, signs, magnitude, state, factor = ctx.saved_tensors
        needs = ctx.needs_input_grad
        stride, padding, dilation, groups = ctx.geometry
        grad_x = grad_weight = grad_bias = None

        def gradients(weight, mask):
            return torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                [ctx.shape[0]] if mask[2] else None,
                stride,
                padding,
                dilation,
                False,
                (0, 0),
                groups,
                mask,
            )

        if needs[0] and _multiplies(grad, signs, magnitude, state, groups, ctx.impl):
            rows = grad.permute(0, 2, 3, 1).reshape(-1, ctx.shape[0])
            columns = _ops.feedback_product(
                rows if factor is None else rows * factor,
                math.prod(ctx.shape[1:]),
                *_formula_arguments(ctx.formula, signs.flatten(1), None, None),
                ctx.impl,
            )
            grad_x = _ops.feedback_fold(
                columns, x.shape, ctx.shape[2:], grad.shape[2:], stride, padding, dilation, ctx.impl
            )
            del rows, columns
        elif needs[0]:  # first and alone: F is gone, and its memory warm, when the weight's gradient is allocated
            feedback = _conv_feedback(
                ctx.shape, signs, magnitude, state, factor, ctx.formula, grad.dtype, grad.device, ctx.impl
            )
            grad_x = gradients(feedback, [True, False, False])[0]
            del feedback
        if needs[1] or needs[2]:  # of the weight shape and strides are read, no value
            usable = signs is not None and signs.dim() == 4 and signs.dtype == grad.dtype
            weight = signs if usable else grad.new_empty_strided(ctx.shape, ctx.strides)
            _, grad_weight, grad_bias = gradients(weight, [False, needs[1], needs[2]])
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        inputs = (x, grad, signs)
        return (
            first_order_only("feedback_conv2d", grad_x, *inputs),
            first_order_only("feedback_conv2d", grad_weight, *inputs),
            first_order_only("feedback_conv2d", grad_bias, grad),
            *(None,) * 8,
        )


def _cast(tensor, dtype):
    return tensor if dtype is None or tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _prepare(x, weight, bias, packed, formula, impl):
    """`(x, bias, packed, factor, dtype)`: autocast as torch's own layer does; and, where x asks for a gradient, the
    weight's packed signs and the factor that scale="mean_abs" stands for."""
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
    x, bias = _cast(x, dtype), _cast(bias, dtype)
    factor = None
    if impl != "auto" and not torch.compiler.is_compiling():  # an error now, not in the backward
        dispatch.choose("feedback_product", impl, x.device, x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        if formula.signs == "packed" and packed is None:
            packed = _ops.feedback_pack_signs(weight.detach().flatten(1), impl)
        if formula.scale == "mean_abs":
            factor = _mean_abs(weight.detach())
    return x, bias, packed, factor, None if weight.dtype == torch.float64 else dtype


def linear(x, weight, bias, formula: Formula, *, packed=None, magnitude=None, state=None, impl="auto"):
    """x (..., K), weight (N, K); `packed` int32 (N, ceil(K / 32)) or None, to be made of the weight;
    `magnitude` (N, K) and `state` are the tensors of F's value, None both where it is 1."""
    x, bias, packed, factor, dtype = _prepare(x, weight, bias, packed, formula, impl)
    # Reshaped out here: the output of a Function that is a view must not be written to, as an activation in place does.
    rows = x if x.dim() == 2 else _rows(x)
    name = "feedback_linear" if formula.signs == "none" else "sign_symmetric_linear"
    y = apply(_Linear, name, rows, weight, bias, packed, magnitude, state, factor, formula, dtype, impl)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def conv2d(
    x, weight, bias, stride, padding, dilation, groups, formula, *, packed=None, magnitude=None, state=None, impl="auto"
):
    """x (B, C, H, W), weight (O, C / groups, kh, kw); `magnitude` like the weight; pairs of integers."""
    x, bias, packed, factor, dtype = _prepare(x, weight, bias, packed, formula, impl)
    return apply(
        _Conv2d,
        "feedback_conv2d" if formula.signs == "none" else "sign_symmetric_conv2d",
        x,
        weight,
        bias,
        packed,
        magnitude,
        state,
        factor,
        formula,
        dtype,
        (stride, padding, dilation, groups),
        impl,
    )


@torch.no_grad()
def weight_rows(weight, formula, start, stop, *, packed=None, state=None, impl="auto"):
    """Rows [start, stop) of F as a matrix (out, rest), float32 or float64 as the weight: no more of F is made."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    columns = math.prod(weight.shape[1:])
    value = None
    if state is not None:
        index = torch.arange(start, stop, device=weight.device)
        value = _ops.feedback_rows(index, columns, state, formula.law, formula.law_scale, formula.low, 1.0, dtype, impl)
    signs = packed if packed is not None else None if formula.signs == "none" else weight
    signs = None if signs is None else signs[start:stop].flatten(1)
    feedback = _ops.feedback_matrix(
        stop - start, columns, *_formula_arguments(formula, signs, value, None), dtype, weight.device, impl
    )
    return feedback.mul_(_mean_abs(weight)) if formula.scale == "mean_abs" else feedback


@torch.no_grad()
def project(name, error, columns, matrix, law, state, impl):
    """error (B, C) @ (C, columns): DFA's signal, for the public function `name`."""
    refuse_transforms(name, vmap=False)
    return _ops.feedback_product(error, columns, None, matrix, state, *law, 1.0, False, impl)


@torch.no_grad()
def rows(index, columns, matrix, law, state, impl):
    """(B, columns): the rows `index` (B,) of the feedback, DRTP's signal."""
    refuse_transforms("target_projection", vmap=False)
    index = class_indices("target", index, 2**32 if matrix is None else matrix.shape[0])
    if matrix is not None:
        return matrix[index]
    return _ops.feedback_rows(index, columns, state, *law, 1.0, torch.float32, impl)
