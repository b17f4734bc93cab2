"""Linear and Conv2d whose error goes down through something other than their weight: FA and sign-symmetry."""

from typing import Literal

import torch
from torch import nn

from ..core.annotations import Device, Int2, PaddingMode, Scale
from ..random import Law
from .feedback_layer import Conv2dForward, FeedbackAlignment, LinearForward, SignSymmetric
from .feedback_layer import scale_of as scale_of

__all__ = ["FeedbackAlignmentConv2d", "FeedbackAlignmentLinear", "SignSymmetricConv2d", "SignSymmetricLinear"]


class SignSymmetricLinear(LinearForward, SignSymmetric, nn.Linear):
    r"""``nn.Linear`` with sign-symmetric feedback: dX = g F, F = \|M\| * sign(W). dW, db and the output are exact.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; so is the ``state_dict``.
        rule (str): ``"usf"``: F = scale * sign(W). ``"frsf"``: random magnitudes M, fixed. ``"brsf"``: M redrawn after
            each optimizer step, see :func:`redraw_after`. ``"signed_init"``: F = scale * sign of the initial W, for
            good: random signs, which W takes in the constructor, in ``reset_parameters`` and in ``sign_weight()``, to
            be called after an initialisation of your own. Signs are otherwise those of the weight at the time.
        scale (str or float): the root mean square of F. ``"kaiming"`` = 1/sqrt(3 fan_in), ``"xavier"`` =
            sqrt(2/(fan_in+fan_out)), ``"inv_sqrt_fan_in"``, ``"he_fan_out"`` = sqrt(2/(kh*kw*out)), ``"he_fan_in"``,
            ``"mean_abs"`` (mean(abs(W)) of the moment; ours, in no paper), or a number. Magnitudes follow the source
            of the name: uniform (``inv_sqrt_fan_in``: in [0, scale)), for ``he_fan_out`` normal.
        law (str): magnitudes' law: ``"uniform8"`` (default; 8 bits each), ``"uniform"``, ``"normal"``, ``"sign"``.
        sign_zero (str): sign(0) is ``"zero"`` or ``"plus"``.
        packed_signs (bool): the backward reads one bit a weight, packed in the forward. Needs ``sign_zero="plus"``.
        seed, stream (int): of the random values; layers of one seed need different streams (:func:`convert` sets
            them). The global generator is never used.
        impl (str): backend; see :func:`lgkernels.functional.sign_symmetric_linear`.

    Nothing is stored but 24 bytes of random state, in no ``state_dict`` (:func:`feedback_state` carries it). For
    ``torch.compile`` and ``torch.export``; ``torch.func.grad``, ``vmap`` and ``torch.fx.symbolic_trace`` refuse it.
    Raises: ValueError or TypeError naming the argument. Source: Liao, Leibo, Poggio, AAAI 2016; Xiao, Chen, Liao,
    Poggio, ICLR 2019.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.SignSymmetricLinear(4, 2, rule="frsf", scale="xavier")
        >>> layer(torch.randn(8, 5, 4, requires_grad=True)).sum().backward()
        >>> sorted(layer.state_dict()), layer.weight.grad.shape
        (['bias', 'weight'], torch.Size([2, 4]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Literal["usf", "frsf", "brsf", "signed_init"] = "usf",
        scale: Scale | Literal["mean_abs"] | float = "kaiming",
        law: Law | None = None,
        sign_zero: Literal["zero", "plus"] = "zero",
        packed_signs: bool = False,
        seed: int = 0,
        stream: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_rule(rule, scale, law, sign_zero, packed_signs, seed=seed, stream=stream, impl=impl)


class SignSymmetricConv2d(Conv2dForward, SignSymmetric, nn.Conv2d):
    """``nn.Conv2d`` with sign-symmetric feedback: dX is the input gradient of the convolution with F in W's place.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``nn.Conv2d``, all of them; so is the ``state_dict``.
        rule, scale, law, sign_zero, packed_signs, seed, stream, impl: as :class:`SignSymmetricLinear`.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.SignSymmetricConv2d(3, 8, 3, padding="same", padding_mode="circular")
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Int2,
        stride: Int2 = 1,
        padding: str | Int2 = 0,
        dilation: Int2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Literal["usf", "frsf", "brsf", "signed_init"] = "usf",
        scale: Scale | Literal["mean_abs"] | float = "kaiming",
        law: Law | None = None,
        sign_zero: Literal["zero", "plus"] = "zero",
        packed_signs: bool = False,
        seed: int = 0,
        stream: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._set_rule(rule, scale, law, sign_zero, packed_signs, seed=seed, stream=stream, impl=impl)


class FeedbackAlignmentLinear(LinearForward, FeedbackAlignment, nn.Linear):
    """``nn.Linear`` under feedback alignment: dX = g F, F random, signed, fixed. dW, db and the output are exact.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; so is the ``state_dict``.
        feedback_init (str or float): a name of :class:`SignSymmetricLinear`'s scales (not ``"mean_abs"``) or F's root
            mean square. Uniform, for ``"he_fan_out"`` normal.
        law, seed, stream, impl: as :class:`SignSymmetricLinear`.

    F is a formula of 24 bytes, in no ``state_dict``. Source: Lillicrap, Cownden, Tweed, Akerman, 2016.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.FeedbackAlignmentLinear(4, 2, seed=7)
        >>> x = torch.ones(1, 4, requires_grad=True)
        >>> layer(x).sum().backward()
        >>> torch.allclose(x.grad, layer.feedback_weight().sum(0))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        feedback_init: Scale | float = "kaiming",
        law: Law | None = None,
        seed: int = 0,
        stream: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_rule(feedback_init, law, seed=seed, stream=stream, impl=impl)


class FeedbackAlignmentConv2d(Conv2dForward, FeedbackAlignment, nn.Conv2d):
    """``nn.Conv2d`` under feedback alignment.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            ``nn.Conv2d``, all of them; so is the ``state_dict``.
        feedback_init, law, seed, stream, impl: as :class:`FeedbackAlignmentLinear`.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> lnn.FeedbackAlignmentConv2d(3, 8, 3, stride=2, groups=1)(torch.randn(3, 9, 9)).shape
        torch.Size([8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Int2,
        stride: Int2 = 1,
        padding: str | Int2 = 0,
        dilation: Int2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        feedback_init: Scale | float = "kaiming",
        law: Law | None = None,
        seed: int = 0,
        stream: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._set_rule(feedback_init, law, seed=seed, stream=stream, impl=impl)
