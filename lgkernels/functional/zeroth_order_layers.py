"""Zeroth-order optimisation: convolutions, embeddings and normalisations at perturbed weights."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..core.autograd import refuse_transforms
from ..core.ops import wide_dtype, without_autocast
from ..random import RandomFeedback
from .zeroth_order import _coefficients, _noise, _ops

__all__ = [
    "perturbed_conv2d",
    "perturbed_embedding",
    "perturbed_group_norm",
    "perturbed_layer_norm",
    "perturbed_rms_norm",
]


def perturbed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same", "valid"] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    noise: Tensor | RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    impl: str = "auto",
) -> Tensor:
    r"""Convolution whose weight is perturbed, for each member of a batch by its own multiple of the noise.

    .. math:: y_m = x_m * (W + c_m Z_m) + b

    W is never written. Perturbed weights are there four megabytes at a time, in which the library convolves; half
    operands on a GPU are convolved with W, and then with Z.

    Args:
        x (Tensor): (M, B, in, H, W), or (M, in, H, W) for one sample a member. weight (Tensor): (out, in / groups, kh,
            kw). bias (Tensor, optional): (out,). Dtypes as of :func:`perturbed_linear`.
        stride, padding, dilation (int or pair), groups (int): as torch's, ``padding="same"`` and ``"valid"`` too.
        noise: Z, a tensor like weight; or one :class:`lgkernels.random.RandomFeedback`, or a list of M, whose matrix
            (out, in / groups * kh * kw) is Z.
        coefficients (float, or M of them in a sequence or a tensor): c.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``.

    Returns:
        Tensor: M results of torch's ``conv2d``, in x's dtype, or autocast's. A perturbation that a half weight could
        not hold still counts. There is no gradient.

    Raises: ValueError, TypeError naming the argument. NotImplementedError inside of torch.func transforms.

    Source: as :func:`perturbed_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight, noise = torch.ones(2, 1, 1, 3, 3), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> LF.perturbed_conv2d(x, weight, noise=noise, coefficients=[0.5, -0.5])[:, 0, 0, 0]
        tensor([[ 2.,  2.],
                [-2., -2.]])
    """
    refuse_transforms("perturbed_conv2d")
    checks.floating("x", x)
    checks.dims("x", x, (4, 5), "(M, B, C, H, W) or (M, C, H, W), members first")
    members, flat = len(x), x.flatten(0, 1) if x.dim() == 5 else x
    flat, geometry, _ = checks.conv2d(flat, weight, bias, stride, padding, dilation, groups)
    values, formulas = _noise(noise, weight, members)
    checks.impl(impl)
    if checks.autocasts(x.device) and x.dtype != torch.float64:
        flat = flat.to(torch.get_autocast_dtype(x.device.type))
    factors = _coefficients(coefficients, members, flat)
    own = flat.view(*x.shape[:-3], *flat.shape[1:]) if x.dim() == 5 else flat.unsqueeze(1)
    with torch.no_grad():
        y = _ops.perturbed_conv2d(own, weight, bias, factors, values, *formulas, *geometry, impl)
    return y if x.dim() == 5 else y.squeeze(1)


def perturbed_embedding(
    x: Tensor,
    weight: Tensor,
    *,
    noise: Tensor | RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    impl: str = "auto",
) -> Tensor:
    r"""Embedding whose weight is perturbed, for each member of a batch by its own multiple of the noise.

    .. math:: y_{mr} = W_i + c_m Z_{mi}, \quad i = x_{mr}

    Of the noise no more than the rows that are looked up is made.

    Args:
        x (Tensor): (M, ...) integers, M members. weight (Tensor): (num_embeddings, embedding_dim); float32, bfloat16,
            float16, and float64 in the reference.
        noise, coefficients, impl: as :func:`perturbed_linear`.

    Returns:
        Tensor: (M, ..., embedding_dim) in weight's dtype, computed in float32 and rounded once. There is no gradient.

    Raises: ValueError, TypeError naming the argument; a row that is not there is refused on CPUs, and gives nan on a
    GPU. NotImplementedError inside of torch.func transforms.

    Source: as :func:`perturbed_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weight, noise = torch.zeros(4, 2), torch.tensor([[1.0, 2.0]] * 4)
        >>> LF.perturbed_embedding(torch.tensor([[3], [0]]), weight, noise=noise, coefficients=[0.5, -0.5]).tolist()
        [[[0.5, 1.0]], [[-0.5, -1.0]]]
    """
    refuse_transforms("perturbed_embedding")
    checks.integer("x", x, "row numbers of weight are expected")
    if not x.dim():
        raise ValueError("x must be (M, ...), members first, got shape ()")
    checks.floating("weight", weight)
    checks.dims("weight", weight, (2,), "(num_embeddings, embedding_dim)")
    checks.same_device(weight=weight, x=x)
    values, formulas = _noise(noise, weight, len(x))
    checks.impl(impl)
    factors, rows = _coefficients(coefficients, len(x), weight), x.shape[1:].numel()
    with torch.no_grad():
        y = _ops.perturbed_rows(weight, x.reshape(len(x), rows).long(), factors, values, *formulas, False, impl)
    return y.view(*x.shape, weight.shape[1])


def perturbed_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    noise: Tensor | RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    impl: str = "auto",
) -> Tensor:
    r"""Layer normalisation whose weight is perturbed, for each member of a batch by its own multiple of the noise.

    .. math:: y_m = \mathrm{normalize}(x_m)\, (w + c_m z_m) + b

    Args:
        x (Tensor): (M, ..., *normalized_shape), M members; float32, bfloat16, float16, float64.
        normalized_shape (sequence of int): as torch's. weight (Tensor), bias (Tensor, optional): of that shape.
        eps (float): as torch's.
        noise: z, a tensor like weight; or one :class:`lgkernels.random.RandomFeedback`, or a list of M, whose matrix
            (first size of weight, the others) is z.
        coefficients, impl: as :func:`perturbed_linear`.

    Returns:
        Tensor: like x, computed in float32 (float64 where x is), rounded once. There is no gradient.

    Raises: ValueError, TypeError naming the argument. NotImplementedError inside of torch.func transforms.

    Source: as :func:`perturbed_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, one = torch.tensor([[-1.0, 1.0]] * 2), torch.ones(2)
        >>> LF.perturbed_layer_norm(x, (2,), one, eps=1e-12, noise=one, coefficients=[1.0, -1.0])
        tensor([[-2.,  2.],
                [ 0.,  0.]])
    """
    shape = _last_sizes(normalized_shape)
    return _normalised(
        "perturbed_layer_norm",
        (x, weight, bias),
        shape,
        (noise, coefficients, impl),
        _epsilon(eps),
        lambda own, w, b, e: F.layer_norm(own, shape, w, b, e),
    )


def perturbed_rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    eps: float | None = None,
    *,
    noise: Tensor | RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    impl: str = "auto",
) -> Tensor:
    r"""Root-mean-square normalisation whose weight is perturbed; all else as :func:`perturbed_layer_norm`.

    .. math:: y_m = \frac{x_m}{\mathrm{rms}(x_m)}\, (w + c_m z_m)

    Args:
        x (Tensor): (M, ..., *normalized_shape), M members. normalized_shape (sequence of int), weight (Tensor): as
            torch's.
        eps (float, optional): as torch's; None: the machine's epsilon of x's dtype.
        noise, coefficients, impl: as :func:`perturbed_layer_norm`.

    Returns:
        Tensor: as :func:`perturbed_layer_norm`.

    Raises: ValueError, TypeError naming the argument. NotImplementedError inside of torch.func transforms.

    Source: as :func:`perturbed_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, one = torch.tensor([[-3.0, 3.0]] * 2), torch.ones(2)
        >>> LF.perturbed_rms_norm(x, (2,), one, noise=one, coefficients=[1.0, 0.0])
        tensor([[-2.,  2.],
                [-1.,  1.]])
    """
    shape = _last_sizes(normalized_shape)
    checks.floating("x", x)
    own_eps = torch.finfo(x.dtype).eps if eps is None else _epsilon(eps)
    return _normalised(
        "perturbed_rms_norm",
        (x, weight, None),
        shape,
        (noise, coefficients, impl),
        own_eps,
        lambda own, w, _, e: F.rms_norm(own, shape, w, e),
    )


def perturbed_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    noise: Tensor | RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    impl: str = "auto",
) -> Tensor:
    r"""Group normalisation whose weight is perturbed; all else as :func:`perturbed_layer_norm`.

    Args:
        x (Tensor): (M, B, C, ...), M members. num_groups (int): as torch's; divides C.
        weight (Tensor), bias (Tensor, optional): (C,). eps (float): as torch's.
        noise, coefficients, impl: as :func:`perturbed_layer_norm`.

    Returns:
        Tensor: as :func:`perturbed_layer_norm`.

    Raises: ValueError, TypeError naming the argument. NotImplementedError inside of torch.func transforms.

    Source: as :func:`perturbed_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, one = torch.tensor([[[-1.0, 1.0]]] * 2), torch.ones(2)
        >>> LF.perturbed_group_norm(x, 1, one, eps=1e-12, noise=one, coefficients=[1.0, -1.0]).flatten()
        tensor([-2.,  2.,  0.,  0.])
    """
    groups = checks.positive_integer("num_groups", num_groups)
    checks.floating("x", x)
    if x.dim() < 3:
        raise ValueError(f"x must be (M, B, C, ...), members first, got shape {checks.shape_of(x)}")
    if x.shape[2] % groups:
        raise ValueError(f"num_groups must divide the {x.shape[2]} channels of x, got {groups}")
    return _normalised(
        "perturbed_group_norm",
        (x, weight, bias),
        None,
        (noise, coefficients, impl),
        _epsilon(eps),
        lambda own, w, b, e: F.group_norm(own, groups, w, b, e),
    )


def _last_sizes(value: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"normalized_shape must be a tuple or list of the last sizes of x, got {type(value).__name__}")
    return checks.sizes("normalized_shape", value, "the last sizes of x")


def _epsilon(value: float) -> float:
    number = checks.number("eps", value)
    if number < 0:
        raise ValueError(f"eps must not be negative, got {number}")
    return number


def _normalised(
    name: str, tensors: tuple, shape: tuple[int, ...] | None, given: tuple, eps: float, normalise: Callable[..., Tensor]
) -> Tensor:
    """normalise(x[m], w + c_m z_m, b, eps) of all members; `shape` of the weight, None: channels of x."""
    refuse_transforms(name)
    (x, weight, bias), (noise, coefficients, impl) = tensors, given
    checks.floating("x", x)
    checks.floating("weight", weight)
    if shape is None:
        shape = x.shape[2:3]
    elif x.dim() <= len(shape) or x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape must be the last sizes of x, members first, got {shape} for shape {checks.shape_of(x)}"
        )
    checks.shape("weight", weight, shape, "that is normalised")
    checks.precision("weight", weight, "x", x)
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, shape, "that is normalised")
        checks.precision("bias", bias, "x", x)
    checks.same_device(weight=weight, x=x, bias=bias)
    values, formulas = _noise(noise, weight, len(x))
    checks.impl(impl)
    factors, wide = _coefficients(coefficients, len(x), weight), wide_dtype(x.dtype)
    matrix = weight.reshape(len(weight), math.prod(shape[1:]))
    values = None if values is None else values.reshape(matrix.shape)
    with torch.no_grad(), without_autocast(x.device):
        w = _ops.perturbed_rows(matrix, None, factors, values, *formulas, True, impl)
        b = None if bias is None else bias.detach().to(wide)
        out = torch.empty_like(x)
        for m in range(len(x)):
            out[m] = normalise(x[m].to(wide), w[m].view(weight.shape), b, eps)
    return out
