"""Linear and Conv2d whose error goes down through something other than their weight: FA and sign-symmetry."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..core import checks, dispatch
from ..ops.feedback import autograd as _feedback
from ..random import VALUES_PER_CALL, RandomFeedback

SCALES = ("kaiming", "xavier", "inv_sqrt_fan_in", "he_fan_out", "he_fan_in")
RULES = ("usf", "frsf", "brsf", "signed_init")


def scale_of(scale, shape):
    """The number that a scale's name stands for, for a weight of `shape` (out, in / groups, *kernel).

    kaiming          1 / sqrt(3 fan_in)             BioTorch, any init but xavier; the std of torch's own init
    xavier           sqrt(2 / (fan_in + fan_out))   BioTorch, init "xavier"
    inv_sqrt_fan_in  1 / sqrt(fan_in)               willwx, linear layers
    he_fan_out       sqrt(2 / fan_out)              willwx, convolutions
    he_fan_in        sqrt(2 / fan_in)               ChFrenkel, FA
    """
    if not isinstance(scale, str):
        checks.positive("scale", scale, "a name or a number")
        return float(scale)
    checks.choice("scale", scale, SCALES)
    fan_in, fan_out = max(math.prod(shape[1:]), 1), max(shape[0] * math.prod(shape[2:]), 1)
    return {
        "kaiming": 1 / math.sqrt(3 * fan_in),
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
        "inv_sqrt_fan_in": 1 / math.sqrt(fan_in),
        "he_fan_out": math.sqrt(2 / fan_out),
        "he_fan_in": math.sqrt(2 / fan_in),
    }[scale]


def _law(scale, law):
    """The law of a scale's source, unless named; "uniform8" stands in for its uniform one."""
    if law is None:
        return "normal" if scale == "he_fan_out" else "uniform8"
    checks.choice("law", law, tuple(VALUES_PER_CALL))
    return law


def _law_scale(scale, law, number):
    """The law's own scale, such that F has root mean square `number` (inv_sqrt_fan_in: that as its bound)."""
    return number * math.sqrt(3) if law.startswith("uniform") and scale != "inv_sqrt_fan_in" else number


class _FeedbackLayer:
    """What the layers share: `feedback` is None or a RandomFeedback (24 bytes), all that a layer adds to torch's."""

    def _set(self, *, seed, stream, impl, **settings):
        RandomFeedback(seed, stream)  # checks both, also for a rule that draws nothing
        checks.choice("impl", impl, dispatch.IMPLEMENTATIONS)
        settings.update(seed=seed, stream=stream, impl=impl)
        for name, value in settings.items():
            setattr(self, name, value)
        self._settings = tuple(settings)
        self.feedback = None  # not a registered None, which repr would show
        self.register_buffer("frozen_signs", None, persistent=False)

    def _draw(self, law, scale, low=None):
        with torch.device(self.weight.device):
            self.feedback = RandomFeedback(self.seed, self.stream, law, scale, low)

    def _random(self):
        """The fields of Formula and the tensors of the layer's random values."""
        random = self.feedback
        for name, state in (
            ("feedback", None if random is None else random.state),
            ("frozen_signs", self.frozen_signs),
        ):
            if state is not None and state.device != self.weight.device:
                self._follow(name, state)
        return (
            ({}, {})
            if random is None
            else (dict(law=random.law, law_scale=random.scale, low=random.low), {"state": random.state})
        )

    @torch.no_grad()
    def _follow(self, name, state):
        """Weights that `load_state_dict(..., assign=True)` put into a model on the meta device leave buffers there."""
        if name != "feedback" or not state.is_meta:
            raise ValueError(
                f"{name} must be on {self.weight.device} like weight, got {state.device}: move the whole "
                "layer, or convert the model once its weights are there"
            )
        self.feedback.to_empty(device=self.weight.device)
        self.feedback.reset_parameters()

    def clear_rule(self):
        """Take off everything that `_set_rule` put on: the module is torch's again, but for its class."""
        for name in ("feedback", "frozen_signs", *self._settings):
            delattr(self, name)
        del self._settings

    def feedback_weight(self, dtype=None):
        """F as it is now, a new tensor like the weight in `dtype` (default: the weight's)."""
        return self.feedback_rows(0, self.weight.shape[0]).view(self.weight.shape).to(dtype or self.weight.dtype)

    def feedback_rows(self, start, stop):
        """Rows [start, stop) of F as a (out, rest) matrix, float32 (float64 for a float64 weight)."""
        formula, tensors = self._formula()
        return _feedback.weight_rows(self.weight, formula, start, stop, **tensors, impl=self.impl)

    def reset_parameters(self):
        super().reset_parameters()
        if getattr(self, "feedback", None) is not None:  # None also in torch's constructor
            self.feedback.reset_parameters()

    def extra_repr(self):
        return f"{super().extra_repr()}, {self._rule_repr()}"


class _LinearForward:
    def forward(self, input):
        formula, tensors = self._formula()
        checks.linear(input, self.weight, self.bias)
        return _feedback.linear(input, self.weight, self.bias, formula, **tensors, impl=self.impl)


class _Conv2dForward:
    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        formula, tensors = self._formula()
        input, geometry, batched = checks.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        output = _feedback.conv2d(input, weight, bias, *geometry, formula, **tensors, impl=self.impl)
        return output if batched else output.squeeze(0)


class _SignSymmetric(_FeedbackLayer):
    def _set_rule(
        self,
        rule="usf",
        scale="kaiming",
        law=None,
        sign_zero="zero",
        packed_signs=False,
        *,
        seed=0,
        stream=0,
        impl="auto",
        signs="formula",
    ):
        """Choose the rule; "signed_init" with signs="weight" keeps the signs that the weight has, one bit each."""
        checks.choice("rule", rule, RULES)
        checks.choice("sign_zero", sign_zero, ("zero", "plus"))
        if packed_signs and sign_zero != "plus":
            raise ValueError(
                f"sign_zero must be 'plus' with packed_signs=True (one bit cannot hold sign(0) = 0), got {sign_zero!r}"
            )
        if rule == "signed_init" and (packed_signs or scale == "mean_abs"):
            raise ValueError(
                "packed_signs must be False and scale a fixed one with rule='signed_init' (it does not "
                f"read the weight), got packed_signs={packed_signs}, scale={scale!r}"
            )
        if law is not None and rule not in ("frsf", "brsf"):
            raise ValueError(f"law must be None with rule={rule!r} (it has no random magnitudes), got {law!r}")
        number = "mean_abs" if scale == "mean_abs" else scale_of(scale, self.weight.shape)
        law = _law(scale, law) if rule in ("frsf", "brsf") else None
        self._set(
            seed=seed,
            stream=stream,
            impl=impl,
            rule=rule,
            scale=scale,
            sign_zero=sign_zero,
            packed_signs=packed_signs,
            factor=number,
        )
        if law is not None:
            low = 0.0 if law.startswith("uniform") else None
            if scale == "mean_abs":  # magnitudes of mean 1, times mean|W|
                self._draw(law, {"normal": math.sqrt(math.pi / 2), "sign": 1.0}.get(law, 2.0), low)
            else:
                self._draw(law, _law_scale(scale, law, number), low)
                self.factor = 1.0
        elif rule == "signed_init" and signs == "weight":
            packed = torch.ops.lgkernels.feedback_pack_signs(self.weight.detach().flatten(1), "reference")
            self.register_buffer("frozen_signs", packed, persistent=False)
        elif rule == "signed_init":
            self._draw("sign", number)
            self.sign_weight()

    @torch.no_grad()
    def sign_weight(self):
        """Rule "signed_init": the weight takes F's signs, so that these need no memory; its magnitudes stay.

        The constructor and ``reset_parameters`` do so. After an initialisation of your own (``nn.init``, a loaded
        weight) and before training, call it again: with other signs than the weight's the rule is mere FA.
        """
        if self.rule != "signed_init" or self.feedback is None:
            raise ValueError(
                f"sign_weight is for rule='signed_init' with signs by formula, got rule={self.rule!r}"
                f"{'' if self.rule != 'signed_init' else ', signs of the weight'}"
            )
        if not self.weight.is_meta:
            self._random()  # its state is beside the weight from here on
            self.weight.copysign_(self.feedback.materialize(self.weight.shape, dtype=self.weight.dtype))

    def reset_parameters(self):
        super().reset_parameters()
        if getattr(self, "rule", None) == "signed_init" and self.feedback is not None:
            self.sign_weight()

    def _formula(self):
        law, tensors = self._random()
        if self.rule != "signed_init":
            return _feedback.Formula(
                "packed" if self.packed_signs else "weight",
                scale=self.factor,
                sign_plus=self.sign_zero == "plus",
                **law,
            ), tensors
        if self.frozen_signs is None:
            return _feedback.Formula(**law), tensors
        return _feedback.Formula("packed", scale=self.factor, sign_plus=True), {"packed": self.frozen_signs}

    def _rule_repr(self):
        zero = "" if self.sign_zero == "zero" else f", sign_zero={self.sign_zero!r}"
        return f"rule={self.rule!r}, scale={self.scale!r}{zero}{', packed_signs=True' if self.packed_signs else ''}"


class _FeedbackAlignment(_FeedbackLayer):
    rule = "fa"

    def _set_rule(self, feedback_init="kaiming", law=None, *, seed=0, stream=0, impl="auto"):
        number, law = scale_of(feedback_init, self.weight.shape), _law(feedback_init, law)
        self._set(seed=seed, stream=stream, impl=impl, feedback_init=feedback_init)
        self._draw(law, _law_scale(feedback_init, law, number))

    def _formula(self):
        law, tensors = self._random()
        return _feedback.Formula(**law), tensors

    def _rule_repr(self):
        return f"feedback_init={self.feedback_init!r}"


class SignSymmetricLinear(_LinearForward, _SignSymmetric, nn.Linear):
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
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        rule="usf",
        scale="kaiming",
        law=None,
        sign_zero="zero",
        packed_signs=False,
        seed=0,
        stream=0,
        impl="auto",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_rule(rule, scale, law, sign_zero, packed_signs, seed=seed, stream=stream, impl=impl)


class SignSymmetricConv2d(_Conv2dForward, _SignSymmetric, nn.Conv2d):
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
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        rule="usf",
        scale="kaiming",
        law=None,
        sign_zero="zero",
        packed_signs=False,
        seed=0,
        stream=0,
        impl="auto",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._set_rule(rule, scale, law, sign_zero, packed_signs, seed=seed, stream=stream, impl=impl)


class FeedbackAlignmentLinear(_LinearForward, _FeedbackAlignment, nn.Linear):
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
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        feedback_init="kaiming",
        law=None,
        seed=0,
        stream=0,
        impl="auto",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_rule(feedback_init, law, seed=seed, stream=stream, impl=impl)


class FeedbackAlignmentConv2d(_Conv2dForward, _FeedbackAlignment, nn.Conv2d):
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
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        feedback_init="kaiming",
        law=None,
        seed=0,
        stream=0,
        impl="auto",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._set_rule(feedback_init, law, seed=seed, stream=stream, impl=impl)
