"""Local losses that need no labels: reconstruction of a unit's input, and Barlow twins of two views."""

import torch
import torch.nn.functional as F
from torch import nn

from ..core import checks, constructors
from ..core.annotations import BlockOutput
from ..core.ops import wide
from .local_loss import LocalHead, pooled

__all__ = ["BarlowTwinsHead", "ReconstructionHead"]


class ReconstructionHead(LocalHead):
    r"""A block whose output, the next unit's input, has to hold its own input: a decoder D reconstructs it.

    .. math:: L = \mathrm{mean}\,(D(h) - x)^2

    Args:
        block (nn.Module): maps x (B, T, in_channels) to h (B, T, channels), or (B, in_channels, H, W) to
            (B, channels, H', W'), which is enlarged to H x W; or (B, in_channels) to (B, channels).
        channels (int), in_channels (int): of h and of x. hidden (int): width of the decoder's hidden layer; 0: none.
        aux (nn.Module): as :class:`LocalClassifier`.

    ``forward(x, target)`` returns ``(h.detach(), loss)``; the target is not used. The unit with the embedding takes
    token ids, which are no features: give it a :class:`LocalClassifier`.

    Source: "Local learning on transformers via feature reconstruction", 2022.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> unit = lnn.ReconstructionHead(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8, 8)
        >>> h, loss = unit(torch.randn(2, 5, 8), torch.tensor([0, 1]))
        >>> h.shape, loss.shape
        (torch.Size([2, 5, 8]), torch.Size([]))
    """

    def __init__(
        self, block: nn.Module, channels: int, in_channels: int, *, hidden: int = 0, aux: nn.Module | None = None
    ) -> None:
        super().__init__(block, aux)
        channels, in_channels = constructors.size("channels", channels), constructors.size("in_channels", in_channels)
        hidden = constructors.size("hidden", hidden, 0)
        self.decoder = (
            nn.Linear(channels, in_channels)
            if not hidden
            else nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, in_channels))
        )

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        if target is None or not self.training:
            return self.block(x)
        checks.floating("x", x)
        x = x.detach()
        out = self.block(x)
        return out.detach(), self._difference(out if self.auxiliary is None else self.auxiliary(out), x)

    def _difference(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if h.dim() == 4:
            decoded = self.decoder(h.movedim(1, -1)).movedim(-1, 1)
            if decoded.shape[2:] != x.shape[2:]:
                decoded = F.interpolate(decoded, x.shape[2:], mode="bilinear", align_corners=False)
        else:
            decoded = self.decoder(h)
        checks.shape("x", x, decoded.shape, "that of the decoder's output: in_channels, and the block's positions")
        return F.mse_loss(wide(decoded), wide(x))


class BarlowTwinsHead(LocalHead):
    r"""A block trained without labels: the features of two views of a sample agree, and differ from each other.

    .. math:: C = \frac1N \sum_n \hat z_n \hat z_n'^T, \qquad
              L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2

    with z the pooled and projected output, normalised over the batch to mean 0 and variance 1 a feature.

    Args:
        block (nn.Module): gives (B, C, H, W), (B, T, C) or (B, C); rows i and i + B/2 are two views of a sample.
        channels (int): C. hidden (int), dim (int): sizes of the projection's two layers; hidden 0: one layer.
        off_diagonal (float): lambda.
        aux (nn.Module): as :class:`LocalClassifier`.

    ``forward(x, target)`` returns ``(out.detach(), loss)``; the target is not used.

    Source: Zbontar, Jing, Misra, LeCun, Deny, "Barlow twins", ICML 2021; block by block: Siddiqui, Krueger, LeCun,
    Deny, "Blockwise self-supervised learning at scale", 2023.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.BarlowTwinsHead(torch.nn.Conv2d(3, 8, 3), 8, dim=4)
        >>> out, loss = block(torch.randn(6, 3, 6, 6), torch.zeros(3))
        >>> out.shape, loss.shape
        (torch.Size([6, 8, 4, 4]), torch.Size([]))
    """

    def __init__(
        self,
        block: nn.Module,
        channels: int,
        *,
        hidden: int = 0,
        dim: int = 128,
        off_diagonal: float = 0.005,
        aux: nn.Module | None = None,
    ) -> None:
        super().__init__(block, aux)
        channels, dim = constructors.size("channels", channels), constructors.size("dim", dim)
        hidden = constructors.size("hidden", hidden, 0)
        constructors.not_negative("off_diagonal", off_diagonal)
        self.off_diagonal = checks.item(off_diagonal)
        self.projection = (
            nn.Linear(channels, dim)
            if not hidden
            else nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        )

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if len(out) % 2:
            raise ValueError(f"x must have two views of each sample, an even number of rows, got {len(out)}")
        one, two = (_standardised(z) for z in wide(self.projection(pooled(out))).chunk(2))
        correlation = one.t() @ two / len(one)
        squares = (correlation - torch.eye(len(correlation), device=correlation.device, dtype=torch.float32)).square()
        diagonal = squares.diagonal().sum()
        return diagonal + self.off_diagonal * (squares.sum() - diagonal)


def _standardised(z: torch.Tensor) -> torch.Tensor:
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
