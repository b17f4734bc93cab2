"""The sizes of what the results of reference.py add up, |a| + |b| for a - b, in the places of the results: a backend
for the bound of a trial (core/trial.py)."""

import torch
import torch.nn.functional as F

from . import reference


def local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad):
    """The gradient of the logits is p - q, 0 for one class: p + q is added up there, and its products with weight."""
    results = reference.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad)
    loss, pooled, grad_logits, grad_pooled = results
    if not compute_grad:
        return results
    classes, count = weight.shape[0], max(len(h), 1) if reduction == "mean" else 1
    q = F.one_hot(target, classes) * (1 - label_smoothing) + label_smoothing / classes
    size = grad_logits + 2 * q / count
    positions = h.shape[1:].numel() // max(pooled.shape[1], 1)
    return loss, pooled, size, size @ weight.to(size.dtype).abs() / max(positions, 1)


def similarity(x, target, num_classes, use_std, compute_grad):
    """Differences of cosines, 1 + 1 at most (0 for a single row), squared; times unit rows in the gradient."""
    loss, grad, mean = reference.similarity(x, target, num_classes, use_std, compute_grad)
    if not compute_grad or not len(x):
        return loss, grad, mean
    spatial = reference.uses_std(x.shape, use_std)
    features = reference.spatial_moments(x)[0].sqrt() if spatial else x.flatten(1)
    norm = (features - features.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    size = torch.where(norm > 0, 8 / (len(x) * norm), 0).expand_as(grad)
    if spatial:
        size = torch.where(features > 0, size / (features * (x.shape[2:].numel() - 1)), 0)
    return torch.full_like(loss, 4.0), size, mean
