"""Feedback without weight transport: check the arguments, then call the family's autograd entry."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..core import checks
from ..ops.feedback import arguments as _arguments
from ..ops.feedback import autograd as _feedback
from ..random import RandomFeedback

__all__ = [
    "feedback_conv2d",
    "feedback_linear",
    "feedback_projection",
    "sign_symmetric_conv2d",
    "sign_symmetric_linear",
    "target_projection",
]

_Projecting = Tensor | RandomFeedback | _arguments.Scaled


def feedback_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, feedback: Tensor | RandomFeedback, impl: str = "auto"
) -> Tensor:
    r"""Linear layer of feedback alignment (FA): the error goes down through a fixed matrix instead of the weight.

    .. math:: y = x W^T + b, \qquad dX = g F, \quad dW = g^T x, \quad db = \sum g

    Args:
        x (Tensor): (..., K). weight (Tensor): (N, K). bias (Tensor, optional): (N,). float32, bfloat16, float16, and
            float64 in the reference. Under autocast they are cast as torch's own linear casts them.
        feedback: F, a tensor (N, K) of any float dtype, or a :class:`lgkernels.random.RandomFeedback`, which takes no
            memory: its numbers are made where they are used. It gets no gradient.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (..., N). F is read in the backward alone, and only where x requires a gradient. There is no second
        derivative (differentiating twice raises).

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for
    deep learning", 2016.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2)
        >>> LF.feedback_linear(x, weight, feedback=torch.full((3, 2), 0.5)).sum().backward()
        >>> x.grad
        tensor([[1.5000, 1.5000]])
    """
    checks.linear(x, weight, bias)
    checks.impl(impl)
    formula, source = _arguments.alignment(weight, feedback)
    return _feedback.linear(x, weight, bias, formula, **source, impl=impl)


def feedback_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same", "valid"] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    feedback: Tensor | RandomFeedback,
    impl: str = "auto",
) -> Tensor:
    r"""Convolution of feedback alignment (FA): dX is the input gradient of the convolution with F instead of W.

    Args:
        x (Tensor): (B, C, H, W) or (C, H, W). weight (Tensor): (O, C / groups, kh, kw). bias (Tensor, optional): (O,).
        stride, padding, dilation, groups: as ``torch.nn.functional.conv2d``, ``padding="same"`` and ``"valid"`` too.
        feedback: F, a tensor like weight, or a :class:`lgkernels.random.RandomFeedback` (rows are outputs, columns
            the flattened rest of the weight).
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, O, H', W'). dW and db are the ordinary gradients. F is made in one pass and freed after the
        library's backward of the convolution; nothing is made where x requires no gradient.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: as :func:`feedback_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> from lgkernels.random import RandomFeedback
        >>> x = torch.ones(1, 3, 8, 8, requires_grad=True)
        >>> y = LF.feedback_conv2d(x, torch.ones(4, 3, 3, 3), padding="same", feedback=RandomFeedback(seed=0))
        >>> y.sum().backward()
        >>> y.shape, x.grad.shape
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 3, 8, 8]))
    """
    x, geometry, batched = checks.conv2d(x, weight, bias, stride, padding, dilation, groups)
    checks.impl(impl)
    formula, source = _arguments.alignment(weight, feedback)
    y = _feedback.conv2d(x, weight, bias, *geometry, formula, **source, impl=impl)
    return y if batched else y.squeeze(0)


def sign_symmetric_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Literal["mean_abs"] = 1.0,
    magnitude: Tensor | RandomFeedback | None = None,
    sign_zero: Literal["zero", "plus"] = "zero",
    packed_signs: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Linear layer with sign-symmetric feedback: the error goes down through the signs of the weight.

    .. math::
        y = x W^T + b, \qquad dX = g F, \quad F = s\,|M| \odot \mathrm{sign}(W), \quad dW = g^T x, \quad db = \sum g

    Args:
        x (Tensor): (..., K). weight (Tensor): (N, K). bias (Tensor, optional): (N,). float32, bfloat16, float16, and
            float64 in the reference. Under autocast they are cast as torch's own linear casts them.
        scale (float): s, or ``"mean_abs"``: mean(abs(weight)), taken anew at each call (ours, in no paper).
        magnitude: M. None is uSF; a tensor like weight or a :class:`lgkernels.random.RandomFeedback` frSF; the latter
            advanced after each optimizer step brSF. It gets no gradient.
        sign_zero (str): sign(0) is ``"zero"`` (such a weight sends no feedback, as in every published code) or
            ``"plus"`` (+1, also of -0.0).
        packed_signs (bool): read the signs from one bit a weight, packed in the forward: the backward does not need
            the weight. Needs ``sign_zero="plus"``.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (..., N). F is made in the backward alone, from the weight as it is then, and only where x requires a
        gradient. There is no second derivative (differentiating twice raises).

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: Liao, Leibo, Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (uSF, brSF, frSF);
    Xiao, Chen, Liao, Poggio, "Biologically-plausible learning algorithms can scale to large datasets", ICLR 2019
    (the scale).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight = torch.ones(1, 2, requires_grad=True), torch.tensor([[0.3, -2.0], [4.0, 0.0]])
        >>> LF.sign_symmetric_linear(x, weight, scale=0.5).sum().backward()
        >>> x.grad
        tensor([[ 1.0000, -0.5000]])
    """
    checks.linear(x, weight, bias)
    checks.impl(impl)
    formula, source = _arguments.sign_symmetric(weight, scale, magnitude, sign_zero, packed_signs)
    return _feedback.linear(x, weight, bias, formula, **source, impl=impl)


def sign_symmetric_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same", "valid"] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: float | Literal["mean_abs"] = 1.0,
    magnitude: Tensor | RandomFeedback | None = None,
    sign_zero: Literal["zero", "plus"] = "zero",
    packed_signs: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Convolution with sign-symmetric feedback: dX is the input gradient of the convolution with F instead of W.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as :func:`feedback_conv2d`.
        scale, magnitude, sign_zero, packed_signs: F = scale * abs(magnitude) * sign(weight), as
            :func:`sign_symmetric_linear`.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, O, H', W'). dW and db are the ordinary gradients.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: as :func:`sign_symmetric_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight = torch.ones(1, 1, 2, 2, requires_grad=True), torch.tensor([[[[-3.0]]], [[[0.5]]], [[[2.0]]]])
        >>> LF.sign_symmetric_conv2d(x, weight, scale=0.25).sum().backward()
        >>> x.grad
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])
    """
    x, geometry, batched = checks.conv2d(x, weight, bias, stride, padding, dilation, groups)
    checks.impl(impl)
    formula, source = _arguments.sign_symmetric(weight, scale, magnitude, sign_zero, packed_signs)
    y = _feedback.conv2d(x, weight, bias, *geometry, formula, **source, impl=impl)
    return y if batched else y.squeeze(0)


def feedback_projection(
    error: Tensor, feedback: _Projecting, shape: int | Sequence[int], *, impl: str = "auto"
) -> Tensor:
    r"""Direct feedback alignment (DFA): the output's error, projected to a layer.

    .. math:: \delta = e B

    Args:
        error (Tensor): e (B, C), as you want it scaled: it is never divided by B. Pass ``error.sign()`` for sDFA.
        feedback: B, a tensor (C, \*shape) or (C, prod(shape)), or a :class:`lgkernels.random.RandomFeedback` (row =
            class, column = neuron), of which nothing is stored.
        shape: sizes of one sample of the layer's activation, (N,) or (channels, height, width).
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, \*shape) in error's dtype, to stand in place of the gradient of that activation. No gradient flows
        through it.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: Nokland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.feedback_projection(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.5]]), (3,))
        tensor([[1., 0., 2.]])
    """
    return _projected("error", error, feedback, shape, impl)


def target_projection(
    target: Tensor, feedback: _Projecting, shape: int | Sequence[int], *, impl: str = "auto"
) -> Tensor:
    r"""Direct random target projection (DRTP): the target, projected to a layer. It needs no output, so no error.

    .. math:: \delta = t B \quad\text{(class indices: row } B_y \text{)}

    Args:
        target (Tensor): (B,) class indices of any integer dtype, or (B, C) floats (one-hot, or any other).
        feedback: B, as :func:`feedback_projection`.
        shape: sizes of one sample of the layer's activation.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, \*shape), to stand in place of the gradient of that activation; in target's dtype, for indices in
        feedback's (float32 for a RandomFeedback). No gradient flows through it.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected. Indices are checked on the CPU, and
        elsewhere with ``LGKERNELS_CHECK=1``.

    Source: Frenkel, Lefebvre, Bol, "Learning without feedback: fixed random learning signals allow for feedforward
    training of deep neural networks", Frontiers in Neuroscience 2021.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.target_projection(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [0.0, 0.5]]), (2,))
        tensor([[0.0000, 0.5000],
                [1.0000, 2.0000]])
    """
    checks.tensor("target", target)
    if target.is_floating_point() and target.dim() == 2:
        return _projected("target", target, feedback, shape, impl)
    checks.integer("target", target)
    checks.dims("target", target, (1,), "(B,) class indices or (B, C) floats")
    checks.impl(impl)
    shape, columns, source = _arguments.projection("target", target, feedback, shape)
    return _feedback.rows(target, columns, *source, impl).view(target.shape[0], *shape)


def _projected(name: str, error: Tensor, feedback: _Projecting, shape: int | Sequence[int], impl: str) -> Tensor:
    checks.floating(name, error)
    checks.dims(name, error, (2,), "(B, C)")
    checks.impl(impl)
    shape, columns, source = _arguments.projection(name, error, feedback, shape, error.shape[1])
    function = "feedback_projection" if name == "error" else "target_projection"
    return _feedback.project(function, error, columns, *source, impl).view(error.shape[0], *shape)
