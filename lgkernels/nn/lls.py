"""LLS (Local Learning rule inspired by neural activity Synchronization): the fused convolutional and linear blocks."""

from typing import Any, Literal

import torch
from torch import nn

from ..core import checks, constructors
from ..core.annotations import Device, Int2, Waveform
from .lls_block import Activation, LLSBlock, check_block, from_layers, runs_as_written
from .lls_head import LLSHead, Loss, Modulation, Options

__all__ = ["LLSConvBlock", "LLSHead", "LLSLinearBlock"]


class LLSConvBlock(LLSBlock):
    r"""Conv2d, BatchNorm2d, LeakyReLU (or ReLU), optional 2x2 max-pool, trained by its own LLS loss.

    ``forward(x, target)`` returns ``(out.detach(), loss)``. The local gradients are taken inside the forward, in
    closed form (one pass over the pre-activation to normalise, activate, pool and gather what the gradients of the
    normalisation need; one in place for its gradient), so the graph holds no activation: ``loss.backward()`` only
    hands the gradients over, once. No gradient reaches ``x``. With ``target=None`` or in evaluation it returns
    ``out`` as an ordinary block does. The head sees the activation before the max-pool. Where ``norm`` is frozen
    (``block.norm.eval()``), ``layer`` or ``norm`` carry hooks, another module has taken their place (SyncBatchNorm,
    an adapter), or an option has no kernel, the block runs unfused, by autograd: ``unfused()`` says by name why.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as ``nn.Conv2d``. The bias has a zero gradient
            (batch normalisation follows) and only shifts the running mean.
        dilation, groups, padding_mode: as ``nn.Conv2d``; others than the usual ones run unfused.
        num_classes (int): C.
        pool_size (int): P of the head, d = out_channels * P^2.
        modulation (str, optional): None is LLS, ``"vector"`` LLS-M, ``"matrix"`` LLS-MxM, ``"reduced"`` LLS-MxM with
            ``reduced_rows`` basis rows.
        waveform, temperature, label_smoothing: see :func:`lgkernels.functional.lls_loss`.
        basis, normalize, basis_scale, loss, eps: of the same function; others than the usual ones run unfused.
        activation (str): ``"leaky_relu"`` with ``negative_slope``, or ``"relu"``; ``"gelu"``, ``"silu"``, ``"tanh"``
            and ``"identity"`` run unfused.
        max_pool (bool): return the 2x2 max-pool of the activation.
        impl (str): backend; see :func:`lgkernels.functional.lls_loss`.

    Shapes: x (B, in_channels, H, W), target (B,), or (B, num_classes) probabilities (unfused), out (B, out_channels,
    H', W').
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
        dilation: Int2 = 1,
        groups: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        num_classes: int,
        pool_size: int,
        modulation: Modulation = None,
        reduced_rows: int = 20,
        waveform: Waveform = "square",
        temperature: float = 0.5,
        label_smoothing: float = 0.0,
        basis: torch.Tensor | None = None,
        normalize: bool = True,
        basis_scale: float = 1.0,
        loss: Loss = "cross_entropy",
        eps: float = 1e-12,
        activation: Activation = "leaky_relu",
        negative_slope: float = 0.01,
        max_pool: bool = False,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constructors.conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        factory = constructors.factory(device, dtype)
        head = Options(num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl)
        head = head._replace(basis=basis, normalize=normalize, basis_scale=basis_scale, loss=loss, eps=eps).checked()
        check_block(activation, negative_slope, max_pool)
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **factory
            ),
            nn.BatchNorm2d(out_channels, **factory),
            head,
            factory,
            activation=activation,
            negative_slope=negative_slope,
            max_pool=max_pool,
        )
        self.in_channels = in_channels

    @classmethod
    def from_layers(
        cls,
        conv: nn.Module,
        norm: nn.Module | None = None,
        *,
        activation: Activation | nn.Module = "leaky_relu",
        negative_slope: float = 0.01,
        max_pool: bool = False,
        num_classes: int,
        pool_size: int,
        **options: Any,
    ) -> "LLSConvBlock":
        """A block of the modules themselves: their weights, statistics and modes; an optimizer of theirs goes on.

        Args:
            conv (nn.Conv2d, or nn.Conv1d for sequences (B, C, L)). norm (nn.Module, optional): kernels know
                BatchNorm2d; any other, or none, runs unfused.
            activation (str or nn.Module): as in the constructor, or a module, of which nn.ReLU and nn.LeakyReLU fuse.
            options: of the head, as in the constructor, and ``impl``.

        Example:
            >>> import torch, lgkernels.nn as lnn
            >>> conv, norm = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
            >>> block = lnn.LLSConvBlock.from_layers(conv, norm, activation=torch.nn.ReLU(), num_classes=9, pool_size=2)
            >>> block.layer is conv, block.unfused()
            (True, None)
        """
        constructors.instance("conv", conv, (nn.Conv2d, nn.Conv1d), "an nn.Conv2d or nn.Conv1d")
        block, head = from_layers(
            cls, conv, norm, activation, negative_slope, max_pool, num_classes, pool_size, options
        )
        block._take(conv, norm, activation, negative_slope, max_pool, head)
        block.in_channels, block.tokens = conv.in_channels, False
        return block

    def _unfused_layer(self) -> str | None:
        layer = self.layer
        if not runs_as_written(layer, nn.Conv2d):
            return f"layer, a {type(layer).__name__}, runs otherwise than nn.Conv2d"
        if layer.padding == "same" and any(k % 2 == 0 for k in layer.kernel_size):
            return f"padding='same' with kernel_size={layer.kernel_size}"  # more zeros on one side than on the other
        usual = dict(dilation=(1, 1), groups=1, padding_mode="zeros")
        return next((f"{n}={getattr(layer, n)!r}" for n, v in usual.items() if getattr(layer, n) != v), None)

    def _geometry(self) -> tuple[list[int], list[int]]:
        padding = self.layer.padding
        if isinstance(padding, str):
            padding = [k // 2 if padding == "same" else 0 for k in self.layer.kernel_size]
        return list(self.layer.stride), list(padding)

    def _output_size(self, x: torch.Tensor) -> tuple[int, ...]:
        stride, padding = self._geometry()
        return tuple(
            (n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, self.layer.kernel_size, stride)
        )

    def _check_input(self, x: torch.Tensor) -> None:
        checks.floating("x", x)
        if isinstance(self.layer, nn.Conv1d):
            checks.dims("x", x, (3,), f"(B, {self.in_channels}, L)")
        else:
            checks.dims("x", x, (4,), f"(B, {self.in_channels}, H, W)")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels (in_channels), got shape {checks.shape_of(x)}")


class LLSLinearBlock(LLSBlock):
    """Linear, BatchNorm1d, LeakyReLU (or ReLU), trained by its own LLS loss: the linear twin of `LLSConvBlock`.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        pool_size (int): the activation is pooled along its features to this length; ``out_features`` pools nothing,
            more repeats features.
        others: as :class:`LLSConvBlock`.

    Shapes: x (B, in_features), target (B,), out (B, out_features). Tokens x (B, T, in_features) run unfused: their
    normalisation is over B and T, and the head pools T to ``pool_size``.

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
        basis: torch.Tensor | None = None,
        normalize: bool = True,
        basis_scale: float = 1.0,
        loss: Loss = "cross_entropy",
        eps: float = 1e-12,
        activation: Activation = "leaky_relu",
        negative_slope: float = 0.01,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        constructors.linear(in_features, out_features, bias)
        factory = constructors.factory(device, dtype)
        head = Options(num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl)
        head = head._replace(basis=basis, normalize=normalize, basis_scale=basis_scale, loss=loss, eps=eps).checked()
        check_block(activation, negative_slope)
        super().__init__(
            nn.Linear(in_features, out_features, bias=bias, **factory),
            nn.BatchNorm1d(out_features, **factory),
            head,
            factory,
            activation=activation,
            negative_slope=negative_slope,
        )
        self.in_features = in_features

    @classmethod
    def from_layers(
        cls,
        linear: nn.Module,
        norm: nn.Module | None = None,
        *,
        activation: Activation | nn.Module = "leaky_relu",
        negative_slope: float = 0.01,
        num_classes: int,
        pool_size: int,
        **options: Any,
    ) -> "LLSLinearBlock":
        """A block of the modules themselves, as :meth:`LLSConvBlock.from_layers`. The kernels know BatchNorm1d.

        Example:
            >>> import torch, lgkernels.nn as lnn
            >>> block = lnn.LLSLinearBlock.from_layers(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), activation="gelu",
            ...                                        num_classes=3, pool_size=8)
            >>> block.unfused()
            "activation='gelu'"
        """
        constructors.instance("linear", linear, nn.Linear, "an nn.Linear")
        block, head = from_layers(cls, linear, norm, activation, negative_slope, False, num_classes, pool_size, options)
        block._take(linear, norm, activation, negative_slope, False, head)
        block.in_features = linear.in_features
        return block

    def _unfused_layer(self) -> str | None:
        if runs_as_written(self.layer, nn.Linear):
            return None
        return f"layer, a {type(self.layer).__name__}, runs otherwise than nn.Linear"

    def _check_input(self, x: torch.Tensor) -> None:
        checks.floating("x", x)
        checks.dims("x", x, (2, 3), f"(B, {self.in_features}), or (B, T, {self.in_features}) for tokens")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features (in_features), got shape {checks.shape_of(x)}")
