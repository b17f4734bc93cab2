"""Recurrent layered nets that settle: dense and convolutional, with feedback weights of their own."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core import checks, constructors
from ..core.ops import wide
from ..functional.equilibrium import ep_settle
from ..ops.equilibrium.activations import activity
from ..ops.equilibrium.options import ACTIVATIONS, LOSSES, SCHEDULES

__all__ = ["EquilibriumConvNet", "EquilibriumMLP"]

Device = torch.device | str | int | None
Activation = Literal["sigmoid", "dsilu", "hard_sigmoid", "clipped_relu"]
Loss = Literal["cross_entropy", "mse"]
Schedule = Literal["synchronous", "asynchronous"]
_DEVIATION = 0.87962566103423978  # of a normal law that is cut at two deviations


class _EquilibriumNet(nn.Module):
    """`shapes`: edge -> shape of its kernel, in order; a bias for each edge upwards, and the readout's."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        upwards: dict[str, int],
        dynamics: tuple[Any, Any, Any, Any, Any, Any],
        angle: Any,
        factory: dict[str, Any],
    ) -> None:
        activation, loss, schedule, steps, tolerance, impl = dynamics
        checks.choice("activation", activation, ACTIVATIONS)
        checks.choice("schedule", schedule, SCHEDULES)
        steps = checks.integer_between("steps", steps, 0, 2**31)
        tolerance = None if tolerance is None else checks.positive("tolerance", tolerance)
        checks.impl(impl)
        turned = checks.between("angle", angle, 0, 180)
        super().__init__()
        self.activation, self.loss, self.schedule = activation, loss, schedule
        self.steps, self.tolerance, self.impl, self.angle = steps, tolerance, impl, turned
        self.weights = nn.ParameterDict()
        for edge, shape in shapes.items():
            self.weights[f"{edge}/kernel"] = nn.Parameter(torch.empty(shape, **factory))
            if edge in upwards:
                self.weights[f"{edge}/bias"] = nn.Parameter(torch.empty(upwards[edge], **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kernels of LeCun's normal law, biases 0, and feedback weights turned to `angle`."""
        for key, value in self.weights.items():
            if key.endswith("bias"):
                nn.init.zeros_(value)
            else:
                fan_in = value.shape[1:].numel() if value.dim() == 4 else value.shape[0]
                std = fan_in**-0.5 / _DEVIATION
                nn.init.trunc_normal_(value, 0.0, std, -2 * std, 2 * std)
        self.rotate(self.angle)

    @torch.no_grad()
    def rotate(self, angle: float) -> None:
        """Feedback weights := sin(angle) themselves + cos(angle) the forward ones (transposed where dense), in degrees.

        0: symmetric; 90: as they are. Where both are of one law and independent, it is their angle.
        """
        angle = math.radians(checks.between("angle", angle, 0, 180))
        for key, back in self.weights.items():
            low_high = "-".join(reversed(key.removesuffix("/kernel").split("-"))) + "/kernel"
            if "/bias" in key or low_high not in self.weights or self._upwards(key):
                continue
            forward = self.weights[low_high]
            back.mul_(math.sin(angle)).add_(forward if back.dim() == 4 else forward.t(), alpha=math.cos(angle))

    def _upwards(self, key: str) -> bool:
        return key.replace("/kernel", "/bias") in self.weights

    def named_weights(self) -> dict[str, Tensor]:
        """The dict that the functions of the family take; its tensors are the parameters."""
        return dict(self.weights.items())

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over the values of a dict with the same keys and shapes, as `named_weights` gives."""
        constructors.instance("weights", weights, dict, "a dict of tensors by name")
        if set(weights) != set(self.weights.keys()):
            wrong = sorted(set(weights) ^ set(self.weights.keys()))
            raise ValueError(f"weights must have the keys of this net, got a dict that differs in {wrong}")
        for key, value in weights.items():
            checks.floating("weights", value)
            checks.shape("weights", value, self.weights[key].shape, key)
        with torch.no_grad():
            for key, value in weights.items():
                self.weights[key].copy_(value)

    def input_of(self, x: Tensor) -> Tensor:
        """x as the functions take it."""
        return x

    def settle(self, x: Tensor, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The free state: layer -> u, after `steps` steps from zero or from `state`. No graph is recorded."""
        return ep_settle(self.named_weights(), self.input_of(x), state, steps=self.steps, **self.dynamics())

    def dynamics(self) -> dict[str, Any]:
        """The options of :func:`lgkernels.functional.ep_settle` besides the steps."""
        return dict(
            activation=self.activation, loss=self.loss, schedule=self.schedule, tolerance=self.tolerance, impl=self.impl
        )

    def activities(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """r = phi(u) of every layer."""
        return {layer: activity(wide(u), self.activation) for layer, u in state.items()}

    def readout(self, state: dict[str, Tensor]) -> Tensor:
        """Logits (B, C): the readout of the last layer's activities, or these themselves."""
        r = self.activities({"out": constructors.entry("state", state, "out")})["out"].flatten(1)
        if "readout/Dense_0/kernel" not in self.weights:
            return r
        kernel = self.weights["readout/Dense_0/kernel"]
        return torch.addmm(self.weights["readout/Dense_0/bias"], r.to(kernel.dtype), kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the free state: differentiable in the readout alone."""
        return self.readout(self.settle(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation}, loss={self.loss}, steps={self.steps}, schedule={self.schedule}"


class EquilibriumMLP(_EquilibriumNet):
    r"""A dense net whose layers settle together: forward weights, feedback weights of their own, and a readout.

    .. math:: u_1 = x W_{x1} + b_1 + r_2 W_{21}, \quad u_2 = r_1 W_{12} + b_2 + r_o W_{o2}, \quad
        u_o = r_2 W_{2o} + b_o, \qquad r = \phi(u)

    Published for Fashion-MNIST: ``EquilibriumMLP()``, 784-256-256-10 with a readout 10-10, 150 steps. Trained by
    :class:`lgkernels.training.EquilibriumTrainer`.

    Args:
        in_features (int): of the input, flattened. hidden (sequence of int): units of the layers l1, l2, ...
        out_features (int): units of the layer ``out``. num_classes (int, optional): of the readout; None: out_features.
        topology (str): ``"chain"``: a feedback edge for each forward edge between layers; ``"loop"``: one from ``out``
            to ``l1`` alone.
        activation, loss, schedule, tolerance: as :func:`lgkernels.functional.ep_settle`; with ``loss="mse"`` there is
            no readout, and ``out`` has a unit a class.
        steps (int): of the free phase.
        angle (float): between forward and feedback weights at the start, in degrees; 0: symmetric. 0, 90 and 180 always
            hold, others where the layers above the input are of one width: of the published 256-256-10 net, where the
            two have deviations of their own, 30 gives about 39 and 60 about 67 degrees.
        impl (str): ``"auto"`` or a backend.
        device, dtype: of the parameters.

    Raises: ValueError, TypeError naming the argument.

    Source: Laborieux & Zenke (ICLR 2024), section 5 and figures 3 and 4.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> net = lnn.EquilibriumMLP(4, (8, 6), 5, num_classes=3, angle=90)
        >>> net(torch.rand(2, 4)).shape, sorted(net.settle(torch.rand(2, 4)))
        (torch.Size([2, 3]), ['l1', 'l2', 'out'])
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden: Iterable[int] = (256, 256),
        out_features: int = 10,
        *,
        num_classes: int | None = None,
        topology: Literal["chain", "loop"] = "chain",
        activation: Activation = "sigmoid",
        loss: Loss = "cross_entropy",
        schedule: Schedule = "synchronous",
        steps: int = 150,
        tolerance: float | None = None,
        angle: float = 0.0,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        units = [constructors.size("in_features", in_features), *_sizes("hidden", hidden)]
        units.append(constructors.size("out_features", out_features))
        classes = constructors.size("num_classes", units[-1] if num_classes is None else num_classes)
        checks.choice("topology", topology, ("chain", "loop"))
        factory = constructors.factory(device, dtype)
        checks.choice("loss", loss, LOSSES)
        if loss == "mse" and classes != units[-1]:
            raise ValueError(f"num_classes must be out_features={units[-1]} where loss='mse', got {classes}")
        names = ["in", *(f"l{i}" for i in range(1, len(units) - 1)), "out"]
        shapes: dict[str, tuple[int, ...]] = {}
        upwards = {}
        for i in range(1, len(units)):
            shapes[f"{names[i - 1]}-{names[i]}"] = units[i - 1], units[i]
            upwards[f"{names[i - 1]}-{names[i]}"] = units[i]
            if i > 1 and topology == "chain":
                shapes[f"{names[i]}-{names[i - 1]}"] = units[i], units[i - 1]
        if topology == "loop" and len(units) > 2:
            shapes["out-l1"] = units[-1], units[1]
        if loss != "mse":
            shapes["readout/Dense_0"], upwards["readout/Dense_0"] = (units[-1], classes), classes
        super().__init__(shapes, upwards, (activation, loss, schedule, steps, tolerance, impl), angle, factory)
        self.in_features, self.num_classes = units[0], classes

    def input_of(self, x: Tensor) -> Tensor:
        checks.floating("x", x)
        if x.dim() < 2 or x.shape[1:].numel() != self.in_features:
            raise ValueError(f"x must be (B, {self.in_features}) when flattened, got shape {checks.shape_of(x)}")
        return x.flatten(1)


class EquilibriumConvNet(_EquilibriumNet):
    r"""A convolutional net whose layers settle together; each 3x3 convolution is followed by a 2x2 softmax pool.

    Feedback goes through the vector-Jacobian products of pools and convolutions with weights of their own. Published
    for CIFAR-10, CIFAR-100 and ImageNet 32x32: ``EquilibriumConvNet()``, 128-256-512-512 channels, 250 steps.

    Args:
        in_channels (int): of the image, which has 32x32 pixels where there are four layers: a layer halves it, the last
            one takes 2 pixels off first, and one pixel must be left.
        channels (sequence of int): of the layers conv1, conv2, ..., and of ``out``.
        num_classes (int): of the readout.
        activation, loss, schedule, tolerance, steps, angle, impl, device, dtype: as :class:`EquilibriumMLP`.

    Raises: ValueError, TypeError naming the argument.

    Source: Laborieux & Zenke (ICLR 2024), section 5, table 2; Laborieux & Zenke (NeurIPS 2022).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> net = lnn.EquilibriumConvNet(3, (4, 6, 8, 8), num_classes=5, steps=10)
        >>> net(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Iterable[int] = (128, 256, 512, 512),
        *,
        num_classes: int = 10,
        activation: Activation = "dsilu",
        loss: Loss = "cross_entropy",
        schedule: Schedule = "synchronous",
        steps: int = 250,
        tolerance: float | None = None,
        angle: float = 0.0,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [constructors.size("in_channels", in_channels), *_sizes("channels", channels)]
        classes = constructors.size("num_classes", num_classes)
        factory = constructors.factory(device, dtype)
        checks.choice("loss", loss, LOSSES)
        if loss == "mse" and classes != sizes[-1]:
            raise ValueError(f"num_classes must be the last of channels, {sizes[-1]}, where loss='mse', got {classes}")
        names = ["in", *(f"conv{i}" for i in range(1, len(sizes) - 1)), "out"]
        shapes: dict[str, tuple[int, ...]] = {}
        upwards = {}
        for i in range(1, len(sizes)):
            kernel = sizes[i], sizes[i - 1], 3, 3
            shapes[f"{names[i - 1]}-{names[i]}"] = kernel
            upwards[f"{names[i - 1]}-{names[i]}"] = sizes[i]
            if i > 1:
                shapes[f"{names[i]}-{names[i - 1]}"] = kernel
        if loss != "mse":
            shapes["readout/Dense_0"], upwards["readout/Dense_0"] = (sizes[-1], classes), classes
        super().__init__(shapes, upwards, (activation, loss, schedule, steps, tolerance, impl), angle, factory)
        self.in_channels, self.num_classes = sizes[0], classes


def _sizes(name: str, value: Any) -> list[int]:
    items = constructors.several(name, value, (int, np.integer, Tensor), "ints")
    return [constructors.size(name, item) for item in items]
