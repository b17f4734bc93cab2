"""What the layers of :mod:`.feedback` share: names of scales, the rule that they carry, and their random values."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..core import checks, constructors
from ..core.autograd import exporting
from ..core.carried import Carried
from ..core.whole import gathered
from ..ops.feedback import autograd as _feedback
from ..ops.feedback.options import Formula
from ..random import VALUES_PER_CALL, Law, RandomFeedback

__all__ = ["Conv2dForward", "FeedbackAlignment", "FeedbackLayer", "LinearForward", "SignSymmetric", "scale_of"]

SCALES = ("kaiming", "xavier", "inv_sqrt_fan_in", "he_fan_out", "he_fan_in")
SIGN_SYMMETRIC_RULES = ("usf", "frsf", "brsf", "signed_init")


def scale_of(scale: str | float, shape: Sequence[int], name: str = "scale") -> float:
    """The number that a scale's name stands for, for a weight of `shape` (out, in / groups, *kernel).

    kaiming          1 / sqrt(3 fan_in)             BioTorch, any init but xavier; the std of torch's own init
    xavier           sqrt(2 / (fan_in + fan_out))   BioTorch, init "xavier"
    inv_sqrt_fan_in  1 / sqrt(fan_in)               willwx, linear layers
    he_fan_out       sqrt(2 / fan_out)              willwx, convolutions
    he_fan_in        sqrt(2 / fan_in)               ChFrenkel, FA
    """
    if not isinstance(scale, str):
        checks.positive(name, scale, "a name or a number")
        return float(scale)
    checks.choice(name, scale, SCALES)
    fan_in, fan_out = max(math.prod(shape[1:]), 1), max(shape[0] * math.prod(shape[2:]), 1)
    return {
        "kaiming": 1 / math.sqrt(3 * fan_in),
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
        "inv_sqrt_fan_in": 1 / math.sqrt(fan_in),
        "he_fan_out": math.sqrt(2 / fan_out),
        "he_fan_in": math.sqrt(2 / fan_in),
    }[scale]


def _law(scale: str | float, law: Law | None) -> Law:
    """The law of a scale's source, unless named; "uniform8" stands in for its uniform one."""
    if law is None:
        return "normal" if scale == "he_fan_out" else "uniform8"
    checks.choice("law", law, tuple(VALUES_PER_CALL))
    return law


def _law_scale(scale: str | float, law: Law, number: float) -> float:
    """The law's own scale, such that F has root mean square `number` (inv_sqrt_fan_in: that as its bound)."""
    return number * math.sqrt(3) if law.startswith("uniform") and scale != "inv_sqrt_fan_in" else number


class FeedbackLayer(Carried):
    """What the layers share. Beside torch's own attributes a layer has its settings (:meth:`_set`), `feedback` (None or
    a RandomFeedback of 24 bytes), and `frozen_signs`. It is mixed into nn.Linear or nn.Conv2d, and `convert` puts a
    layer's class and rule on and off: so the rule is no part of the constructor."""

    weight: torch.Tensor
    rule: str
    seed: int
    stream: int
    impl: str
    feedback: RandomFeedback | None
    frozen_signs: torch.Tensor | None

    def _set(self, *, seed: int, stream: int, impl: str, **settings: Any) -> None:
        """Check and keep the settings of a rule; no random values yet."""
        RandomFeedback(seed, stream)  # checks both, also for a rule that draws nothing
        checks.impl(impl)
        settings.update(seed=seed, stream=stream, impl=impl)
        for name, value in settings.items():
            setattr(self, name, value)
        self._settings = tuple(settings)
        self.feedback = None  # not a registered None, which repr would show
        self.register_buffer("frozen_signs", None, persistent=False)

    def _draw(self, law: Law, scale: float, low: float | None = None) -> None:
        with torch.device(self.weight.device):
            self.feedback = RandomFeedback(self.seed, self.stream, law, scale, low)

    def _random(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The fields of Formula and the tensors of the layer's random values."""
        random = self.feedback
        for name, state in (
            ("feedback", None if random is None else random.verified()),
            ("frozen_signs", self.frozen_signs),
        ):
            if state is not None and state.device != self.weight.device:
                self._follow(name, state)
        if random is None:
            return {}, {}
        return dict(law=random.law, law_scale=random.scale, low=random.low), {"state": random.state}

    @torch.no_grad()
    def _follow(self, name: str, state: torch.Tensor) -> None:
        """Weights that `load_state_dict(..., assign=True)` put into a model on the meta device leave buffers there."""
        if self.feedback is None or name != "feedback" or not state.is_meta:
            raise ValueError(
                f"{name} must be on {self.weight.device} like weight, got {state.device}: move the whole "
                "layer, or convert the model once its weights are there"
            )
        self.feedback.to_empty(device=self.weight.device)
        self.feedback.reset_parameters()

    def _seen(self) -> None:
        """For `convert`, which warns of layers whose forward never runs."""
        if not torch.compiler.is_compiling():
            vars(self).pop("_unseen", None)

    def _formula(self) -> tuple[Formula, dict[str, torch.Tensor]]:
        """F, and the tensors that its formula reads beside the weight."""
        raise NotImplementedError

    def clear_rule(self) -> None:
        """Take off everything that `_set_rule` put on: the module is torch's again, but for its class."""
        for name in ("feedback", "frozen_signs", *self._settings):
            delattr(self, name)
        del self._settings
        self._seen()

    def feedback_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """F as it is now, a new tensor like the weight in `dtype` (default: the weight's)."""
        return self.feedback_rows(0, self.weight.shape[0]).view(self.weight.shape).to(dtype or self.weight.dtype)

    def feedback_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of F as a (out, rest) matrix, float32 (float64 for a float64 weight)."""
        formula, tensors = self._formula()
        return _feedback.weight_rows(gathered(self.weight), formula, start, stop, **tensors, impl=self.impl)

    def reset_parameters(self) -> None:
        """As torch's layer; the random values return to their step 0."""
        super().reset_parameters()  # type: ignore[misc]  # nn.Linear's or nn.Conv2d's
        if getattr(self, "feedback", None) is not None:  # None also in torch's constructor
            self.feedback.reset_parameters()  # type: ignore[union-attr]

    def _rule_repr(self) -> str:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._rule_repr()}"


class LinearForward(FeedbackLayer):
    """The forward in nn.Linear's place; `self` is one, too."""

    def __init__(self, *arguments: Any) -> None:
        constructors.linear(*arguments)
        super().__init__(*arguments)  # nn.Linear's

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if not self.training and exporting():  # for inference, by programs that know no rule
            return F.linear(input, self.weight, self.bias)
        self._seen()
        formula, tensors = self._formula()
        checks.linear(input, self.weight, self.bias)
        return _feedback.linear(input, self.weight, self.bias, formula, **tensors, impl=self.impl)


class Conv2dForward(FeedbackLayer):
    """The forward in nn.Conv2d's place; `self` is one, too."""

    def __init__(self, *arguments: Any) -> None:
        constructors.conv2d(*arguments)
        super().__init__(*arguments)  # nn.Conv2d's

    def _conv_forward(self: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.training and exporting():
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]  # nn.Conv2d's
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        self._seen()
        formula, tensors = self._formula()
        input, (stride, padding, dilation, groups), batched = checks.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups
        )
        output = _feedback.conv2d(
            input, weight, bias, stride, padding, dilation, groups, formula, **tensors, impl=self.impl
        )
        return output if batched else output.squeeze(0)


class SignSymmetric(FeedbackLayer):
    """F = |M| * sign(W) in a layer: what the linear layer and the convolution have in common."""

    scale: str | float
    sign_zero: str
    packed_signs: bool
    factor: float | str

    def _set_rule(
        self,
        rule: str = "usf",
        scale: str | float = "kaiming",
        law: Law | None = None,
        sign_zero: str = "zero",
        packed_signs: bool = False,
        *,
        seed: int = 0,
        stream: int = 0,
        impl: str = "auto",
        signs: str = "formula",
    ) -> None:
        """Choose the rule; "signed_init" with signs="weight" keeps the signs that the weight has, one bit each."""
        checks.choice("rule", rule, SIGN_SYMMETRIC_RULES)
        checks.choice("sign_zero", sign_zero, ("zero", "plus"))
        checks.boolean("packed_signs", packed_signs)
        if packed_signs and sign_zero != "plus":
            raise ValueError(
                f"sign_zero must be 'plus' with packed_signs=True (one bit cannot hold sign(0) = 0), got {sign_zero!r}"
            )
        mean_abs = isinstance(scale, str) and scale == "mean_abs"
        if rule == "signed_init" and (packed_signs or mean_abs):
            raise ValueError(
                "packed_signs must be False and scale a fixed one with rule='signed_init' (it does not "
                f"read the weight), got packed_signs={packed_signs}, scale={scale!r}"
            )
        if law is not None and rule not in ("frsf", "brsf"):
            raise ValueError(
                f"law must be None with rule={rule!r} (it has no random magnitudes), got {checks.got(law)}"
            )
        number = "mean_abs" if mean_abs else scale_of(scale, self.weight.shape)
        magnitudes = _law(scale, law) if rule in ("frsf", "brsf") else None
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
        if magnitudes is not None:
            self._draw_magnitudes(magnitudes)
        elif rule == "signed_init":
            self._freeze_signs(signs)

    def _draw_magnitudes(self, law: Law) -> None:
        """Rules "frsf" and "brsf": random magnitudes of root mean square `factor`, which is then in the law's scale."""
        low = 0.0 if law.startswith("uniform") else None
        if isinstance(self.factor, str):  # mean_abs: magnitudes of mean 1, times mean|W|
            self._draw(law, {"normal": math.sqrt(math.pi / 2), "sign": 1.0}.get(law, 2.0), low)
        else:
            self._draw(law, _law_scale(self.scale, law, self.factor), low)
            self.factor = 1.0

    def _freeze_signs(self, signs: str) -> None:
        """Rule "signed_init": keep the weight's signs, one bit each, or give the weight those of a formula."""
        if signs == "weight":
            packed = torch.ops.lgkernels.feedback_pack_signs(self.weight.detach().flatten(1), "reference")
            self.register_buffer("frozen_signs", packed, persistent=False)
        else:
            self._draw("sign", float(self.factor))
            self.sign_weight()

    @torch.no_grad()
    def sign_weight(self) -> None:
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

    def reset_parameters(self) -> None:
        """As torch's layer; with rule "signed_init" the new weight takes F's signs again."""
        super().reset_parameters()
        if getattr(self, "rule", None) == "signed_init" and self.feedback is not None:
            self.sign_weight()

    def _formula(self) -> tuple[Formula, dict[str, torch.Tensor]]:
        law, tensors = self._random()
        if self.rule != "signed_init":
            return Formula(
                "packed" if self.packed_signs else "weight",
                scale=self.factor,
                sign_plus=self.sign_zero == "plus",
                **law,
            ), tensors
        if self.frozen_signs is None:
            return Formula(**law), tensors
        return Formula("packed", scale=self.factor, sign_plus=True), {"packed": self.frozen_signs}

    def _rule_repr(self) -> str:
        zero = "" if self.sign_zero == "zero" else f", sign_zero={self.sign_zero!r}"
        return f"rule={self.rule!r}, scale={self.scale!r}{zero}{', packed_signs=True' if self.packed_signs else ''}"


class FeedbackAlignment(FeedbackLayer):
    """F random and fixed in a layer: what the linear layer and the convolution have in common."""

    rule = "fa"
    feedback_init: str | float

    def _set_rule(
        self,
        feedback_init: str | float = "kaiming",
        law: Law | None = None,
        *,
        seed: int = 0,
        stream: int = 0,
        impl: str = "auto",
    ) -> None:
        number = scale_of(feedback_init, self.weight.shape, "feedback_init")
        law = _law(feedback_init, law)
        self._set(seed=seed, stream=stream, impl=impl, feedback_init=feedback_init)
        self._draw(law, _law_scale(feedback_init, law, number))

    def _formula(self) -> tuple[Formula, dict[str, torch.Tensor]]:
        law, tensors = self._random()
        return Formula(**law), tensors

    def _rule_repr(self) -> str:
        return f"feedback_init={self.feedback_init!r}"
