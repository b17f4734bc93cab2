"""The losses as a GPU computes them: passes over the feature map by kernels that the backend hands in, and the
library's products of the small matrices between them. Same arguments and results as reference.py; no float64.
"""

import torch
import torch.nn.functional as F

from . import reference


def planes(h):
    """`(h or a dense copy, (planes, positions, channels))` of (B, C, H, W) or (B, T, C): the planes are contiguous with
    `channels` 1, else a plane is one of `channels` channels that lie side by side."""
    batch, channels = h.shape[0], h.shape[1] if h.dim() == 4 else h.shape[2]
    positions = h.shape[1] if h.dim() == 3 else h.shape[2] * h.shape[3]
    by_position = h.permute(0, 2, 3, 1) if h.dim() == 4 else h
    by_channel = h if h.dim() == 4 else h.transpose(1, 2)
    if by_channel.is_contiguous():
        return h, (batch * channels, positions, 1)
    if not by_position.is_contiguous():
        h = h.contiguous()
        return h, (batch * channels, positions, 1 if h.dim() == 4 else channels)
    return h, (batch * channels, positions, channels)


def samples(h):
    """`(h or a dense copy, (rows, elements of a row, 1))` for a reduction over everything but the first dimension."""
    dense = h.is_contiguous() or h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)
    return h if dense else h.contiguous(), (h.shape[0], h.shape[1:].numel(), 1)


def local_cross_entropy(mean, rows, h, weight, bias, target, label_smoothing, reduction, compute_grad):
    """`mean(h)` (B, C); `rows(logits, target, label_smoothing, grad_scale, compute_grad)`: the losses (B,), and in
    place of the logits grad_scale times their gradients."""
    if h.numel() == 0:
        return reference.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad)
    pooled = h.to(torch.float32, copy=True).contiguous() if h.dim() == 2 else mean(h)
    weight = weight.float()
    logits = F.linear(pooled, weight, None if bias is None else bias.float()).contiguous()
    losses = rows(logits, target, label_smoothing, 1 / len(h) if reduction == "mean" else 1.0, compute_grad)
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    if not compute_grad:
        return loss, *(torch.empty(0, device=h.device, dtype=torch.float32) for _ in range(3))
    positions = h.shape[1:].numel() // pooled.shape[1]
    return loss, pooled, logits, torch.addmm(pooled, logits, weight, beta=0, alpha=1 / positions)


def similarity(deviation, normalize, match, rows_grad, x, target, num_classes, use_std, compute_grad):
    """`deviation(x)`: mean and standard deviation (B, C); `normalize(features)`: centred rows of length 1 and their
    norms before; `match(products, target, same, other)`: the losses of the rows of R, which the errors replace;
    `rows_grad(factor, grad, rows, norms, deviation, mean, positions)`: back through normalisation and deviation."""
    if x.numel() == 0:
        return reference.similarity(x, target, num_classes, use_std, compute_grad)
    spatial = reference.uses_std(x.shape, use_std)
    mean, std = deviation(x) if spatial else (None, None)
    rows, norms = normalize(std if spatial else x.flatten(1).contiguous())
    if len(rows) > rows.shape[1]:  # pairs of features
        factor = 1.0
        loss, grad = reference.match(rows, target, num_classes, compute_grad, True)
    else:
        factor = 4 / len(rows) ** 2
        products = rows @ rows.t()
        loss = match(products, target, *reference.label_similarity(num_classes)).sum()
        grad = products @ rows if compute_grad else None
    if not compute_grad:
        return (
            loss,
            torch.empty(0, device=x.device, dtype=torch.float32),
            torch.empty(0, device=x.device, dtype=torch.float32),
        )
    positions = x.shape[2] * x.shape[3] if spatial else 0
    grad = rows_grad(factor, grad, rows, norms, std, mean, positions)
    return loss, grad, mean if spatial else torch.empty(0, device=x.device, dtype=torch.float32)
