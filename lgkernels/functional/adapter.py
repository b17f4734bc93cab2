"""Adapters: check the arguments, then call the family's autograd entry."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ..core import checks
from ..ops.adapter import autograd as _adapter

__all__ = ["lokr_conv2d", "lokr_linear", "lora_linear"]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, a: Tensor, b: Tensor, scale: float, impl: str = "auto"
) -> Tensor:
    r"""Linear layer with a low-rank adapter: :math:`y = x W^T + \beta + s\,(x a^T)\, b^T`.

    Args:
        x (Tensor): (..., in). weight (Tensor): (out, in). bias (Tensor, optional): (out,). All three of one dtype
            (outside of autocast), as for torch's linear.
        a (Tensor): (r, in). b (Tensor): (out, r). Cast to x's dtype: float32 factors of a half-precision layer will
            do; float64 goes with float64 alone.
        scale (float): s, alpha / r as a rule.
        impl (str): ``"auto"`` or ``"reference"``: plain torch is its only backend.

    Returns:
        Tensor: (..., out) in x's dtype, or autocast's. First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.lora_linear(torch.ones(1, 2), torch.eye(2), a=torch.ones(1, 2), b=torch.ones(2, 1), scale=0.5)
        tensor([[2., 2.]])
    """
    checks.linear(x, weight, bias)
    out, width = weight.shape
    scale = checks.number("scale", scale)
    checks.impl(impl)
    checks.floating("a", a)
    if a.dim() != 2 or a.shape[1] != width:
        raise ValueError(f"a must be (r, {width}) (the columns of weight), got shape {checks.shape_of(a)}")
    checks.floating("b", b)
    checks.shape("b", b, (out, a.shape[0]), "the rows of weight, and of a")
    checks.same_device(weight=weight, a=a, b=b)
    checks.precision("a", a, "weight", weight)
    checks.precision("b", b, "weight", weight)
    return _adapter.lora_linear(x, weight, bias, a, b, scale, impl)


def lokr_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    w1: Tensor | Sequence[Tensor],
    w2: Tensor | Sequence[Tensor],
    scale: float,
    impl: str = "auto",
) -> Tensor:
    r"""Linear layer with a Kronecker adapter: :math:`y = x (W + s\, w_1 \otimes w_2)^T + \beta`.

    Factorised, forward and backward: neither the Kronecker product nor its gradient is built.

    Args:
        x (Tensor): (..., in). weight (Tensor): (out, in). bias (Tensor, optional): (out,). Dtypes as in
            :func:`lora_linear`, whose factors are w1 and w2 here.
        w1, w2 (Tensor, or pair of Tensors): (out1, in1) and (out2, in2) with out1 * out2 = out, in1 * in2 = in; a
            pair ``(a, b)`` stands for ``a @ b``.
        scale (float): s; alpha / rank as a rule, 1 if both are full matrices.
        impl (str): ``"auto"`` or ``"reference"``: plain torch is its only backend.

    Returns:
        Tensor: (..., out) in x's dtype, or autocast's. First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: LyCORIS (Yeh et al., 2023); the scale is that of its plain forward.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.lokr_linear(torch.ones(1, 4), torch.zeros(4, 4), w1=torch.eye(2), w2=torch.ones(2, 2), scale=0.5)
        tensor([[1., 1., 1., 1.]])
    """
    checks.linear(x, weight, bias)
    scale = checks.number("scale", scale)
    checks.impl(impl)
    w1, a, b = _factors(w1, w2, weight)
    return _adapter.lokr_linear(x, weight, bias, w1, a, b, scale, impl)


def lokr_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same", "valid"] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    w1: Tensor | Sequence[Tensor],
    w2: Tensor | Sequence[Tensor],
    scale: float,
    impl: str = "auto",
) -> Tensor:
    r"""Convolution with a Kronecker adapter: :func:`lokr_linear` over the channels, w2 holding the kernel window.

    Args:
        x (Tensor): (B, in, H, W) or (in, H, W). weight (Tensor): (out, in / groups, kh, kw). bias (Tensor, optional):
            (out,).
        stride, padding, dilation (int or pair), groups (int): as torch's, ``padding="same"`` and ``"valid"`` too;
            groups must divide the rows of w1.
        w1 (Tensor, or pair): (out1, in1).
        w2 (Tensor, or pair): (out2, in2, kh, kw), or ``(a, b)`` with a (out2, r) and b (r, in2 * kh * kw).
        scale (float), impl (str): as :func:`lokr_linear`.

    Returns:
        Tensor: as torch's ``conv2d``. First derivatives only.

    Raises: ValueError, TypeError naming the argument. The Tucker form (a triple) is not supported.

    Source: LyCORIS (Yeh et al., 2023); the scale is that of its plain forward.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> y = LF.lokr_conv2d(torch.ones(1, 4, 3, 3), torch.zeros(6, 4, 3, 3), padding=1, w1=torch.ones(2, 2),
        ...                    w2=(torch.ones(3, 1), torch.ones(1, 18)), scale=1.0)
        >>> y[0, 0, 1]
        tensor([24., 36., 24.])
    """
    x, (stride, padding, dilation, groups), batched = checks.conv2d(x, weight, bias, stride, padding, dilation, groups)
    scale = checks.number("scale", scale)
    checks.impl(impl)
    w1, a, b = _factors(w1, w2, weight)
    if w1.shape[0] % groups:
        raise ValueError(f"groups must divide the rows of w1, got {groups} and w1 of shape {checks.shape_of(w1)}")
    y = _adapter.lokr_conv2d(x, weight, bias, stride, padding, dilation, groups, w1, a, b, scale, impl)
    return y if batched else y.squeeze(0)


# -- the change alone, for layers that checked their factors when they were made -----------------------------------


def lora_linear_change(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What :func:`lora_linear` adds to the base's output."""
    return _adapter.lora_linear(x, None, None, a, b, scale, "auto")


def lokr_linear_change(x: Tensor, w1: Any, w2: Any, scale: float) -> Tensor:
    """What :func:`lokr_linear` adds to the base's output."""
    return _adapter.lokr_linear(x, None, None, *_split(w1, w2, ()), scale, "auto")


def lokr_conv2d_change(
    x: Tensor, geometry: Sequence[Any], window: Sequence[int], w1: Any, w2: Any, scale: float
) -> Tensor:
    """What :func:`lokr_conv2d` adds to the base's output; `geometry`: stride, padding, dilation (pairs), and groups."""
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    stride, padding, dilation, groups = geometry
    w1, a, b = _split(w1, w2, window)
    y = _adapter.lokr_conv2d(batch, None, None, stride, padding, dilation, groups, w1, a, b, scale, "auto")
    return y if x.dim() == 4 else y.squeeze(0)


def _split(w1: Any, w2: Any, window: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """w1 as a matrix, w2 as `(a, b)`, or `(None, w2)` where it is full."""
    w1 = w1[0] @ w1[1] if isinstance(w1, tuple) else w1
    if not isinstance(w2, tuple):
        return w1, None, w2
    a, b = w2
    return w1, a, b.reshape(len(b), b.shape[1] // math.prod(window), *window) if window else b


def _parts(name: str, value: Any, weight: Tensor) -> Sequence[Tensor]:
    """The factor itself, or the two tensors (rows, r) and (r, columns) that stand for it."""
    if not isinstance(value, (tuple, list)):
        checks.tensor(name, value, "a tensor or a pair of tensors")
        checks.floating(name, value)
        parts: Sequence[Tensor] = (value,)
    else:
        parts = value
        if len(parts) == 3 and all(isinstance(part, Tensor) for part in parts):
            raise ValueError(f"{name} must be a tensor or a pair, got 3 tensors: the Tucker form is not supported")
        if len(parts) != 2:
            raise ValueError(
                f"{name} must be a tensor or a pair of tensors, got a {type(value).__name__} of {len(value)}"
            )
        checks.floating(f"{name}[0]", parts[0])
        checks.floating(f"{name}[1]", parts[1])
        checks.dims(f"{name}[0]", parts[0], (2,), "(rows, r)")
        checks.dims(f"{name}[1]", parts[1], (2,), "(r, columns)")
        checks.shape(f"{name}[1]", parts[1], (parts[0].shape[1], parts[1].shape[1]), "the columns of the first")
    for part in parts:
        if 0 in part.shape:
            raise ValueError(f"{name} must have no empty dimension, got shape {checks.shape_of(part)}")
        checks.same_device(weight=weight, **{name: part})
        checks.precision(name, part, "weight", weight)
    return parts


def _factors(w1: Any, w2: Any, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """w1 as a matrix (a pair is multiplied: it is small), w2 as `(a, b)`, or `(None, w2)` where it is full."""
    first, second = _parts("w1", w1, weight), _parts("w2", w2, weight)
    window = weight.shape[2:]
    if len(first) == 2:
        if first[0].dtype != first[1].dtype and not checks.autocasts(weight.device):
            raise TypeError(
                f"w1[1] must have w1[0]'s dtype {checks.dtype_of(first[0])} (outside of autocast), "
                f"got {checks.dtype_of(first[1])}"
            )
        w1 = first[0] @ first[1]
    checks.dims("w1", w1, (2,), "(out1, in1)")
    if len(second) == 1:
        checks.dims("w2", w2, (2 + len(window),), "(out2, in2, kh, kw)" if window else "(out2, in2)")
        if w2.shape[2:] != window:
            raise ValueError(f"w2 must have weight's window {tuple(window)}, got shape {checks.shape_of(w2)}")
        a, b = None, w2
    else:
        a, b = second
        if b.shape[1] % window.numel():
            raise ValueError(f"w2[1] must be (r, in2 * {window[0]} * {window[1]}), got shape {checks.shape_of(b)}")
        b = b.reshape(b.shape[0], b.shape[1] // window.numel(), *window) if window else b
    rows = b.shape[0] if a is None else a.shape[0]
    if w1.shape[0] * rows != weight.shape[0] or w1.shape[1] * b.shape[1] != weight.shape[1]:
        raise ValueError(
            f"w1 and w2 must give a {tuple(weight.shape[:2])} Kronecker product, got ({w1.shape[0]}, {w1.shape[1]}) "
            f"and ({rows}, {b.shape[1]})"
        )
    return w1, a, b
