"""LocalMixer, the network of local forward gradients: patches, groups of channels, and a head behind every block."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks, constructors
from ..core.annotations import Device

__all__ = ["GroupLinear", "LocalMixer", "LocalMixerBlock"]

Init = Literal["kaiming", "lecun", "constant"]
Stage = tuple[str, nn.Module]  # "token", "channel" or "group", and the linear layer

WIDTHS = {"S": 256, "M": 512, "L": 2048}
# (image size, channels, classes) by the patches a side, as published: MNIST, CIFAR-10, ImageNet
IMAGES = {1: (28, 1, 10), 8: (32, 3, 10), 32: (224, 3, 1000)}
EPS = 1e-5  # of all layer norms, which have no scale and shift


def std(init: Init, fan_in: int) -> float:
    """Of a layer's first weights."""
    if init == "constant":
        return 0.1
    return min((2.0 if init == "kaiming" else 1.0) / max(fan_in, 1) ** 0.5, 0.1)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class GroupLinear(nn.Module):
    """A linear layer of its own for each group of channels: (..., G, in_features) -> (..., G, out_features).

    Args:
        groups (int): G. in_features, out_features (int): of one group.
        bias (bool): whether there is one.
        device, dtype: of the parameters.

    Attributes: ``weight`` (G, out_features, in_features), ``bias`` (G, out_features) or None.

    Raises: ValueError, TypeError naming the argument.

    Source: Ren et al. (ICLR 2023), section 5.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> lnn.GroupLinear(4, 8, 8)(torch.ones(2, 4, 8)).shape
        torch.Size([2, 4, 8])
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = constructors.size("groups", groups)
        in_features = constructors.size("in_features", in_features)
        out_features = constructors.size("out_features", out_features)
        constructors.has_bias(bias)
        factory = constructors.factory(device, dtype)
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(groups, out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch's Linear: uniform within 1 / sqrt(in_features)."""
        bound = self.weight.shape[2] ** -0.5
        for parameter in self.parameters():
            parameter.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        checks.floating("x", x)
        groups, _, in_features = self.weight.shape
        if x.shape[-2:] != (groups, in_features):
            raise ValueError(f"x must have shape (..., {groups}, {in_features}), got {checks.shape_of(x)}")
        y = torch.einsum("...gc,gdc->...gd", x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        return f"groups={groups}, in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


def linear(kind: str, module: Any, x: Tensor) -> Tensor:
    """The linear map of a stage: over patches of (N, P, D), over channels, or over the channels of each group."""
    if kind == "token":
        return torch.matmul(module.weight, x) + module.bias.unsqueeze(1)
    return module(x)


class LocalMixerBlock(nn.Module):
    """One block of :class:`LocalMixer`: (N, P, in_features) -> (N, P, G, C), with a head of its own.

    Stages: a linear layer over the patches (not in the first block), one over all channels, one over the channels of
    each group. In front of each stage and behind it stands a layer norm without scale and shift, then a ReLU; the
    block's input is added before the last one where it has the right size (not in the first block).

    Args:
        in_features (int): channels of the input. width (int): D, channels of the output.
        groups (int): G, a divisor of D.
        patches (int): P. token_mixing (bool): whether the stage over the patches and the residual are there.
        outputs (int): of the head: classes, or the width of a projector.
        begin_norm, middle_norm (bool): the layer norms in front of the first stage, of the later ones.
        bias_factor (float): how often the biases of the stages over patches and channels are added: 1, and 2 in the
            published code.
        device, dtype: of the parameters.

    Attributes: ``token``, ``channel``, ``group``: the stages' layers; ``head``: a torch.nn.Linear.

    Raises: ValueError, TypeError naming the argument.

    Source: Ren et al. (ICLR 2023), section 5.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.LocalMixerBlock(12, 16, groups=4, patches=9, token_mixing=False, outputs=10)
        >>> block(torch.randn(2, 9, 12)).shape
        torch.Size([2, 9, 4, 4])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        groups: int,
        patches: int,
        token_mixing: bool,
        outputs: int,
        begin_norm: bool = True,
        middle_norm: bool = True,
        bias_factor: float = 1.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features = constructors.size("in_features", in_features)
        width = constructors.size("width", width)
        groups = constructors.size("groups", groups)
        patches = constructors.size("patches", patches)
        outputs = constructors.size("outputs", outputs)
        constructors.flags(token_mixing=token_mixing, begin_norm=begin_norm, middle_norm=middle_norm)
        bias_factor = checks.positive("bias_factor", bias_factor)
        if width % groups:
            raise ValueError(f"groups must divide width={width}, got {groups}")
        if token_mixing and in_features != width:
            raise ValueError(
                f"in_features must be width={width} where token_mixing is on (the residual), got {in_features}"
            )
        factory = constructors.factory(device, dtype)
        super().__init__()
        self.token = nn.Linear(patches, patches, **factory) if token_mixing else None
        self.channel = nn.Linear(in_features, width, **factory)
        self.group = GroupLinear(groups, width // groups, width // groups, **factory)
        self.head = nn.Linear(width, outputs, **factory)
        self.groups = groups
        self.begin_norm, self.middle_norm, self.bias_factor = begin_norm, middle_norm, bias_factor

    def stages(self) -> list[Stage]:
        """The linear layers in order, with their kinds."""
        token: list[Stage] = [] if self.token is None else [("token", self.token)]
        return [*token, ("channel", self.channel), ("group", self.group)]

    def has_norm(self, stage: int) -> bool:
        """Whether a layer norm stands in front of the stage of that number."""
        return self.middle_norm if stage else self.begin_norm

    def grouped(self, x: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, G, C)."""
        return x.unflatten(-1, (self.groups, -1))

    def forward(
        self, x: Tensor, *, linear: Callable[[str, Any, Tensor], Tensor] = linear, added: Sequence[Tensor] | None = None
    ) -> Tensor:
        """x (N, P, in_features) -> (N, P, G, C). `linear`: what computes a stage's layer; `added`: a tensor for each
        stage, added in front of its ReLU."""
        checks.floating("x", x)
        checks.dims("x", x, (3,), "(N, P, channels)")
        patches = x.shape[1] if self.token is None else self.token.in_features
        checks.shape("x", x, (len(x), patches, self.channel.in_features), "(N, P, in_features)")
        y = x
        for i, (kind, module) in enumerate(self.stages()):
            y = self.grouped(y) if kind == "group" else y
            z = linear(kind, module, norm(y) if self.has_norm(i) else y)
            if self.bias_factor != 1 and kind != "group":
                bias: Any = module.bias
                z = z + (self.bias_factor - 1) * (bias.unsqueeze(1) if kind == "token" else bias)
            u = norm(z)
            if kind == "group" and self.token is not None:
                u = u + self.grouped(x)
            y = F.relu(u if added is None else u + added[i])
        return y


class LocalMixer(nn.Module):
    """The network of Ren et al.: patches of an image, blocks that learn by themselves, a read-out for predictions.

    ``config`` is ``"size/patches/groups"``: S, M and L have 256, 512 and 2048 channels; patches on each side of the
    image; groups of channels. With 1 patch there is 1 block, else 4. Published: ``"S/1/1"``, ``"M/1/16"`` (MNIST),
    ``"M/8/16"``, ``"L/8/64"`` (CIFAR-10), ``"L/32/64"`` (ImageNet), with 0.27 to 26.6 million parameters; image and
    classes are theirs where not given. No positional embedding; patches are flattened by row, column, channel.

    It is trained by :class:`lgkernels.training.ForwardGradientTrainer`, by local losses and forward gradients, or as
    any module. The read-out is the mean over the patches, a layer norm and a linear layer, which starts at 0.

    Args:
        config (str): as above.
        image_size (int, optional): height and width, divisible by the patches on a side.
        in_channels (int, optional): of the image. num_classes (int, optional): K.
        head (str): ``"supervised"``: each block has a classifier, behind a layer norm of each group;
            ``"contrastive"``: a projector, without that norm.
        projector (int): its width.
        blocks, width (int, optional): other than the config's.
        init (str): weights are N(0, s^2), s = min(2 / sqrt(fan_in), 0.1) for ``"kaiming"``, min(1 / sqrt(fan_in), 0.1)
            for ``"lecun"``, 0.1 for ``"constant"``; biases 0.
        begin_norm, middle_norm, last_norm (bool), head_norm (bool, optional): layer norms in front of a block's first
            stage, of its later ones, of the read-out, of the blocks' heads (None: as ``head`` says).
        double_bias (bool): the published code adds the biases of the stages over patches and channels twice.
        device, dtype: of the parameters.

    Raises: ValueError, TypeError naming the argument.

    Source: Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses" (ICLR 2023), section 5, table 2.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> model = lnn.LocalMixer("M/8/16")
        >>> sum(p.numel() for p in model.parameters()), model(torch.rand(2, 3, 32, 32)).shape
        (918770, torch.Size([2, 10]))
    """

    def __init__(
        self,
        config: str = "M/8/16",
        *,
        image_size: int | None = None,
        in_channels: int | None = None,
        num_classes: int | None = None,
        head: Literal["supervised", "contrastive"] = "supervised",
        projector: int = 128,
        blocks: int | None = None,
        width: int | None = None,
        init: Init = "kaiming",
        begin_norm: bool = True,
        middle_norm: bool = True,
        last_norm: bool = True,
        head_norm: bool | None = None,
        double_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size, side, groups = _parse(config)
        theirs = IMAGES.get(side, IMAGES[1])
        image = [
            constructors.size(name, default if value is None else value)
            for name, value, default in zip(
                ("image_size", "in_channels", "num_classes"), (image_size, in_channels, num_classes), theirs
            )
        ]
        checks.choice("head", head, ("supervised", "contrastive"))
        projector = constructors.size("projector", projector)
        count = constructors.size("blocks", (1 if side == 1 else 4) if blocks is None else blocks)
        width = constructors.size("width", WIDTHS[size] if width is None else width)
        checks.choice("init", init, ("kaiming", "lecun", "constant"))
        constructors.flags(begin_norm=begin_norm, middle_norm=middle_norm, last_norm=last_norm, double_bias=double_bias)
        head_norm = head == "supervised" if head_norm is None else head_norm
        checks.boolean("head_norm", head_norm)
        if image[0] % side:
            raise ValueError(f"image_size must be divisible by the {side} patches of {config!r}, got {image[0]}")
        if width % groups:
            raise ValueError(f"width must be divisible by the {groups} groups of {config!r}, got {width}")
        factory = constructors.factory(device, dtype)
        super().__init__()
        self.config, self.side, self.head, self.init = config, side, head, init
        self.image_size, self.in_channels, self.num_classes = image
        self.last_norm, self.head_norm = last_norm, head_norm
        self.blocks = nn.ModuleList(
            LocalMixerBlock(
                width if i else (self.image_size // side) ** 2 * self.in_channels,
                width,
                groups=groups,
                patches=side**2,
                token_mixing=i > 0,
                outputs=projector if head == "contrastive" else self.num_classes,
                begin_norm=begin_norm,
                middle_norm=middle_norm,
                bias_factor=2.0 if double_bias else 1.0,
                **factory,
            )
            for i in range(count)
        )
        self.readout = nn.Linear(width, self.num_classes, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew, from torch's generator."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "readout.weight":
                parameter.zero_()
            else:
                parameter.normal_(0.0, std(self.init, parameter.shape[-1]))

    def patches(self, x: Tensor) -> Tensor:
        """(N, P, height * width * channels of a patch) of images (N, C, H, W); what has three sizes is returned."""
        checks.floating("x", x)
        side, length = self.side, self.image_size // self.side
        if x.dim() == 3:
            sizes = *x.shape[:1], side**2, length**2 * self.in_channels
            checks.shape("x", x, sizes, "the patches of N images and their channels")
            return x
        checks.shape("x", x, (*x.shape[:1], self.in_channels, self.image_size, self.image_size), "N images")
        x = x.reshape(len(x), self.in_channels, side, length, side, length)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(x), side**2, length**2 * self.in_channels)

    def summary(self, features: Tensor) -> Tensor:
        """(N, D) in front of the read-out, of the last block's output (N, P, G, C)."""
        pooled = features.mean(1).flatten(1)
        return norm(pooled) if self.last_norm else pooled

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W), or of patches (N, P, channels of a patch)."""
        x = self.patches(x)
        for block in self.blocks:
            features = block(x)
            x = features.flatten(-2)
        return self.readout(self.summary(features))

    def extra_repr(self) -> str:
        return f"{self.config!r}, head={self.head!r}, init={self.init!r}"


def _parse(config: Any) -> tuple[str, int, int]:
    """`(size, patches on a side, groups)`."""
    constructors.instance("config", config, str, "a str like 'M/8/16'")
    parts = config.split("/")
    if len(parts) != 3 or parts[0] not in WIDTHS or not all(p.isdecimal() and int(p) > 0 for p in parts[1:]):
        raise ValueError(
            f"config must be 'size/patches/groups' with size one of {', '.join(WIDTHS)} and two numbers, got {config!r}"
        )
    return parts[0], int(parts[1]), int(parts[2])
