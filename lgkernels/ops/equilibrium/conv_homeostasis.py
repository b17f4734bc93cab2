"""The homeostatic loss of a conv net by plain differentiable operations: see reference.homeostasis for dense nets.

J(low, low) holds the second derivatives of the feedback, which are symmetric: J - J^T lies in the pairs alone,
J(high, low) = DP_f(r_low) and J(low, high) = DP_b(r_low)^T.
"""

import torch
import torch.nn.functional as F

from .field import field_cotangent, field_tangent
from .pool import pooled


def probe_loss(net, activities, eps, estimator):
    """The loss of one probe, a mean over samples and states; differentiable in the net's weights and biases."""
    samples = max(len(activities[0]), 1)
    n = sum(r[0].numel() for r in activities) if len(activities[0]) else 1
    if estimator == "exact":
        total = sum(_exact(net, pair, activities) for pair in _pairs(net))
    elif estimator == "paper":
        v = [a - e for a, e in zip(field_tangent(net, activities, eps), eps)]
        again = [a - e for a, e in zip(field_tangent(net, activities, v), v)]
        total = sum(a.square().sum() - (e * b).sum() for a, e, b in zip(v, eps, again))
    else:
        forward, back = field_tangent(net, activities, eps), field_cotangent(net, activities, eps)
        total = sum((v - w).square().sum() for v, w in zip(forward, back)) / 2
    return total / (samples * n)


def _pairs(net):
    """(low, weight up or None, bias, weight down or None) of neighbours."""
    ups, downs = {}, {}
    for a, b, weight, bias in net.routes():
        (ups if a < b else downs)[min(a, b)] = weight, bias
    return [(low, *ups.get(low, (None, None)), downs.get(low, (None,))[0]) for low in sorted({*ups, *downs})]


def _exact(net, pair, activities):
    """|DP_f - DP_b|^2 (Frobenius, summed over samples), by the products of the kernels' shifted copies.

    A row of DP is sum_i q_i K shifted to entry i of a 2x2 window: 4x4 places of the layer below, those beyond its
    border left out. So its square is a form of the q's, whose matrix is one for inner windows and one for each border.
    """
    low, up, bias, down = pair
    r, padding = activities[low], net.padding(low, low + 1)
    kernels = [(w, b, sign) for w, b, sign in ((up, bias, 1.0), (down, None, -1.0)) if w is not None]
    q = torch.cat([s * pooled(F.conv2d(r, w, b, padding=padding))[2] for w, b, s in kernels], -1)
    canvas = torch.cat(
        [torch.stack([F.pad(w, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]) for w, _, _ in kernels]
    )
    rows, columns = (_inside(q.shape[d], r.shape[d], padding, q) for d in (2, 3))
    total = q.new_zeros(())
    for mask_y in rows.unique(dim=0):
        for mask_x in columns.unique(dim=0):
            gram = torch.einsum("aoiyx,boiyx,y,x->oab", canvas, canvas, mask_y, mask_x)
            own = q[:, :, (rows == mask_y).all(1)][:, :, :, (columns == mask_x).all(1)]
            total = total + torch.einsum("nohwa,nohwb,oab->", own, own, gram)
    return total


def _inside(windows_, size, padding, like):
    """(windows, 4): which of the four places that a window's kernels cover lie inside of the layer below."""
    at = 2 * torch.arange(windows_, device=like.device).unsqueeze(1) + torch.arange(4, device=like.device) - padding
    return ((at >= 0) & (at < size)).to(like.dtype)
