"""The LLS loss of a module: its options and its modulation, and a head for any block of the user's."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..core.annotations import BlockOutput, Waveform
from ..core.ops import class_indices, wide
from ..ops.lls.options import LOSSES
from . import model_input

__all__ = ["LLSHead"]

Modulation = Literal["vector", "matrix", "reduced"] | None
Loss = Literal["cross_entropy", "hard_sigmoid_mse"]
Layout = Literal["tokens", "sequence"]


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
    basis: torch.Tensor | None = None
    normalize: bool = True
    basis_scale: float = 1.0
    loss: Loss = "cross_entropy"
    eps: float = 1e-12

    def checked(self) -> "Options":
        """These, with plain numbers."""
        checks.choice("modulation", self.modulation, (None, "vector", "matrix", "reduced"))
        checks.choice("waveform", self.waveform, ("square", "cosine"))
        checks.positive("temperature", self.temperature)
        checks.between("label_smoothing", self.label_smoothing, 0.0, 1.0)
        checks.impl(self.impl)
        checks.boolean("normalize", self.normalize)
        checks.choice("loss", self.loss, LOSSES)
        if self.loss != "cross_entropy" and self.label_smoothing:
            raise ValueError(f"label_smoothing must be 0 with loss={self.loss!r}, got {self.label_smoothing}")
        checks.number("basis_scale", self.basis_scale)
        checks.positive("eps", self.eps)
        known = self._replace(
            num_classes=constructors.size("num_classes", self.num_classes),
            pool_size=constructors.size("pool_size", self.pool_size),
            reduced_rows=constructors.size("reduced_rows", self.reduced_rows),
            temperature=checks.item(self.temperature),
            label_smoothing=checks.item(self.label_smoothing),
            basis_scale=checks.item(self.basis_scale),
            eps=checks.item(self.eps),
        )
        if self.basis is not None:
            checks.floating("basis", self.basis)
            checks.dims("basis", self.basis, (2,), "(K, d)")
            if self.basis.shape[0] != known.rows:
                raise ValueError(
                    f"basis must have {known.rows} rows (num_classes, or reduced_rows of modulation='reduced'), got "
                    f"shape {checks.shape_of(self.basis)}"
                )
        return known

    @property
    def rows(self) -> int:
        """K: rows of the basis."""
        return self.reduced_rows if self.modulation == "reduced" else self.num_classes


#: Options of a head beside the two that have no default.
HEAD_DEFAULTS: dict[str, Any] = (
    dict(modulation=None, reduced_rows=20, waveform="square", temperature=0.5, label_smoothing=0.0, impl="auto")
    | Options._field_defaults
)


class LLSModule(nn.Module):
    """What all three share: the options of the head, the modulation, the loss."""

    modulation: nn.Parameter | None
    normalize = True  # defaults: those of modules that were saved whole before they had these
    basis_scale = 1.0
    loss: Loss = "cross_entropy"
    eps = 1e-12
    tokens = True  # whether an output of three dimensions is (B, T, C), not (B, C, L)

    def _set_head(self, head: Options, factory: dict[str, Any]) -> None:
        self.num_classes, self.pool_size, self.waveform = head.num_classes, head.pool_size, head.waveform
        self.temperature, self.label_smoothing, self.impl = head.temperature, head.label_smoothing, head.impl
        self.normalize, self.basis_scale = head.normalize, head.basis_scale
        self.loss, self.eps = head.loss, head.eps
        self.register_buffer("basis", None if head.basis is None else head.basis.detach().to(factory.get("device")))
        self.modulation = None
        if head.modulation is not None:
            rows = {"vector": (), "matrix": (head.num_classes,), "reduced": (head.reduced_rows,)}[head.modulation]
            # drawn from 0.01 N(0, 1) as the authors do
            self.modulation = nn.Parameter(0.01 * torch.randn((*rows, head.num_classes), **factory))

    def _checked_target(self, target: torch.Tensor, rows: int) -> torch.Tensor:
        """Class indices (B,), -100 for none, or probabilities (B, C)."""
        if isinstance(target, torch.Tensor) and target.is_floating_point() and target.dim() == 2:
            checks.shape("target", target, (rows, self.num_classes), "one row of probabilities per row of x")
            return target
        checks.integer("target", target)
        checks.shape("target", target, (rows,), "one class index per row of x")
        return class_indices("target", target, self.num_classes, -100)

    def _loss(self, activation: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        pool_size = self.pool_size
        if activation.dim() == 3:  # positions are pooled to `pool_size`, as those of an image
            channels_first = activation.transpose(1, 2) if self.tokens else activation
            activation = F.adaptive_avg_pool1d(channels_first, pool_size).flatten(1)
            pool_size = activation.shape[1]
        if target.is_floating_point():
            return self._loss_of_probabilities(activation, target, pool_size)
        return LF.lls_loss(
            activation,
            target,
            self.modulation,
            num_classes=self.num_classes,
            pool_size=pool_size,
            waveform=self.waveform,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            normalize=self.normalize,
            eps=self.eps,
            basis=self._own_basis(),
            basis_scale=self.basis_scale,
            loss=self.loss,
            impl=self.impl,
        )

    def _loss_of_probabilities(self, activation: torch.Tensor, target: torch.Tensor, pool_size: int) -> torch.Tensor:
        """:func:`lgkernels.functional.lls_loss` in plain torch, which no kernel has for targets that are no indices."""
        a = wide(activation)
        x = F.adaptive_avg_pool2d(a, pool_size) if a.dim() == 4 else F.adaptive_avg_pool1d(a.unsqueeze(1), pool_size)
        x = x.flatten(1)
        if self.normalize:
            x = F.normalize(x, dim=1, eps=self.eps)
        m = None if self.modulation is None else self.modulation.to(x.dtype)
        rows = m.shape[0] if m is not None and m.dim() == 2 else self.num_classes
        basis = self._own_basis()
        if basis is None:
            basis = LF.lls_basis(rows, x.shape[1], waveform=self.waveform, device=x.device)
        checks.shape("basis", basis, (rows, x.shape[1]), "rows, and the size of the pooled latents")
        s = x @ basis.to(x.dtype).t() * self.basis_scale
        z = (s if m is None else s * m if m.dim() == 1 else s @ m) / self.temperature
        target = target.to(x.dtype)
        if self.loss == "cross_entropy":
            return F.cross_entropy(z, target, label_smoothing=self.label_smoothing)
        y = (z / 4 + 0.5).clamp(0, 1)
        # straight through, as lls_loss: the gradient at z is 2 (y - t) / C, the hard sigmoid's slope left out
        difference = (y - target).detach()
        return difference.square().mean() + (2 * difference * (z - z.detach())).mean()

    def _head_repr(self) -> str:
        """Of the options that are not the usual ones."""
        usual = {"normalize": True, "basis_scale": 1.0, "loss": "cross_entropy", "eps": 1e-12}
        others = [f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        basis = self._own_basis()
        return "".join(others) + ("" if basis is None else f", basis={tuple(basis.shape)}")

    def _own_basis(self) -> torch.Tensor | None:
        """The basis that replaces the periodic one."""
        return self._buffers.get("basis")


class LLSHead(LLSModule):
    """Trains any block of yours by the LLS loss of its output, unfused: autograd runs inside the block.

    Args:
        block (nn.Module): maps x to (B, C, H, W), (B, N), or one of the two below.
        num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl: as
            :class:`LLSConvBlock`.
        basis, normalize, basis_scale, loss, eps: of :func:`lgkernels.functional.lls_loss`.
        layout (str): what three dimensions are: ``"tokens"`` (B, T, C) or ``"sequence"`` (B, C, L). T or L is pooled to
            ``pool_size``, so that d = C * pool_size.

    ``forward(x, target)`` returns ``(out.detach(), loss)``; without target, or in evaluation, ``block(x)``. The target
    holds class indices (B,), or probabilities (B, num_classes).

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
        basis: torch.Tensor | None = None,
        normalize: bool = True,
        basis_scale: float = 1.0,
        loss: Loss = "cross_entropy",
        eps: float = 1e-12,
        layout: Layout = "tokens",
        impl: str = "auto",
    ) -> None:
        constructors.module("block", block)
        head = Options(num_classes, pool_size, modulation, reduced_rows, waveform, temperature, label_smoothing, impl)
        head = head._replace(basis=basis, normalize=normalize, basis_scale=basis_scale, loss=loss, eps=eps).checked()
        checks.choice("layout", layout, ("tokens", "sequence"))
        super().__init__()
        self.block = block
        self.tokens = layout == "tokens"
        self._set_head(head, {"device": constructors.device_of(block)})

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        """`(block(x).detach(), loss)` in training with a target; else `block(x)`."""
        if target is None or not self.training:
            return self.block(x)
        model_input.check(x)
        target = self._checked_target(target, model_input.rows(x))  # before running statistics move
        out = self.block(model_input.detached(x))
        return out.detach(), self._loss(out, target)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, pool_size={self.pool_size}, waveform={self.waveform!r}{self._head_repr()}"
        )
