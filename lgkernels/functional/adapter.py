"""Adapters: check the arguments, then call the family's autograd entry."""

from ..core import checks
from ..ops.adapter import autograd as _adapter

__all__ = ["lokr_conv2d", "lokr_linear", "lora_linear"]


def lora_linear(x, weight, bias=None, *, a, b, scale, impl="auto"):
    r"""Linear layer with a low-rank adapter: :math:`y = x W^T + \beta + s\,(x a^T)\, b^T`.

    Args:
        x (Tensor): (..., in). weight (Tensor): (out, in). bias (Tensor, optional): (out,).
        a (Tensor): (r, in). b (Tensor): (out, r).
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
    out, width = _linear_arguments(x, weight, bias)
    checks.floating("a", a)
    checks.dims("a", a, (2,), f"(r, {width})")
    checks.shape("a", a, (a.shape[0], width), "the columns of weight")
    checks.floating("b", b)
    checks.shape("b", b, (out, a.shape[0]), "the rows of weight, and of a")
    checks.same_device(x=x, weight=weight, bias=bias, a=a, b=b)
    return _adapter.lora_linear(x, weight, bias, a, b, float(scale), impl)


def lokr_linear(x, weight, bias=None, *, w1, w2, scale, impl="auto"):
    r"""Linear layer with a Kronecker adapter: :math:`y = x (W + s\, w_1 \otimes w_2)^T + \beta`.

    Factorised, forward and backward: neither the Kronecker product nor its gradient is built.

    Args:
        x (Tensor): (..., in). weight (Tensor): (out, in). bias (Tensor, optional): (out,).
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
    out, width = _linear_arguments(x, weight, bias)
    w1, a, b = _factors(w1, w2, None)
    _kronecker_shapes(w1, a, b, out, width)
    checks.same_device(x=x, weight=weight, bias=bias, w1=w1, w2=b)
    return _adapter.lokr_linear(x, weight, bias, w1, a, b, float(scale), impl)


def lokr_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, w1, w2, scale, impl="auto"):
    r"""Convolution with a Kronecker adapter: :func:`lokr_linear` over the channels, w2 holding the kernel window.

    Args:
        x (Tensor): (B, in, H, W). weight (Tensor): (out, in / groups, kh, kw). bias (Tensor, optional): (out,).
        stride, padding, dilation (int or pair), groups (int): as torch's; groups must divide the rows of w1.
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
    checks.floating("x", x)
    checks.dims("x", x, (4,), "(B, C, H, W)")
    checks.floating("weight", weight)
    checks.dims("weight", weight, (4,), "(out, in / groups, kh, kw)")
    checks.positive_integer("groups", groups)
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x must have {weight.shape[1] * groups} channels (columns of weight * groups), got shape "
            f"{checks.shape_of(x)}"
        )
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    padding = _pair("padding", padding, low=0)
    _bias(bias, weight)
    w1, a, b = _factors(w1, w2, weight.shape[2:])
    _kronecker_shapes(w1, a, b, weight.shape[0], weight.shape[1])
    if tuple(b.shape[2:]) != tuple(weight.shape[2:]):
        raise ValueError(f"w2 must have weight's window {tuple(weight.shape[2:])}, got shape {checks.shape_of(b)}")
    if w1.shape[0] % groups:
        raise ValueError(f"groups must divide the rows of w1, got {groups} and w1 of shape {checks.shape_of(w1)}")
    checks.same_device(x=x, weight=weight, bias=bias, w1=w1, w2=b)
    return _adapter.lokr_conv2d(x, weight, bias, stride, padding, dilation, groups, w1, a, b, float(scale), impl)


def _bias(bias, weight):
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, weight.shape[:1], "one entry per row of weight")


def _linear_arguments(x, weight, bias):
    checks.floating("x", x)
    checks.floating("weight", weight)
    checks.dims("weight", weight, (2,), "(out, in)")
    if not x.dim() or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}), the columns of weight, got shape {checks.shape_of(x)}")
    _bias(bias, weight)
    return weight.shape


def _pair(name, value, low=1):
    if isinstance(value, int):
        value = (value, value)
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(value) < low:
        raise ValueError(f"{name} must be at least {low}, got {tuple(value)}")
    return list(value)


def _factors(w1, w2, window):
    """w1 as a matrix (a pair is multiplied: it is small), w2 as `(a, b)`, or `(None, w2)` where it is full."""
    for name, value in (("w1", w1), ("w2", w2)):
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if len(parts) > 2:
            raise ValueError(
                f"{name} must be a tensor or a pair, got {len(parts)} tensors: the Tucker form is not supported"
            )
        for part in parts:
            checks.floating(name, part)
        if len(parts) == 2:
            checks.dims(f"{name}[0]", parts[0], (2,), "(rows, r)")
            checks.dims(f"{name}[1]", parts[1], (2,), "(r, columns)")
            checks.shape(f"{name}[1]", parts[1], (parts[0].shape[1], parts[1].shape[1]), "the columns of the first")
    if isinstance(w1, (tuple, list)):
        w1 = w1[0] @ w1[1]
    checks.dims("w1", w1, (2,), "(out1, in1)")
    if not isinstance(w2, (tuple, list)):
        checks.dims("w2", w2, (2 if window is None else 4,), "(out2, in2)" if window is None else "(out2, in2, kh, kw)")
        return w1, None, w2
    a, b = w2
    if window is not None:
        if b.shape[1] % window.numel():
            raise ValueError(f"w2[1] must be (r, in2 * {window[0]} * {window[1]}), got shape {checks.shape_of(b)}")
        b = b.reshape(b.shape[0], -1, *window)
    return w1, a, b


def _kronecker_shapes(w1, a, b, out, width):
    rows = b.shape[0] if a is None else a.shape[0]
    if w1.shape[0] * rows != out or w1.shape[1] * b.shape[1] != width:
        raise ValueError(
            f"w1 and w2 must give a ({out}, {width}) Kronecker product, got ({w1.shape[0]}, {w1.shape[1]}) "
            f"and ({rows}, {b.shape[1]})"
        )
