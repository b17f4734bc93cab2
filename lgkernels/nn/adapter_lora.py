"""LoRA: a frozen layer and a low-rank change of its weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..functional import adapter as _changes
from .adapter_base import Adapter, factory, linear_sizes, probability

__all__ = ["LoRAConv2d", "LoRALinear"]


class _LoRA(Adapter):
    def __init__(
        self,
        base: Any,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        rank: int,
        alpha: float,
        use_rslora: bool,
        dropout: float,
        autocast_adapter_dtype: bool,
    ) -> None:
        """`shapes`: of a and b, without the rank, which is a's first dimension and b's second."""
        dropout = probability("dropout", dropout)
        checks.boolean("autocast_adapter_dtype", autocast_adapter_dtype)
        super().__init__(base, rank, alpha, use_rslora)  # which freezes the base: all else is checked
        self.dropout = dropout
        (a, (out,)), new = shapes, factory(base, autocast_adapter_dtype)
        self.a = nn.Parameter(torch.empty(self.rank, *a, **new))
        self.b = nn.Parameter(torch.zeros(out, self.rank, **new))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def _product(self) -> torch.Tensor:
        return (self.b @ self.a.flatten(1)).view(len(self.b), *self.a.shape[1:])

    def _drops(self) -> bool:
        return self.dropout > 0

    def _dropped(self, x: torch.Tensor, scale: float) -> torch.Tensor | None:
        return self._change_of_output(F.dropout(x, self.dropout), scale) if self.dropout else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("dropout", 0.0)


class LoRALinear(_LoRA):
    """A frozen `nn.Linear` (or transformers' Conv1D) and a low-rank change: :func:`lgkernels.functional.lora_linear`
    with scale = alpha / rank, or alpha / sqrt(rank) with ``use_rslora``.

    ``a`` starts as torch's linear weights, ``b`` at 0: the layer starts as its base. They are float32 beside a
    half-precision weight, unless ``autocast_adapter_dtype=False``. ``dropout`` is that of the change's input.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.LoRALinear(torch.nn.Linear(8, 4), rank=2)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        24
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 1,
        alpha: float = 4.0,
        *,
        use_rslora: bool = False,
        dropout: float = 0.0,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        out, width = linear_sizes(base)
        super().__init__(base, ((width,), (out,)), rank, alpha, use_rslora, dropout, autocast_adapter_dtype)

    def _layer(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return LF.lora_linear(x, self._matrix(), self.base.bias, a=self.a, b=self.b, scale=scale)

    def _change_of_output(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return _changes.lora_linear_change(x, self.a, self.b, scale)


class LoRAConv2d(_LoRA):
    """A frozen `nn.Conv2d` and a low-rank change of its weight (out, in / groups, kh, kw). ``a`` (rank, in / groups,
    kh, kw) is a convolution to ``rank`` channels, ``b`` (out, rank) a 1 x 1 convolution; see :class:`LoRALinear`.

    With groups, or a padding other than zeros, the weight's change is built in full at each forward.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.LoRAConv2d(torch.nn.Conv2d(3, 8, 3, padding="same"), rank=2, use_rslora=True)
        >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
        [(2, 3, 3, 3), (8, 2)]
    """

    def __init__(
        self,
        base: nn.Conv2d,
        rank: int = 1,
        alpha: float = 4.0,
        *,
        use_rslora: bool = False,
        dropout: float = 0.0,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        constructors.instance("base", base, nn.Conv2d, "a torch.nn.Conv2d")
        shapes = tuple(base.weight.shape[1:]), (base.out_channels,)
        super().__init__(base, shapes, rank, alpha, use_rslora, dropout, autocast_adapter_dtype)

    def _factors(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """As those of a Kronecker product whose w1 is the number 1."""
        return self.b.new_ones(1, 1), (self.b, self.a.flatten(1))

    def _layer(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        b = self.base
        if b.groups > 1 or b.padding_mode != "zeros":
            return b._conv_forward(x, self._added(b.weight, self._product() * scale), b.bias)
        w1, w2 = self._factors()
        return LF.lokr_conv2d(x, b.weight, b.bias, b.stride, b.padding, b.dilation, w1=w1, w2=w2, scale=scale)

    def _change_of_output(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        b = self.base
        if b.groups > 1 or b.padding_mode != "zeros" or isinstance(b.padding, str):
            return b._conv_forward(x, (self._product() * scale).to(b.weight.dtype), None)
        return _changes.lokr_conv2d_change(
            x, (b.stride, b.padding, b.dilation, 1), b.kernel_size, *self._factors(), scale
        )
