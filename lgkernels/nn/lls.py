"""LLS (Local Learning rule inspired by neural activity Synchronization): the fused convolutional and linear blocks."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..core import checks, constructors
from ..core.annotations import BlockOutput, Device, Int2, Waveform
from ..core.ops import class_indices
from ..ops.lls import autograd as _lls
from ..ops.lls.options import BlockOptions
from .lls_head import LLSHead, LLSModule, Modulation, Options

__all__ = ["LLSConvBlock", "LLSHead", "LLSLinearBlock"]

Activation = Literal["leaky_relu", "relu"]


def _runs_as_written(module: nn.Module, original: type[nn.Module]) -> bool:
    """Nothing hooks or replaces the forward of `original`'s class (a parametrised weight is no matter)."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module).forward is original.forward and "forward" not in module.__dict__ and not hooked


def _check_block(activation: Any, negative_slope: Any, max_pool: Any = False) -> None:
    checks.choice("activation", activation, ("leaky_relu", "relu"))
    checks.number("negative_slope", negative_slope)
    checks.boolean("max_pool", max_pool)


class _LLSBlock(LLSModule):
    """What the two fused blocks share: everything behind the layer."""

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module,
        head: Options,
        factory: dict[str, Any],
        *,
        activation: Activation,
        negative_slope: float,
        max_pool: bool = False,
    ) -> None:
        super().__init__()
        self.layer: Any = layer
        self.norm: Any = norm
        self._set_head(head, factory)
        self.activation, self.max_pool = activation, max_pool
        self.negative_slope = 0.0 if activation == "relu" else checks.item(negative_slope)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        """`(out.detach(), loss)` in training with a target; else `out` with its ordinary graph."""
        self._check_input(x)
        if target is None or not self.training:
            return self._pooled(self._activation(x))
        checks.integer("target", target)
        checks.shape("target", target, x.shape[:1], "one class index per row of x")
        checks.same_device(x=x, target=target, weight=getattr(self.layer, "weight", None))
        if self._fuses():
            return self._fused(x, target)
        target = class_indices("target", target, self.num_classes, -100)  # before running statistics move
        activation = self._activation(x.detach())
        loss = self._loss(activation, target)
        return self._pooled(activation).detach(), loss

    def _fuses(self) -> bool:
        """False where the layer or the norm has become something that the kernels do not compute."""
        return (
            self.norm.training
            and self.norm.weight is not None
            and self._plain_layer()
            and _runs_as_written(self.norm, nn.BatchNorm2d)
        )

    def _fused(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.max_pool and min(self._output_size(x)) < 2:
            raise ValueError(
                f"max_pool needs a feature map of at least 2 x 2, got one of {self._output_size(x)} from "
                f"x of shape {checks.shape_of(x)}"
            )
        norm = self.norm
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.track_running_stats and norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked + 1)  # cumulative average, as torch: reads a device value
        result = _lls.lls_block(
            x,
            self.layer.weight,
            self.layer.bias,
            norm.weight,
            norm.bias,
            self.modulation,
            norm.running_mean,
            norm.running_var,
            target,
            BlockOptions(
                self.waveform,
                *self._geometry(),
                momentum,
                norm.eps,
                self.negative_slope,
                self.max_pool,
                self.num_classes,
                self.pool_size,
                self.temperature,
                self.label_smoothing,
            ),
            self.impl,
        )
        if norm.track_running_stats:
            norm.num_batches_tracked.add_(1)
        return result

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.norm(self.layer(x)), self.negative_slope)

    def _pooled(self, activation: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(activation, 2) if self.max_pool else activation

    def _check_input(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    def _plain_layer(self) -> bool:
        """Whether `layer` is still the one of the constructor."""
        raise NotImplementedError

    def _geometry(self) -> tuple[list[int], list[int]]:
        """Stride and padding of a convolution."""
        return [], []

    def _output_size(self, x: torch.Tensor) -> tuple[int, ...]:
        """Height and width behind a convolution."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        modulation = None if self.modulation is None else tuple(self.modulation.shape)
        return (
            f"num_classes={self.num_classes}, pool_size={self.pool_size}, modulation={modulation}, "
            f"waveform={self.waveform!r}, temperature={self.temperature}, "
            f"label_smoothing={self.label_smoothing}, activation={self.activation!r}, "
            f"negative_slope={self.negative_slope}, max_pool={self.max_pool}"
        )


class LLSConvBlock(_LLSBlock):
    r"""Conv2d, BatchNorm2d, LeakyReLU (or ReLU), optional 2x2 max-pool, trained by its own LLS loss.

    ``forward(x, target)`` returns ``(out.detach(), loss)``. The local gradients are taken inside the forward, in
    closed form (one pass over the pre-activation to normalise, activate, pool and gather what the gradients of the
    normalisation need; one in place for its gradient), so the graph holds no activation: ``loss.backward()`` only
    hands the gradients over, once. No gradient reaches ``x``. With ``target=None`` or in evaluation it returns
    ``out`` as an ordinary block does. The head sees the activation before the max-pool. Where ``norm`` is frozen
    (``block.norm.eval()``), ``layer`` or ``norm`` carry hooks, or another module has taken their place (SyncBatchNorm,
    an adapter), the block runs unfused, by autograd.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as ``nn.Conv2d``. The bias has a zero gradient
            (batch normalisation follows) and only shifts the running mean.
        num_classes (int): C.
        pool_size (int): P of the head, d = out_channels * P^2.
        modulation (str, optional): None is LLS, ``"vector"`` LLS-M, ``"matrix"`` LLS-MxM, ``"reduced"`` LLS-MxM with
            ``reduced_rows`` basis rows.
        waveform, temperature, label_smoothing: see :func:`lgkernels.functional.lls_loss`.
        activation (str): ``"leaky_relu"`` with ``negative_slope``, or ``"relu"``.
        max_pool (bool): return the 2x2 max-pool of the activation.
        impl (str): backend; see :func:`lgkernels.functional.lls_loss`.

    Shapes: x (B, in_channels, H, W), target (B,), out (B, out_channels, H', W').
    Parameters: ``layer.weight``, ``layer.bias``, ``norm.*``, ``modulation``.
    Raises: ValueError or TypeError naming the argument. Source: Apolinario, Roy, Roy, WACV 2025.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.LLSConvBlock(3, 8, 3, padding=1, num_classes=10, pool_size=2)
        >>> out, loss = block(torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 9, 3]))
        >>> loss.backward()
        >>> out.shape, out.requires_grad, block.layer.weight.grad.shape
        (torch.Size([4, 8, 8, 8]), False, torch.Size([8, 3, 3, 3]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Int2,
        stride: Int2 = 1,
        padding: str | Int2 = 0,
        bias: bool = True,
        *,
        num_classes: int,
        pool_size: int,
        modulation: Modulation = None,
        reduced_rows: int = 20,
        waveform: Waveform = "square",
        temperature: float = 0.5,
        label_smoothing: float = 0.0,
        activation: Activation = "leaky_relu",
        negative_slope: float = 0.01,
        max_pool: bool = False,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constructors.conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        factory = constructors.factory(device, dtype)
        head = Options(num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl)
        head = head.checked()
        _check_block(activation, negative_slope, max_pool)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias, **factory),
            nn.BatchNorm2d(out_channels, **factory),
            head,
            factory,
            activation=activation,
            negative_slope=negative_slope,
            max_pool=max_pool,
        )
        self.in_channels = in_channels

    def _plain_layer(self) -> bool:
        layer = self.layer
        return (
            _runs_as_written(layer, nn.Conv2d)
            and layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
        )

    def _geometry(self) -> tuple[list[int], list[int]]:
        padding = self.layer.padding
        if isinstance(padding, str):
            if padding == "same" and any(k % 2 == 0 for k in self.layer.kernel_size):
                raise ValueError(f"padding='same' needs an odd kernel_size, got {self.layer.kernel_size}")
            padding = [k // 2 if padding == "same" else 0 for k in self.layer.kernel_size]
        return list(self.layer.stride), list(padding)

    def _output_size(self, x: torch.Tensor) -> tuple[int, ...]:
        stride, padding = self._geometry()
        return tuple(
            (n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, self.layer.kernel_size, stride)
        )

    def _check_input(self, x: torch.Tensor) -> None:
        checks.floating("x", x)
        checks.dims("x", x, (4,), f"(B, {self.in_channels}, H, W)")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels (in_channels), got shape {checks.shape_of(x)}")


class LLSLinearBlock(_LLSBlock):
    """Linear, BatchNorm1d, LeakyReLU (or ReLU), trained by its own LLS loss: the linear twin of `LLSConvBlock`.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        pool_size (int): the activation is pooled along its features to this length; ``out_features`` pools nothing,
            more repeats features.
        others: as :class:`LLSConvBlock`.

    Shapes: x (B, in_features), target (B,), out (B, out_features).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.LLSLinearBlock(6, 8, num_classes=3, pool_size=8, modulation="vector")
        >>> out, loss = block(torch.randn(4, 6), torch.tensor([1, 0, 2, 1]))
        >>> out.shape, loss.shape
        (torch.Size([4, 8]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_classes: int,
        pool_size: int,
        modulation: Modulation = None,
        reduced_rows: int = 20,
        waveform: Waveform = "square",
        temperature: float = 0.5,
        label_smoothing: float = 0.0,
        activation: Activation = "leaky_relu",
        negative_slope: float = 0.01,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constructors.linear(in_features, out_features, bias)
        factory = constructors.factory(device, dtype)
        head = Options(num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl)
        head = head.checked()
        _check_block(activation, negative_slope)
        super().__init__(
            nn.Linear(in_features, out_features, bias=bias, **factory),
            nn.BatchNorm1d(out_features, **factory),
            head,
            factory,
            activation=activation,
            negative_slope=negative_slope,
        )
        self.in_features = in_features

    def _plain_layer(self) -> bool:
        return _runs_as_written(self.layer, nn.Linear)

    def _check_input(self, x: torch.Tensor) -> None:
        checks.floating("x", x)
        checks.dims("x", x, (2,), f"(B, {self.in_features})")
        if x.shape[1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features (in_features), got shape {checks.shape_of(x)}")
