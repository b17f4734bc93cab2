"""The last block of a locally trained network."""

import torch
import torch.nn.functional as F
from torch import nn


class ClassifierBlock(nn.Module):
    """Wraps the final classifier: ordinary cross entropy on a detached input.

    Args:
        module (nn.Module): maps (B, ...) to logits (B, C), usually an ``nn.Linear``.
        label_smoothing (float): of the cross entropy. Default: 0.

    ``forward(x, target)`` returns ``(logits.detach(), loss)``; without target, or in evaluation, the logits with
    their ordinary graph.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.ClassifierBlock(torch.nn.Linear(4, 3))
        >>> logits, loss = block(torch.ones(2, 4), torch.tensor([0, 2]))
        >>> logits.shape, loss.requires_grad
        (torch.Size([2, 3]), True)
    """

    def __init__(self, module, *, label_smoothing=0.0):
        super().__init__()
        self.module = module
        self.label_smoothing = label_smoothing

    def forward(self, x, target=None):
        if target is None or not self.training:
            return self.module(x)
        logits = self.module(x.detach())
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return logits.detach(), F.cross_entropy(wide, target.long(), label_smoothing=self.label_smoothing)
