"""LLS in plain torch: the authors' formulas, and closed-form gradients of them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lgkernels.functional as LF

from ..common import convolution_backward

TEMPERATURE, SLOPE = 0.5, 0.01


# -- the authors' formulas ---------------------------------------------------------------------------------------


def official_basis(rows, dim, device):
    frequency = torch.linspace(50, 512, rows, device=device)
    return torch.sign(torch.sin(frequency.unsqueeze(1) * torch.arange(dim, device=device).unsqueeze(0)))


def official_loss(activation, target, phi, pool, modulation=None):
    x = activation.float()
    if x.dim() == 4:
        x = F.adaptive_avg_pool2d(x, pool).flatten(1)
    logits = F.linear(F.normalize(x, dim=1), phi)
    logits = logits if modulation is None else logits @ modulation
    return F.cross_entropy(logits / TEMPERATURE, target)


# -- what an expert writes in plain torch: closed-form gradients, few passes, in place where that is allowed ---------


def lean_head(x, target, phi, modulation=None):
    """(loss, grad_x, grad_modulation) of latents x (B, d)."""
    inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
    s = (x @ phi.t()) * inverse
    log_p = F.log_softmax((s if modulation is None else s @ modulation) / TEMPERATURE, 1)
    loss = F.nll_loss(log_p, target)
    g = log_p.exp()
    g.scatter_add_(1, target.unsqueeze(1), g.new_full((x.shape[0], 1), -1.0))
    g = g / (TEMPERATURE * x.shape[0])
    grad_modulation = None if modulation is None else s.t() @ g
    g = g if modulation is None else g @ modulation.t()
    rho = (g * s).sum(1, keepdim=True)
    return loss, torch.addcmul(g @ phi, x, rho * inverse, value=-1) * inverse, grad_modulation


def _tiles(activation, pool):
    batch, channels, height, width = activation.shape
    return activation.view(batch, channels, pool, height // pool, pool, width // pool)


def _per_bin(grad_latents, activation, pool):
    batch, channels, height, width = activation.shape
    grad = (grad_latents / (height * width // pool**2)).to(activation.dtype)
    return grad.view(batch, channels, pool, 1, pool, 1)


class LeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, target, phi, pool, modulation):
        x = activation if activation.dim() == 2 else F.adaptive_avg_pool2d(activation, pool).flatten(1).float()
        loss, grad, grad_modulation = lean_head(x, target, phi, modulation)
        ctx.save_for_backward(grad, grad_modulation)
        ctx.pool, ctx.like = pool, activation.detach()
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, grad_modulation = ctx.saved_tensors
        grad = grad * grad_loss
        if ctx.like.dim() == 4:
            out = torch.empty_like(ctx.like)
            _tiles(out, ctx.pool).copy_(_per_bin(grad, ctx.like, ctx.pool))
            grad = out
        return grad, None, None, None, None if grad_modulation is None else grad_modulation * grad_loss


def weight_gradient(grad, x, weight):
    """Of a 3x3 convolution with padding 1."""
    sizes = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    return convolution_backward(grad, x, weight, None, *sizes, [False, True, False])[1]


def lean_loss(activation, target, phi, pool, modulation):
    return LeanLoss.apply(activation, target, phi, pool, modulation)


def lean_block(x, target, weight, gamma, beta, phi, pool, max_pool):
    """(out, loss, grad_weight, grad_gamma, grad_beta)."""
    weight = weight.to(x.dtype)
    z = F.conv2d(x, weight, None, 1, 1)
    a, mean, rstd = torch.native_batch_norm(z, gamma, beta, None, None, True, 0.1, 1e-5)
    a = F.leaky_relu_(a, SLOPE)
    latents = F.adaptive_avg_pool2d(a, pool).flatten(1).float()
    loss, grad, _ = lean_head(latents, target, phi)
    grad = _per_bin(grad, a, pool)
    grad = torch.where(_tiles(a, pool) > 0, grad, grad * SLOPE).reshape(a.shape)
    dz, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
        grad, z, gamma, None, None, mean, rstd, True, 1e-5, [True, True, True]
    )
    return F.max_pool2d(a, 2) if max_pool else a, loss, weight_gradient(dz, x, weight), grad_gamma, grad_beta


# -- a fused block's parameters in other layers ---------------------------------------------------------------------


def plain_block(block, x):
    return F.leaky_relu(block.norm(block.layer(x)), SLOPE)


class EagerBlock(nn.Module):
    """A fused block's parameters under the authors' layer: basis cached, no `.item()`."""

    def __init__(self, block):
        super().__init__()
        self.block, weight = block, block.layer.weight
        dim = weight.shape[0] * block.pool_size**2 if weight.dim() == 4 else block.pool_size
        self.phi = LF.lls_basis(block.num_classes, dim, device=weight.device)

    def forward(self, x, target):
        a = plain_block(self.block, x.detach())
        out = F.max_pool2d(a.detach(), 2) if self.block.max_pool else a.detach()
        return out, official_loss(a, target, self.phi, self.block.pool_size)


class InPlaceBlock(nn.Module):
    """A block for back-propagation that keeps one activation fewer."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        a = F.leaky_relu_(self.block.norm(self.block.layer(x)), SLOPE)
        return F.max_pool2d(a, 2) if self.block.max_pool else a


class CheckpointedBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)  # no dropout here
