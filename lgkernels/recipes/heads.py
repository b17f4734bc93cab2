"""The paper's control variants: a random frozen basis, and a trained linear classifier, in place of the periodic one.

Both draw a (C, hidden) matrix from 0.1 N(0, 1), pool it along its second dimension to the size d of the latents, and
do not normalise the latents. Source: the authors' code ("LLS_Random", "LocalLosses").
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as LF


class RandomBasisHead(nn.Module):
    """LLS with a frozen random basis (C, d)."""

    def __init__(self, block, *, num_classes, pool_size, latents, hidden, temperature):
        super().__init__()
        self.block = block
        self.num_classes, self.pool_size, self.temperature = num_classes, pool_size, temperature
        self.register_buffer("basis", F.adaptive_avg_pool1d(0.1 * torch.randn(num_classes, hidden), latents))

    def forward(self, x, target=None):
        if target is None or not self.training:
            return self.block(x)
        out = self.block(x.detach())
        loss = LF.lls_loss(
            out,
            target,
            num_classes=self.num_classes,
            pool_size=self.pool_size,
            basis=self.basis,
            normalize=False,
            temperature=self.temperature,
        )
        return out.detach(), loss


class LocalClassifierHead(nn.Module):
    """A linear classifier of the pooled activation, trained with the block."""

    def __init__(self, block, *, num_classes, pool_size, latents, hidden, temperature):
        super().__init__()
        self.block = block
        self.pool_size, self.latents, self.temperature = pool_size, latents, temperature
        self.weight = nn.Parameter(0.1 * torch.randn(num_classes, hidden))

    def forward(self, x, target=None):
        if target is None or not self.training:
            return self.block(x)
        out = self.block(x.detach())
        pool = F.adaptive_avg_pool2d if out.dim() == 4 else F.adaptive_avg_pool1d
        logits = F.linear(pool(out, self.pool_size).flatten(1), F.adaptive_avg_pool1d(self.weight, self.latents))
        return out.detach(), F.cross_entropy(logits.float() / self.temperature, target.long())
