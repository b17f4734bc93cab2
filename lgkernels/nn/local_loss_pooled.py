"""A trained classifier in the place of LLS's periodic basis, of the family local_loss."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..core.ops import class_indices, wide
from .local_loss import LocalHead

__all__ = ["PooledClassifier"]


class PooledClassifier(LocalHead):
    r"""A block trained by a linear classifier of its output, pooled to a few positions: the "LocalLosses" of LLS's
    authors, against which they compare their fixed basis.

    .. math:: x = \mathrm{flatten}(\mathrm{pool}(a)), \quad z = x\,\mathrm{pool}_d(W)^T / T, \quad
        L = \mathrm{cross\ entropy}(z, t)

    The trained W (num_classes, hidden) is drawn from 0.1 N(0, 1) and pooled along its rows to the size d of x, which is
    not normalised. :class:`LocalClassifier` pools to one position and has a weight of its own for each channel.

    Args:
        block (nn.Module): gives (B, C, H, W), pooled to (B, C, P, P), d = C P^2; (B, T, C), pooled to (B, P, C),
            d = C P; or (B, N), pooled to d = P.
        num_classes (int). pool_size (int): P.
        hidden (int): columns of W. Default: 2048, as published.
        temperature (float): T. Default: 0.5. label_smoothing (float): in [0, 1].
        aux (nn.Module): between the block and the classifier; it learns with it.

    ``forward(x, target)`` returns ``(out.detach(), loss)``; without target, or in evaluation, ``block(x)``. The
    target holds class indices (B,), or probabilities (B, num_classes).

    Raises: ValueError, TypeError naming the argument.

    Source: Apolinario, Roy, Roy, WACV 2025, "LocalLosses" of their code.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.PooledClassifier(torch.nn.Conv2d(3, 8, 3), 5, pool_size=2)
        >>> out, loss = block(torch.ones(2, 3, 6, 6), torch.tensor([0, 4]))
        >>> out.requires_grad, loss.requires_grad
        (False, True)
    """

    def __init__(
        self,
        block: nn.Module,
        num_classes: int,
        *,
        pool_size: int,
        hidden: int = 2048,
        temperature: float = 0.5,
        label_smoothing: float = 0.0,
        aux: nn.Module | None = None,
    ) -> None:
        super().__init__(block, aux)
        num_classes, hidden = constructors.size("num_classes", num_classes), constructors.size("hidden", hidden)
        self.pool_size = constructors.size("pool_size", pool_size)
        checks.positive("temperature", temperature)
        checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
        self.temperature, self.label_smoothing = checks.item(temperature), checks.item(label_smoothing)
        drawn = torch.randn(num_classes, hidden, dtype=None, device=constructors.device_of(block))
        self.weight = nn.Parameter(0.1 * drawn)

    def checked(self, target: torch.Tensor) -> torch.Tensor:
        if isinstance(target, torch.Tensor) and target.is_floating_point() and target.dim() == 2:
            checks.shape("target", target, (len(target), self.weight.shape[0]), "one row of probabilities per row of x")
            return target
        checks.integer("target", target)
        return class_indices("target", target, self.weight.shape[0])

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if out.dim() == 4:
            out = F.adaptive_avg_pool2d(out, self.pool_size)
        else:  # the last dimension of (B, N), the second of (B, T, C)
            out = F.adaptive_avg_pool1d(out.transpose(1, 2) if out.dim() == 3 else out, self.pool_size)
        x = out.flatten(1)
        weight = F.adaptive_avg_pool1d(wide(self.weight), x.shape[1]) / self.temperature
        if target.is_floating_point():
            logits = wide(F.linear(x, weight.to(x.dtype)))
            return F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=self.label_smoothing)
        return LF.local_cross_entropy(x, weight, None, target, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"num_classes={self.weight.shape[0]}, pool_size={self.pool_size}, temperature={self.temperature}"
