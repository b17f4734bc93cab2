"""The LLS loss of a module: its options and its modulation, and a head for any block of the user's."""

from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..core.annotations import BlockOutput, Waveform
from ..core.ops import class_indices

__all__ = ["LLSHead"]

Modulation = Literal["vector", "matrix", "reduced"] | None


class Options(NamedTuple):
    """Options of a head, as the modules' constructors take them."""

    num_classes: int
    pool_size: int
    modulation: Modulation
    reduced_rows: int
    waveform: Waveform
    temperature: float
    label_smoothing: float
    impl: str

    def checked(self) -> "Options":
        """These, with plain numbers."""
        checks.choice("modulation", self.modulation, (None, "vector", "matrix", "reduced"))
        checks.choice("waveform", self.waveform, ("square", "cosine"))
        checks.positive("temperature", self.temperature)
        checks.between("label_smoothing", self.label_smoothing, 0.0, 1.0)
        checks.impl(self.impl)
        return self._replace(
            num_classes=constructors.size("num_classes", self.num_classes),
            pool_size=constructors.size("pool_size", self.pool_size),
            reduced_rows=constructors.size("reduced_rows", self.reduced_rows),
            temperature=checks.item(self.temperature),
            label_smoothing=checks.item(self.label_smoothing),
        )


class LLSModule(nn.Module):
    """What all three share: the options of the head, the modulation, the loss."""

    modulation: nn.Parameter | None

    def _set_head(self, head: Options, factory: dict[str, Any]) -> None:
        self.num_classes, self.pool_size, self.waveform = head.num_classes, head.pool_size, head.waveform
        self.temperature, self.label_smoothing, self.impl = head.temperature, head.label_smoothing, head.impl
        self.modulation = None
        if head.modulation is not None:
            rows = {"vector": (), "matrix": (head.num_classes,), "reduced": (head.reduced_rows,)}[head.modulation]
            # drawn from 0.01 N(0, 1) as the authors do
            self.modulation = nn.Parameter(0.01 * torch.randn((*rows, head.num_classes), **factory))

    def _loss(self, activation: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LF.lls_loss(
            activation,
            target,
            self.modulation,
            num_classes=self.num_classes,
            pool_size=self.pool_size,
            waveform=self.waveform,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )


class LLSHead(LLSModule):
    """Trains any block of yours by the LLS loss of its output, unfused: autograd runs inside the block.

    Args:
        block (nn.Module): maps x to (B, C, H, W) or (B, N).
        num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl: as
            :class:`LLSConvBlock`.

    ``forward(x, target)`` returns ``(out.detach(), loss)``; without target, or in evaluation, ``block(x)``.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.LLSHead(torch.nn.Linear(6, 8), num_classes=3, pool_size=8)
        >>> out, loss = block(torch.randn(4, 6), torch.tensor([1, 0, 2, 1]))
        >>> loss.backward()
        >>> block.block.weight.grad.shape
        torch.Size([8, 6])
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        num_classes: int,
        pool_size: int,
        modulation: Modulation = None,
        reduced_rows: int = 20,
        waveform: Waveform = "square",
        temperature: float = 0.5,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ) -> None:
        constructors.module("block", block)
        head = Options(num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl)
        head = head.checked()
        super().__init__()
        self.block = block
        self._set_head(head, {"device": next(block.parameters(), torch.empty(0)).device})

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        """`(block(x).detach(), loss)` in training with a target; else `block(x)`."""
        if target is None or not self.training:
            return self.block(x)
        checks.tensor("x", x)
        checks.integer("target", target)
        target = class_indices("target", target, self.num_classes, -100)  # before running statistics move
        out = self.block(x.detach())
        return out.detach(), self._loss(out, target)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, pool_size={self.pool_size}, waveform={self.waveform!r}"
