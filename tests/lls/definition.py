"""LLS written out in plain torch, differentiated by autograd: what the closed forms are compared with."""

import torch
import torch.nn.functional as F

import lgkernels.functional as LF


def definition(
    activation,
    target,
    modulation=None,
    *,
    num_classes,
    pool_size,
    waveform="square",
    temperature=0.5,
    label_smoothing=0.0,
    normalize=True,
    eps=1e-12,
    basis=None,
    basis_scale=1.0,
    loss="cross_entropy",
    ignore_index=-100,
    reduction="mean",
):
    """Spec sections 1.2, 1.3 and 1.9, line by line."""
    wide = activation if activation.dtype == torch.float64 else activation.float()
    if activation.dim() == 2:
        x = F.adaptive_avg_pool1d(wide.unsqueeze(1), pool_size).squeeze(1)
    else:
        x = F.adaptive_avg_pool2d(wide, pool_size).flatten(1)
    if normalize:
        x = F.normalize(x, dim=1, eps=eps)
    if basis is None:
        rows = modulation.shape[0] if modulation is not None and modulation.dim() == 2 else num_classes
        basis = LF.lls_basis(rows, x.shape[1], waveform=waveform)
    z = (x @ basis.to(x.dtype).t()) * basis_scale
    if modulation is not None:
        m = modulation.to(x.dtype)
        z = z * m if m.dim() == 1 else z @ m
    v = z / temperature
    target = target.long()
    if loss == "cross_entropy":
        return F.cross_entropy(
            v, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    valid = target != ignore_index
    one_hot = F.one_hot(target.masked_fill(~valid, 0), num_classes).to(x.dtype)
    hard_sigmoid = v + ((0.25 * v + 0.5).clamp(0, 1) - v).detach()  # straight through
    rows = (hard_sigmoid - one_hot).square().mean(1).masked_fill(~valid, 0)
    return rows if reduction == "none" else rows.sum() / (valid.sum() if reduction == "mean" else 1)
