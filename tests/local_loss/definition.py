"""The local losses written out in plain torch, every intermediate included: autograd of this is the truth."""

import torch
import torch.nn.functional as F


def wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def local_cross_entropy(h, weight, bias, target, *, label_smoothing=0.0, reduction="mean"):
    h = wide(h)
    pooled = h.mean((2, 3)) if h.dim() == 4 else h.mean(1) if h.dim() == 3 else h
    logits = F.linear(pooled, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
    return F.cross_entropy(logits, target.long(), label_smoothing=label_smoothing, reduction=reduction)


def goodness_loss(h, is_positive, *, threshold=2.0, goodness="mean"):
    g = wide(h).square().flatten(1)
    g = g.mean(1) if goodness == "mean" else g.sum(1)
    return F.softplus(torch.where(is_positive, threshold - g, g - threshold)).mean()


def peer_normalization_loss(h_pos, running_mean, *, momentum=0.9):
    m = momentum * running_mean.detach().to(wide(h_pos).dtype) + (1 - momentum) * wide(h_pos).mean(0)
    return (m.mean() - m).square().mean(), m.detach()


def similarity_matrix(x, use_std=True):
    """Of anokland/local-loss: rows centred and normalised, their inner products, clamped."""
    if x.dim() == 4 and use_std and x.shape[1] > 3 and x.shape[2] > 1:
        x = x.flatten(2).std(2)
    x = x.flatten(1)
    centred = x - x.mean(1, keepdim=True)
    rows = centred / (1e-8 + centred.norm(dim=1, keepdim=True))
    return (rows @ rows.t()).clamp(-1, 1)


def similarity_matching_loss(h, target, sim_weight=None, *, num_classes, use_std=True):
    x = h  # the layer is an ordinary one, in h's dtype
    if sim_weight is not None:
        x = F.conv2d(x, sim_weight, padding=1) if x.dim() == 4 else F.linear(x, sim_weight)
    x = wide(x)
    labels = F.one_hot(target.long(), num_classes).to(x.dtype)
    return F.mse_loss(similarity_matrix(x, use_std), similarity_matrix(labels))


def prediction_similarity_loss(
    h,
    target,
    sim_weight,
    decoder_weight,
    decoder_bias=None,
    *,
    num_classes,
    beta=0.99,
    use_std=True,
    pool_kernel=1,
    pool_padding=0,
):
    pooled = F.avg_pool2d(h, pool_kernel, padding=pool_padding) if h.dim() == 4 else h
    prediction = local_cross_entropy(pooled.flatten(1), decoder_weight, decoder_bias, target)
    return (1 - beta) * prediction + beta * similarity_matching_loss(
        h, target, sim_weight, num_classes=num_classes, use_std=use_std
    )


def supcon_loss(
    z,
    target=None,
    *,
    temperature=0.07,
    base_temperature=None,
    contrast_mode="all",
    anchors_without_positives="zero",
    normalize=True,
):
    z = wide(z)
    z = z.unsqueeze(1) if z.dim() == 2 else z
    batch, views = z.shape[:2]
    z = F.normalize(z, dim=2) if normalize else z
    rows = torch.cat(z.unbind(1))
    labels = (torch.arange(batch) if target is None else target.long()).repeat(views)
    anchors = batch if contrast_mode == "one" else len(rows)
    similarity = rows[:anchors] @ rows.t() / temperature
    itself = torch.eye(anchors, len(rows), dtype=torch.bool)
    positive = (labels[:anchors, None] == labels) & ~itself
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    loss = -(log_p.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)).masked_fill(count == 0, 0)
    if anchors_without_positives == "exclude":
        loss = loss[count > 0] if bool(count.any()) else loss
    return loss.mean() * (1 if base_temperature is None else temperature / base_temperature)


def nt_xent_loss(z, *, temperature=0.1, normalize=True):
    z = wide(z)
    q = F.normalize(z, dim=1) if normalize else z
    n = len(q) // 2
    similarity = (q @ q.t() / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, (torch.arange(2 * n) + n) % (2 * n))


def info_nce_loss(query, keys, *, negatives, temperature=1.0):
    query, keys = wide(query), wide(keys)
    positive = (query * keys[: len(query)]).sum(1, keepdim=True)
    negative = torch.einsum("nd,nkd->nk", query, keys[negatives.long()])
    logits = torch.cat([positive, negative], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
