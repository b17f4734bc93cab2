"""Local losses in plain torch: the definition that every other backend is tested against.

Every function returns the loss together with what its gradient needs, in closed form and already divided by the
number of rows, so that a backward is one product with the incoming gradient. Nothing of the size of a feature map,
of a one-hot table or of all pairs of rows is built, but where a docstring says so. Any device; float32 and float64
(half inputs are widened on load).
"""

import torch
import torch.nn.functional as F

from ...core.ops import wide

ELEMENTS = 1 << 20  # of a row block's intermediate: 4 MB in float32
EPS_NORM = 1e-8  # of the similarity matrix (anokland/local-loss)
EPS_UNIT = 1e-12  # of torch's normalize


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------


def pooled_dims(dim):
    """Dimensions over which `local_cross_entropy` averages: (B, C, H, W) over H and W, (B, T, C) over T."""
    return {2: (), 3: (1,), 4: (2, 3)}[dim]


def local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad):
    """`(loss, pooled (B, C), grad_logits (B, K), grad_pooled (B, C))`.

    p = mean of h over its positions, v = p W^T + b; grad_logits = (softmax(v) - q) / B with the smoothed labels q,
    grad_pooled = grad_logits W / positions: the gradient of h is that, repeated over the positions.
    """
    dims = pooled_dims(h.dim())
    p = h.mean(dims, dtype=torch.float64 if h.dtype == torch.float64 else torch.float32) if dims else wide(h)
    logits = F.linear(p, weight.to(p.dtype), None if bias is None else bias.to(p.dtype))
    log_p, classes = F.log_softmax(logits, 1), weight.shape[0]
    picked = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    rows = -(1 - label_smoothing) * picked
    if label_smoothing:  # else a class of logit -inf, masked, would give nan
        rows -= label_smoothing * log_p.mean(1)
    count = max(len(h), 1) if reduction == "mean" else 1
    loss = rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()
    none = p.new_empty(0)
    if not compute_grad:
        return loss, none, none.clone(), none.clone()
    grad = log_p.exp_()
    grad.scatter_add_(1, target.unsqueeze(1), torch.full_like(picked, label_smoothing - 1).unsqueeze(1))
    grad = grad.sub_(label_smoothing / classes).div_(count)
    positions = 1
    for d in dims:
        positions *= h.shape[d]
    return loss, p if dims else p.clone(), grad, grad @ weight.to(p.dtype) / max(positions, 1)


def local_cross_entropy_grads(scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias):
    """`scale` () or (B,) times the gradients of one position of h (B, C) in `dtype`, of weight (K, C), of bias (K,)."""
    factor = scale.unsqueeze(1) if scale.dim() else scale
    none = pooled.new_empty(0)
    grad_h = (grad_pooled * factor).to(dtype) if needs_h else none.to(dtype)
    g = grad_logits * factor if needs_weight or needs_bias else none
    return (
        grad_h,
        g.t() @ pooled.to(g.dtype) if needs_weight else none.clone(),
        g.sum(0) if needs_bias else none.clone(),
    )


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def goodness(h, is_positive, threshold, mean, compute_grad):
    """`(loss, kappa (B,), squares (B,))` from one reduction: squares = sum of h^2 over all dimensions but the first.

    g = c * squares, c = 1/D or 1; loss = mean of softplus(s (threshold - g)), s = +1 or -1;
    kappa = -s sigmoid(s (threshold - g)) 2c / B: the gradient of h is kappa * h.
    """
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    squares = torch.linalg.vector_norm(h, dim=tuple(range(1, h.dim())), dtype=dtype).square_()
    factor = 1 / max(h.shape[1:].numel(), 1) if mean else 1.0
    sign = is_positive.to(squares.dtype) * 2 - 1
    margin = sign * (threshold - squares * factor)
    loss = F.softplus(margin).mean()
    if not compute_grad:
        return loss, squares.new_empty(0), squares
    return loss, torch.sigmoid(margin) * sign * (-2 * factor / max(len(h), 1)), squares


def goodness_grad(h, kappa, scale):
    """kappa * scale * h in h's dtype and memory format."""
    return (h * (kappa * scale).reshape(-1, *[1] * (h.dim() - 1))).to(h.dtype)


def peer_normalization(h, running_mean, momentum):
    """`(loss, m, grad)`, m and grad shaped like one row: m = momentum * running + (1 - momentum) * mean over rows,
    loss = mean((mean(m) - m)^2), grad = that of every row of h alike: 2 (1 - momentum) (m - mean(m)) / (D B)."""
    rows = h.mean(0, dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
    m = rows.mul_(1 - momentum).add_(running_mean.to(rows.dtype), alpha=momentum)
    centred = m - m.mean()
    return centred.square().mean(), m, centred * (2 * (1 - momentum) / max(m.numel() * len(h), 1))


# -- similarity matching ------------------------------------------------------------------------------------------


def uses_std(shape, use_std):
    """Whether features are standard deviations over space: more than 3 channels and height above 1."""
    return use_std and len(shape) == 4 and shape[1] > 3 and shape[2] > 1


def label_similarity(num_classes):
    """(same, other): the two values of R(one-hot labels); the 1e-8 of its normalisation included."""
    if num_classes == 1:
        return 0.0, 0.0
    norm = ((num_classes - 1) / num_classes) ** 0.5
    same = (norm / (EPS_NORM + norm)) ** 2
    return same, -same / (num_classes - 1)


def _class_sums(rows, target, num_classes):
    sums = rows.new_zeros(num_classes, rows.shape[1])
    if rows.device.type == "cpu":
        return sums.index_add_(0, target, rows)
    return sums.index_put_((target,), rows, accumulate=True)  # sorted on a GPU: the same sum every time


def match(rows, target, num_classes, compute_grad, gram):
    """mean_ij (<x_i, x_j> - Ry_ij)^2 and its gradient to the rows; pairs of rows, or pairs of features (`gram`)."""
    batch, (same, other) = len(rows), label_similarity(num_classes)
    if not gram:
        error = (rows @ rows.t()).clamp_(-1, 1)
        equal = (target.unsqueeze(1) == target).to(rows.dtype)
        error = error.sub_(other).sub_(equal, alpha=same - other)
        loss = error.square().mean()
        return loss, error @ rows * (4 / batch**2) if compute_grad else None
    product = rows.t() @ rows
    sums = _class_sums(rows, target, num_classes)
    total = rows.sum(0)
    counts = _class_sums(rows.new_ones(batch, 1), target, num_classes)  # bincount would wait for the device
    equal = counts.square().sum()
    # sum_ij Ry_ij <x_i, x_j> = (same - other) sum_k |m_k|^2 + other |m|^2, m_k the sum over class k
    cross = (same - other) * sums.square().sum() + other * total.square().sum()
    loss = (product.square().sum() - 2 * cross + same**2 * equal + other**2 * (batch**2 - equal)) / batch**2
    if not compute_grad:
        return loss, None
    return loss, (rows @ product - (same - other) * sums[target] - other * total) * (4 / batch**2)


def spatial_moments(x):
    """(unbiased variance, mean), (B, C), over the positions of (B, C, H, W)."""
    return torch.var_mean(wide(x), (2, 3))


def similarity(x, target, num_classes, use_std, compute_grad, gram=None, var_mean=spatial_moments):
    """`(loss, grad, mean)`: features -> centred, normalised rows -> R, against the labels' R.

    grad is the gradient of the features (B, F); with standard deviations as features, the factor (B, C) of
    (x - mean) in the gradient of x, and mean (B, C). A constant row (or one of standard deviation 0) counts as 0
    and has gradient 0, where the authors' code gives nan. `gram`: pairs of features instead of pairs of rows; None:
    whichever is smaller. `var_mean`: what computes :func:`spatial_moments`.
    """
    spatial = uses_std(x.shape, use_std)
    none = wide(x.new_empty(0))
    eps = 8 * torch.finfo(none.dtype).eps  # what rounding leaves of a constant
    if not len(x):  # the mean over nothing
        mean = none.new_empty(x.shape[:2]) if spatial else none.clone()
        return none.new_full((), float("nan")), none.new_empty(0, x.shape[1] if spatial else x.shape[1:].numel()), mean
    if spatial:
        variance, mean = var_mean(x)
        features = variance.sqrt()
    else:
        mean, features = none, wide(x).flatten(1)
    centred = features - features.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    varies = ~(norm <= eps * features.norm(dim=1, keepdim=True))  # nan varies, and stays nan
    inverse = torch.where(varies, 1 / (EPS_NORM + norm), 0)
    rows = centred * inverse
    gram = len(rows) > rows.shape[1] if gram is None else gram
    loss, grad = match(rows, target, num_classes, compute_grad, gram)
    if not compute_grad:
        return loss, none, none.clone()
    along = (grad * rows).sum(1, keepdim=True)
    grad = (grad - rows * (along * (1 + EPS_NORM / norm))) * inverse
    grad = torch.where(varies, grad - grad.mean(1, keepdim=True), 0)
    if spatial:
        flat = features <= eps * mean.abs()
        grad = torch.where(flat, 0, grad / (features * (x.shape[2] * x.shape[3] - 1)))
    return loss, grad, mean


def similarity_grad(x, grad, mean, scale):
    """scale * dL/dx in x's dtype and memory format, from what `similarity` returned."""
    if mean.numel() == 0:
        return (grad * scale).to(x.dtype).reshape(x.shape)
    return ((wide(x) - mean[:, :, None, None]).mul_((grad * scale)[:, :, None, None])).to(x.dtype)


# -- contrastive losses -------------------------------------------------------------------------------------------


def _unit(z):
    inverse = 1 / z.norm(dim=1, keepdim=True).clamp_min(EPS_UNIT)
    return z * inverse, inverse


def _through_unit(grad, q, inverse):
    """Gradient through torch's normalize; below its bound the norm is a constant."""
    along = (grad * q).sum(1, keepdim=True)
    return torch.where(inverse < 1 / EPS_UNIT, grad - q * along, grad) * inverse


def contrastive(z, labels, options, compute_grad):
    """`(loss, grad (M, D))` of rows z (M, D), of which the first `anchors` are anchors.

    Rows with the anchor's label, itself left out, are its positives P:
    loss_i = factor (logsumexp_{j != i} S_ij - mean_{p in P_i} S_ip), 0 without positives; S = q q^T / T; mean over
    anchors, with `exclude` over those with positives. By blocks of anchors: memory O(M), and the gradient from the
    same pass.
    """
    anchors, temperature, factor, normalize, exclude = options
    z = wide(z)
    q, inverse = _unit(z) if normalize else (z, None)
    grad, total, counted = torch.zeros_like(q), q.new_zeros(()), q.new_zeros(())
    block = max(1, ELEMENTS // max(len(q), 1))
    for start in range(0, anchors, block):
        rows = q[start : start + block].narrow(0, 0, min(block, anchors - start))
        s = (rows @ q.t()).div_(temperature)
        same = labels[start : start + len(rows), None] == labels
        same.diagonal(start).fill_(False)
        s.diagonal(start).fill_(-torch.inf)
        lse, count = s.logsumexp(1, keepdim=True), same.sum(1, keepdim=True)
        has, share = count > 0, 1 / count.clamp_min(1).to(s.dtype)
        total += torch.where(has, lse - s.masked_fill(~same, 0).sum(1, keepdim=True) * share, 0).sum()
        counted += has.sum()
        if compute_grad:
            p = s.sub_(lse).exp_().sub_(same * share).masked_fill_(~has, 0)
            grad[start : start + len(rows)].addmm_(p, q)
            grad.addmm_(p.t(), rows)
    scale = factor / anchors if anchors else float("nan")
    if exclude and anchors:
        scale = factor / counted.clamp_min(1)
    if not compute_grad:
        return total * scale, z.new_empty(0)
    grad *= scale / temperature
    return total * scale, _through_unit(grad, q, inverse) if normalize else grad


def info_nce(query, keys, negatives, temperature, compute_grad):
    """`(loss, grad_query (N, D), grad_keys (M, D))`: cross entropy of <q_i, k_i>/T against <q_i, k_n>/T over row i of
    `negatives`, mean over i; the gathered keys exist for one block of rows at a time."""
    query, keys = wide(query), wide(keys)
    batch, dim = query.shape
    grad_query, grad_keys = torch.zeros_like(query), torch.zeros_like(keys)
    total = query.new_zeros(())
    block = max(1, ELEMENTS // max((negatives.shape[1] + 1) * dim, 1))
    index = torch.cat([torch.arange(batch, device=query.device).unsqueeze(1), negatives], 1)
    for start in range(0, batch, block):
        rows = slice(start, start + block)
        gathered = keys[index[rows]]  # (b, 1 + n, D), positives first
        s = (gathered @ query[rows].unsqueeze(2)).squeeze(2).div_(temperature)
        lse = s.logsumexp(1, keepdim=True)
        total += (lse - s[:, :1]).sum()
        if compute_grad:
            p = s.sub_(lse).exp_()
            p[:, 0] -= 1
            p *= 1 / (batch * temperature)
            grad_query[rows] = (p.unsqueeze(1) @ gathered).squeeze(1)
            shares = torch.mul(p.unsqueeze(2), query[rows].unsqueeze(1), out=gathered).flatten(0, 1)
            if keys.device.type == "cpu":
                grad_keys.index_add_(0, index[rows].flatten(), shares)
            else:
                grad_keys.index_put_((index[rows].flatten(),), shares, accumulate=True)
    loss = total / batch if batch else total * float("nan")
    return (loss, grad_query, grad_keys) if compute_grad else (loss, query.new_empty(0), query.new_empty(0))
