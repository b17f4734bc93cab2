"""InfoPro's units, of the family local_loss."""

import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..core.annotations import BlockOutput
from ..core.carried import Carried
from ..core.ops import class_indices
from .local_loss import LocalHead

__all__ = ["InfoProUnit", "infopro_weights"]


def infopro_weights(units: int, first: Sequence[float], last: Sequence[float]) -> list[tuple[float, ...]]:
    """[(lambda_1, lambda_2)] of all units but the last: from `first` to `last` in equal steps.

    Example:
        >>> import lgkernels.nn as lnn
        >>> lnn.infopro_weights(4, (1.0, 0.0), (0.0, 1.0))
        [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """
    units = constructors.size("units", units)
    first = constructors.numbers("first", first, (2,), "a pair of numbers")
    last = constructors.numbers("last", last, (2,), "a pair of numbers")
    steps = [h / (units - 2) if units > 2 else 0.0 for h in range(units - 1)]
    return [tuple(a * (1 - r) + b * r for a, b in zip(first, last)) for r in steps]


def _std(value: float | Sequence[float], channels: int) -> torch.Tensor:
    std = _per_channel("std", value, channels)
    if not (std > 0).all():
        raise ValueError(f"std must be greater than 0 in every channel, got {checks.got(value)}")
    return std


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> torch.Tensor:
    expected = f"a number, or one for each of {channels} channels"
    value = checks.item(value)
    if hasattr(value, "__len__"):
        value = constructors.numbers(name, value, (1, channels), expected)
    else:
        checks.number(name, value, expected)
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)


def _widened(widen: float, *sizes: int) -> list[int]:
    checks.positive("widen", widen)
    inner = [int(checks.item(widen) * size) for size in sizes]
    if min(inner) < 1:
        raise ValueError(f"widen must leave at least 1 of {min(sizes)} channels, got {widen}")
    return inner


class InfoProUnit(Carried, LocalHead):
    r"""A unit of InfoPro: keep what reconstructs the image, and what tells the class.

    .. math::
        L = \lambda_1\, \mathrm{BCE}(\mathrm{decoder}(h),\; \mathrm{image}) + \lambda_2\, L_y(\mathrm{aux}(h),\; y)

    Decoder: bilinear to the image's size, 3x3 convolution to 12 channels, normalised, ReLU, 3x3 convolution, sigmoid.
    aux ("1c2f"): 3x3 convolution, to 2C channels with stride 2 where C is below 64, else to C with stride 1;
    normalised, ReLU, average pool, linear, ReLU, linear; L_y: the supervised contrastive loss, or cross entropy. Both
    heads are trained with the unit.

    Args:
        block (nn.Module): gives (B, C, H, W).
        channels (int): C. num_classes (int): for cross entropy. image_channels (int).
        weights (pair of float): lambda_1, lambda_2; see :func:`infopro_weights`. A head of weight 0 is left out.
        loss (str): ``"supcon"`` or ``"cross_entropy"``.
        temperature (float): of the contrastive loss. width (int): of the linear layers.
        widen (float): factor of all channels and features inside of both heads, rounded down.
        first (InfoProUnit, optional): the network's first unit, whose input is the image; None: this is it.
        mean, std (float or sequence): of the image's normalisation: its pixels are ``image * std + mean``, in [0, 1].

    Source: Wang et al., "Revisiting Locally Supervised Learning" (ICLR 2021), and its code (CIFAR).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> first = lnn.InfoProUnit(torch.nn.Conv2d(3, 8, 3), 8, 5, 3)
        >>> second = lnn.InfoProUnit(torch.nn.Conv2d(8, 8, 3, 2), 8, 5, 3, first=first)
        >>> out, loss = first(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))
        >>> second(out, torch.tensor([0, 1, 1, 0]))[0].shape
        torch.Size([4, 8, 2, 2])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        block: nn.Module,
        channels: int,
        num_classes: int,
        image_channels: int,
        *,
        weights: Sequence[float] = (1.0, 1.0),
        loss: Literal["supcon", "cross_entropy"] = "supcon",
        temperature: float = 0.07,
        width: int = 128,
        widen: float = 1.0,
        first: "InfoProUnit | None" = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(block)
        channels, num_classes = constructors.size("channels", channels), constructors.size("num_classes", num_classes)
        image_channels, width = constructors.size("image_channels", image_channels), constructors.size("width", width)
        weights = constructors.numbers("weights", weights, (2,), "a pair of numbers")
        checks.choice("loss", loss, ("supcon", "cross_entropy"))
        checks.positive("temperature", temperature)
        inner = _widened(widen, 12, 2 * channels if channels < 64 else channels, width)
        if first is not None:
            constructors.instance("first", first, InfoProUnit, "an InfoProUnit")
        if not any(weights):
            raise ValueError(f"weights must not all be 0: nothing would be learnt, got {weights}")
        self.num_classes = num_classes
        self.weights, self.kind, self.temperature = weights, loss, checks.item(temperature)
        self._first = (first,)  # a tuple: not a submodule
        self._last_reader: tuple[InfoProUnit | None] = (None,)
        self._image: torch.Tensor | None = None  # of the batch in training, where this is the first unit
        self._seen: Any = None  # a weak reference to it, for as long as the caller keeps the batch
        statistics = {"mean": _per_channel("mean", mean, image_channels), "std": _std(std, image_channels)}
        self._statistics = {name: value.tolist() for name, value in statistics.items()}
        for name, value in statistics.items():
            self.register_buffer(name, torch.tensor(value.tolist(), dtype=torch.float32, device=None), persistent=False)
        self.decoder = self.aux = None
        if weights[0]:
            self.decoder = nn.Sequential(
                nn.Conv2d(channels, inner[0], 3, padding=1),
                nn.BatchNorm2d(inner[0]),
                nn.ReLU(),
                nn.Conv2d(inner[0], image_channels, 3, padding=1),
            )
        if weights[1]:
            self.aux = nn.Sequential(
                nn.Conv2d(channels, inner[1], 3, 2 if channels < 64 else 1, 1, bias=False),
                nn.BatchNorm2d(inner[1]),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(inner[1], inner[2]),
                nn.ReLU(),
                nn.Linear(inner[2], width if loss == "supcon" else num_classes),
            )
        for head in filter(None, (self.decoder, self.aux)):
            for layer in head:
                if isinstance(layer, nn.Conv2d):  # as its code's network
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

        if self.decoder is not None:
            (first or self)._last_reader = (self,)  # of those made so far; a tuple: not a submodule

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        if self.training and target is not None and self._first[0] is None:
            checks.tensor("x", x)
            self._image = x.detach()
            self._seen = None if torch.compiler.is_compiling() else weakref.ref(x)
        return super().forward(x, target)

    def _take_image(self) -> torch.Tensor:
        """The batch that the first unit saw. The last unit that reads it lets it go: no batch outlives its step."""
        first = self._first[0] or self
        image = first._image
        if image is None and first._seen is not None:
            image = first._seen()
        if image is None:
            raise RuntimeError("the first InfoProUnit has not seen an image yet: call it before this one")
        if first._last_reader[0] is self:
            first._image = None
        return image.detach()

    def train(self, mode: bool = True) -> "InfoProUnit":
        """As any module's; evaluation drops the last batch."""
        if not mode:
            self._image = self._seen = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_image": None, "_seen": None}  # copies and files hold no batch

    def known(self, name: str) -> torch.Tensor:
        return torch.tensor(self._statistics[name], dtype=torch.float32, device="cpu")

    def checked(self, target: torch.Tensor) -> torch.Tensor:
        checks.integer("target", target)
        classify = self.aux is not None and self.kind == "cross_entropy"
        return class_indices("target", target, self.num_classes, -100) if classify else target

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = out.new_zeros((), dtype=torch.float32)
        if self.decoder is not None:
            image = self._take_image()
            logits = self.decoder(F.interpolate(out, image.shape[-2:], mode="bilinear", align_corners=True))
            # with logits: the sigmoid is in it, and it stays finite; pixels may leave [0, 1] by rounding
            pixels = (image * self.std + self.mean).clamp(0, 1)
            total = total + self.weights[0] * F.binary_cross_entropy_with_logits(logits.float(), pixels.float())
        if self.aux is not None:
            z = self.aux(out)
            value = (
                LF.supcon_loss(z, target, temperature=self.temperature)
                if self.kind == "supcon"
                else F.cross_entropy(z.float(), target)
            )
            total = total + self.weights[1] * value
        return total
