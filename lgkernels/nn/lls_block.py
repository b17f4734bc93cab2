"""What the two fused LLS blocks share: everything behind the layer."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..core import checks, constructors
from ..core.annotations import BlockOutput
from ..ops.lls import autograd as _lls
from ..ops.lls.options import BlockOptions
from .lls_head import HEAD_DEFAULTS, LLSModule, Options

Activation = Literal["leaky_relu", "relu", "gelu", "silu", "tanh", "identity"]

_FUSED = ("leaky_relu", "relu")
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def runs_as_written(module: nn.Module, original: type[nn.Module]) -> bool:
    """Nothing hooks or replaces the forward of `original`'s class (a parametrised weight is no matter)."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module).forward is original.forward and "forward" not in module.__dict__ and not hooked


def check_block(activation: Any, negative_slope: Any, max_pool: Any = False) -> None:
    checks.choice("activation", activation, (*_FUSED, *_FUNCTIONS))
    checks.number("negative_slope", negative_slope)
    checks.boolean("max_pool", max_pool)


_DIMENSIONS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Linear: (nn.BatchNorm1d, nn.InstanceNorm1d),
    nn.Conv1d: (nn.BatchNorm1d, nn.InstanceNorm1d),
    nn.Conv2d: (nn.BatchNorm2d, nn.InstanceNorm2d),
}
_OF_ONE_DIMENSION = tuple(getattr(nn, f"{kind}Norm{n}d") for kind in ("Batch", "Instance") for n in (1, 2, 3))


def check_norm(layer: Any, norm: Any) -> None:
    """Raise where torch's normalisation cannot take what the layer gives."""
    kind = next(kind for kind in _DIMENSIONS if isinstance(layer, kind))
    channels = layer.out_features if kind is nn.Linear else layer.out_channels
    if isinstance(norm, _OF_ONE_DIMENSION) and not isinstance(norm, _DIMENSIONS[kind]):
        fitting = " or ".join(f"nn.{fits.__name__}" for fits in _DIMENSIONS[kind])
        raise TypeError(f"norm must be of what an nn.{kind.__name__} gives ({fitting}), got {type(norm).__name__}")
    size = None  # where any fits
    if isinstance(norm, nn.modules.batchnorm._NormBase) and (norm.affine or norm.track_running_stats):
        size = norm.num_features or None  # 0: not yet initialised
    elif isinstance(norm, nn.GroupNorm):
        size = norm.num_channels
    elif isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and kind is nn.Linear:
        size = norm.normalized_shape[-1]
    if size not in (None, channels):
        raise ValueError(f"norm must be of the {channels} channels that {type(layer).__name__} gives, got {norm}")


def from_layers(
    cls: Any,
    layer: nn.Module,
    norm: Any,
    activation: Any,
    negative_slope: Any,
    max_pool: Any,
    num_classes: int,
    pool_size: int,
    options: dict[str, Any],
) -> tuple[Any, Options]:
    """A block without its modules, and the checked options of its head."""
    if norm is not None:
        constructors.module("norm", norm)
        check_norm(layer, norm)
    check_block("relu" if isinstance(activation, nn.Module) else activation, negative_slope, max_pool)
    if unknown := sorted(set(options) - set(HEAD_DEFAULTS)):
        raise TypeError(f"options must be among {', '.join(HEAD_DEFAULTS)}, got {', '.join(unknown)}")
    return cls.__new__(cls), Options(num_classes, pool_size, **HEAD_DEFAULTS | options).checked()


class LLSBlock(LLSModule):
    """What the two fused blocks share: everything behind the layer."""

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module,
        head: Options,
        factory: dict[str, Any],
        *,
        activation: str,
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
        checks.any_tensor("target", target)
        checks.same_device(x=x, target=target, weight=getattr(self.layer, "weight", None))
        if not target.is_floating_point() and self.unfused(x) is None:
            checks.integer("target", target)
            checks.shape("target", target, x.shape[:1], "one class index per row of x")
            return self._fused(x, target)
        target = self._checked_target(target, x.shape[0])  # before running statistics move
        activation = self._activation(x.detach())
        loss = self._loss(activation, target)
        return self._pooled(activation).detach(), loss

    def unfused(self, x: torch.Tensor | None = None) -> str | None:
        """What keeps the block from its kernels, by name; None where it runs fused. A target of probabilities (B, C)
        does too.

        Args:
            x (Tensor, optional): an input; tokens and sequences have no kernel.
        """
        usual: dict[str, Any] = dict(normalize=True, basis_scale=1.0, loss="cross_entropy", eps=1e-12)
        for name, value in usual.items():
            if getattr(self, name) != value:
                return f"{name}={getattr(self, name)!r}"
        if self._own_basis() is not None:
            return "a basis of its own"
        if self.activation not in _FUSED:
            return f"activation={self.activation!r}"
        if not isinstance(self.norm, nn.modules.batchnorm._BatchNorm) or self.norm.weight is None:
            return f"norm is {type(self.norm).__name__}"
        if not runs_as_written(self.norm, nn.BatchNorm2d):
            return f"norm, a {type(self.norm).__name__}, runs otherwise than torch's"
        if not self.norm.training:
            return "norm is in evaluation mode"
        if x is not None and x.dim() == 3:
            return "tokens or a sequence"
        return self._unfused_layer()

    def _fused(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.max_pool and min(self._output_size(x)) < 2:
            raise ValueError(
                f"max_pool needs a feature map of at least 2 x 2, got one of {self._output_size(x)} from "
                f"x of shape {checks.shape_of(x)}"
            )
        norm = self.norm
        momentum = 0.0 if norm.momentum is None else norm.momentum
        counted = norm.track_running_stats and norm.num_batches_tracked is not None  # None in what others converted
        if counted and norm.momentum is None:
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
        if counted:
            norm.num_batches_tracked.add_(1)
        return result

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        z = self._normalised(self.layer(x))
        if "act" in self._modules:
            return self.act(z)
        return F.leaky_relu(z, self.negative_slope) if self.activation in _FUSED else _FUNCTIONS[self.activation](z)

    def _normalised(self, z: torch.Tensor) -> torch.Tensor:
        if self.tokens and z.dim() == 3 and isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            return self.norm(z.flatten(0, 1)).view(z.shape)
        return self.norm(z)

    def _pooled(self, activation: torch.Tensor) -> torch.Tensor:
        if not self.max_pool:
            return activation
        return F.max_pool1d(activation, 2) if activation.dim() == 3 else F.max_pool2d(activation, 2)

    def _take(
        self,
        layer: nn.Module,
        norm: nn.Module | None,
        activation: Any,
        negative_slope: float,
        max_pool: bool,
        head: Options,
    ) -> None:
        """What `from_layers` makes of the modules: they themselves are the block's."""
        act, name = None, activation
        if isinstance(activation, nn.Module):
            known = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu"}.get(type(activation))
            if known is None or not runs_as_written(activation, type(activation)):
                act, name = activation, type(activation).__name__
            else:
                name, negative_slope = known, getattr(activation, "negative_slope", 0.0)
        weight: Any = layer.weight
        LLSBlock.__init__(
            self,
            layer,
            nn.Identity() if norm is None else norm,
            head,
            {"device": weight.device, "dtype": weight.dtype},
            activation=name,
            negative_slope=negative_slope,
            max_pool=max_pool,
        )
        if act is not None:
            self.act = act

    def _check_input(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    def _unfused_layer(self) -> str | None:
        """What of `layer` no kernel computes."""
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
            f"negative_slope={self.negative_slope}, max_pool={self.max_pool}{self._head_repr()}"
            + (f", unfused: {why}" if (why := self.unfused()) and self.norm.training else "")
        )
