"""Local losses: check the arguments, then call the family's autograd entry."""

import torch
import torch.nn.functional as F

from ..core import checks, dispatch
from ..core.ops import class_indices
from ..ops.local_loss import autograd as _local

__all__ = [
    "goodness_loss",
    "info_nce_loss",
    "local_cross_entropy",
    "nt_xent_loss",
    "overlay_label",
    "peer_normalization_loss",
    "prediction_similarity_loss",
    "similarity_matching_loss",
    "supcon_loss",
]


def _rows(name, value, h, meaning):
    checks.integer(name, value)
    checks.shape(name, value, h.shape[:1], meaning)


def _not_empty(name, value):
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must have no empty dimension but the first, got shape {checks.shape_of(value)}")


def local_cross_entropy(h, weight, bias, target, *, label_smoothing=0.0, reduction="mean", impl="auto"):
    r"""Local classifier: average pool, linear layer, cross entropy.

    .. math:: L = \mathrm{CE}(\bar h W^T + b,\; y)

    with the mean :math:`\bar h` over the positions. The gradient of ``h`` is constant over the positions: it is
    returned as one value per channel, repeated with stride 0, and ``h`` itself is not kept.

    Args:
        h (Tensor): (B, C, H, W), pooled over H and W; (B, T, C), pooled over T; (B, C), not pooled.
        weight (Tensor): (K, C), of K classes. bias (Tensor, optional): (K,).
        target (Tensor): (B,) class indices, any integer dtype.
        label_smoothing (float): in [0, 1].
        reduction (str): ``"mean"``, ``"sum"``, ``"none"``.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: () or (B,); float32 (float64 for float64). First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: the auxiliary classifiers of decoupled greedy learning and of local-loss networks.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> h = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> loss = LF.local_cross_entropy(h * 1, torch.eye(3), None, torch.tensor([0, 2]))
        >>> print(f"{loss.item():.4f}")
        1.0986
    """
    checks.floating("h", h)
    checks.dims("h", h, (2, 3, 4), "(B, C, H, W), (B, T, C) or (B, C)")
    _not_empty("h", h)
    checks.floating("weight", weight)
    checks.dims("weight", weight, (2,), "(num_classes, C)")
    channels = h.shape[1] if h.dim() == 4 else h.shape[-1]
    if weight.shape[1] != channels or not weight.shape[0]:
        raise ValueError(
            f"weight must be (num_classes, {channels}) for h of shape {checks.shape_of(h)}, "
            f"got shape {checks.shape_of(weight)}"
        )
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, weight.shape[:1], "one entry per row of weight")
    _rows("target", target, h, "one class index per row of h")
    checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.same_device(h=h, weight=weight, bias=bias, target=target)
    return _local.local_cross_entropy(h, weight, bias, target, float(label_smoothing), reduction, impl)


def goodness_loss(h, is_positive, *, threshold=2.0, goodness="mean", impl="auto"):
    r"""Forward-Forward: the activity of positive samples above a threshold, that of negative ones below it.

    .. math:: L = \frac1B \sum_i \mathrm{softplus}(s_i (\theta - g_i)), \quad g_i = \frac1D \sum_d h_{id}^2

    with :math:`s_i = 1` for a positive row and -1 for a negative one; ``goodness="sum"`` leaves the 1/D out.

    Args:
        h (Tensor): (B, ...); all dimensions but the first are reduced.
        is_positive (Tensor): (B,) bool.
        threshold (float): theta. Hinton's and mpezeshki's 2 with the mean; the layer's width with the sum.
        goodness (str): ``"mean"`` or ``"sum"``.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: (), float32 (float64 for float64). First derivatives only; it is kappa_i h_i, one factor per row.

    Raises: ValueError, TypeError naming the argument.

    Source: Hinton, "The Forward-Forward Algorithm" (2022), and two public implementations of it.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> h = torch.tensor([[2.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> print(f"{LF.goodness_loss(h, torch.tensor([True, False])).item():.4f}")
        0.5032
    """
    return goodness_and_squares(h, is_positive, threshold, goodness, impl)[0]


def goodness_and_squares(h, is_positive, threshold, goodness, impl="auto"):
    """`(loss, squares (B,))`: the rows' sums of squares also normalise the next layer's input."""
    checks.floating("h", h)
    if h.dim() < 2:
        raise ValueError(f"h must be (B, ...) with at least 2 dimensions, got shape {checks.shape_of(h)}")
    _not_empty("h", h)
    checks.tensor("is_positive", is_positive)
    if is_positive.dtype != torch.bool:
        raise TypeError(f"is_positive must be bool, got {str(is_positive.dtype)[6:]}; pass `label == 1`, say")
    checks.shape("is_positive", is_positive, h.shape[:1], "one entry per row of h")
    checks.choice("goodness", goodness, ("mean", "sum"))
    checks.number("threshold", threshold)
    checks.same_device(h=h, is_positive=is_positive)
    return _local.goodness(h, is_positive, float(threshold), goodness == "mean", impl)


def peer_normalization_loss(h_pos, running_mean, *, momentum=0.9, impl="auto"):
    r"""Forward-Forward's peer normalisation: units whose mean activity leaves that of their peers are pulled back.

    .. math:: m = \mu\, m_{old} + (1 - \mu)\, \mathrm{mean}_b h, \qquad L = \mathrm{mean}_d (\mathrm{mean}(m) - m_d)^2

    The running mean counts as a constant.

    Args:
        h_pos (Tensor): (B, ...), activity of positive samples. running_mean (Tensor): shaped like one row.
        momentum (float): mu, in [0, 1].
        impl (str): ``"auto"`` or ``"reference"``: plain torch is its only backend.

    Returns:
        (Tensor, Tensor): the loss () and the new running mean m, without gradient, in ``running_mean``'s dtype.

    Raises: ValueError, TypeError naming the argument.

    Source: loeweX/Forward-Forward (there: momentum 0.9, weight 0.03, and a ReLU that lets this gradient through).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> loss, mean = LF.peer_normalization_loss(torch.tensor([[1.0, 3.0]]), torch.ones(2))
        >>> mean
        tensor([1.0000, 1.2000])
    """
    checks.floating("h_pos", h_pos)
    if h_pos.dim() < 2:
        raise ValueError(f"h_pos must be (B, ...) with at least 2 dimensions, got shape {checks.shape_of(h_pos)}")
    checks.floating("running_mean", running_mean)
    checks.shape("running_mean", running_mean, h_pos.shape[1:], "one row of h_pos")
    checks.between("momentum", momentum, 0.0, 1.0)
    checks.same_device(h_pos=h_pos, running_mean=running_mean)
    return _local.peer_normalization(h_pos, running_mean, float(momentum), impl)


def overlay_label(x, label, *, num_classes, value=None, impl="auto"):
    """Forward-Forward's label in the input: the first ``num_classes`` entries of a copy are 0, entry ``label`` is not.

    Args:
        x (Tensor): (B, D), or (B, C, H, W): the entries are then the first pixels of every channel, row by row.
        label (Tensor): (B,) class indices.
        num_classes (int): at most the entries there are.
        value (float, optional): what the label's entry holds. None: the largest value of the batch.
        impl (str): one of the usual names; plain torch is all there is.

    Returns:
        Tensor: like ``x``.

    Raises: ValueError, TypeError naming the argument.

    Source: Hinton (2022); mpezeshki/pytorch_forward_forward for the batch's maximum.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.overlay_label(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([1]), num_classes=2)
        tensor([[0., 5., 5.]])
    """
    checks.floating("x", x)
    checks.dims("x", x, (2, 4), "(B, D) or (B, C, H, W)")
    checks.positive_integer("num_classes", num_classes)
    checks.choice("impl", impl, dispatch.IMPLEMENTATIONS)
    entries = x.shape[1:].numel() if x.dim() == 2 else x.shape[2] * x.shape[3]
    if num_classes > entries:
        raise ValueError(
            f"num_classes must be at most {entries}, the entries that x of shape {checks.shape_of(x)} "
            f"offers, got {num_classes}"
        )
    _rows("label", label, x, "one class index per row of x")
    checks.same_device(x=x, label=label)
    label = class_indices("label", label, num_classes)
    if not x.numel():
        return x.clone()
    value = x.detach().amax() if value is None else torch.as_tensor(value, dtype=x.dtype, device=x.device)
    classes = torch.arange(num_classes, device=x.device)
    patch = torch.where(label.unsqueeze(1) == classes, value, torch.zeros_like(value))
    flat = x.reshape(x.shape[0], -1, entries)
    patch = patch.unsqueeze(1).expand(-1, flat.shape[1], -1)
    return torch.cat([patch, flat[:, :, num_classes:]], 2).reshape(x.shape)


def similarity_matching_loss(h, target, sim_weight=None, *, num_classes, use_std=True, impl="auto"):
    r"""Similarity matching: samples as alike as their labels.

    .. math:: L = \frac{1}{B^2} \sum_{ij} (R(x)_{ij} - R(\mathrm{onehot}(y))_{ij})^2

    R: every row centred and divided by 1e-8 + its norm, then all inner products, clamped to [-1, 1]. x is ``h``, or
    ``h`` through the learned layer ``sim_weight``. Neither one-hot labels nor, for more rows than features, the
    (B, B) matrices are built. Not multiplied by beta.

    Args:
        h (Tensor): (B, C, H, W) or (B, N).
        target (Tensor): (B,) class indices.
        sim_weight (Tensor, optional): (C, C, 3, 3), a convolution with padding 1, or (N, N); None: identity.
        num_classes (int): K.
        use_std (bool): with more than 3 channels and height above 1, the features are the channels' unbiased standard
            deviations over space; else x flattened.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: (), float32 (float64 for float64). First derivatives only. A constant row counts as a row of zeros and
        gets gradient 0, as does a channel with standard deviation 0 (the authors' code gives nan).

    Raises: ValueError, TypeError naming the argument.

    Source: Nokland, Eidnes, "Training Neural Networks with Local Error Signals" (2019), and its code.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> print(f"{LF.similarity_matching_loss(h, torch.tensor([0, 1]), num_classes=2).item():.4f}")
        0.0000
    """
    checks.floating("h", h)
    checks.dims("h", h, (2, 4), "(B, C, H, W) or (B, N)")
    _not_empty("h", h)
    checks.positive_integer("num_classes", num_classes)
    _rows("target", target, h, "one class index per row of h")
    x = h
    if sim_weight is not None:
        checks.floating("sim_weight", sim_weight)
        n = h.shape[1]
        checks.shape(
            "sim_weight",
            sim_weight,
            (n, n, 3, 3) if h.dim() == 4 else (n, n),
            "convolution with padding 1" if h.dim() == 4 else "linear layer",
        )
        checks.same_device(h=h, target=target, sim_weight=sim_weight)
        if not torch.is_autocast_enabled(h.device.type):
            sim_weight = sim_weight.to(h.dtype)
        x = F.conv2d(h, sim_weight, padding=1) if h.dim() == 4 else F.linear(h, sim_weight)
    checks.same_device(h=h, target=target)
    return _local.similarity(x, target, num_classes, bool(use_std), impl)


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
    impl="auto",
):
    r"""Nokland and Eidnes' predsim: :math:`(1 - \beta)\,` cross entropy of a decoder :math:`+\; \beta\,` similarity.

    Args:
        h, target, sim_weight, num_classes, use_std: as :func:`similarity_matching_loss`.
        decoder_weight (Tensor): (num_classes, D), D the size of the pooled and flattened ``h``.
        decoder_bias (Tensor, optional): (num_classes,).
        beta (float): in [0, 1].
        pool_kernel, pool_padding (int or pair): of the average pool before the decoder, its stride the kernel,
            padding counted in the mean; (B, C, H, W) only.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: (), float32 (float64 for float64). First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: Nokland, Eidnes (2019), and its code (whose decoder starts at 0).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> loss = LF.prediction_similarity_loss(torch.eye(2), torch.tensor([0, 1]), None, torch.zeros(2, 2),
        ...                                      num_classes=2)
        >>> print(f"{loss.item():.5f}")
        0.00693
    """
    checks.floating("h", h)
    checks.dims("h", h, (2, 4), "(B, C, H, W) or (B, N)")
    checks.between("beta", beta, 0.0, 1.0)
    pools = pool_kernel not in (1, (1, 1)) or pool_padding not in (0, (0, 0))
    if pools and h.dim() == 2:
        raise ValueError(
            f"pool_kernel must be 1 and pool_padding 0 for h of shape {checks.shape_of(h)}, "
            f"got {pool_kernel} and {pool_padding}"
        )
    checks.floating("decoder_weight", decoder_weight)
    pooled = (F.avg_pool2d(h, pool_kernel, padding=pool_padding) if pools else h).flatten(1)
    checks.shape("decoder_weight", decoder_weight, (num_classes, pooled.shape[1]), "classes, pooled and flattened h")
    prediction = local_cross_entropy(pooled, decoder_weight, decoder_bias, target, impl=impl)
    similarity = similarity_matching_loss(h, target, sim_weight, num_classes=num_classes, use_std=use_std, impl=impl)
    return (1 - beta) * prediction + beta * similarity


def _contrastive_input(z, temperature):
    checks.floating("z", z)
    checks.positive("temperature", temperature)
    _not_empty("z", z)


def nt_xent_loss(z, *, temperature=0.1, normalize=True, impl="auto"):
    r"""NT-Xent (SimCLR): every view against its partner among all other views.

    .. math:: L = \frac{1}{2N} \sum_i \Big(\log \sum_{j \ne i} e^{S_{ij}} - S_{i, i \pm N}\Big), \quad S = q q^T / T

    with :math:`q = z / |z|`. Rows are taken in blocks: memory O(N), and the gradient comes from the same pass.

    Args:
        z (Tensor): (2N, D); rows i and i + N are the two views of a sample.
        temperature (float): T.
        normalize (bool): divide rows by their norm.
        impl (str): ``"auto"`` or ``"reference"``: plain torch is its only backend.

    Returns:
        Tensor: (), float32 (float64 for float64). First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> print(f"{LF.nt_xent_loss(torch.eye(2).repeat(2, 1), temperature=1.0).item():.4f}")
        0.5514
    """
    _contrastive_input(z, temperature)
    if z.dim() != 2 or z.shape[0] % 2:
        raise ValueError(f"z must be (2N, D), the second views below the first, got shape {checks.shape_of(z)}")
    labels = torch.arange(z.shape[0] // 2, device=z.device).repeat(2)
    return _local.contrastive(z, labels, z.shape[0], float(temperature), 1.0, bool(normalize), impl)


def supcon_loss(
    z, target=None, *, temperature=0.07, base_temperature=None, contrast_mode="all", normalize=True, impl="auto"
):
    r"""Supervised contrastive loss: every anchor against all other rows, its class (or its other views) as positives.

    .. math::
        L = \frac{T / T_0}{A} \sum_i \Big(\log \sum_{j \ne i} e^{S_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} S_{ip}\Big)

    with :math:`S = q q^T / T`, q the normalised rows. An anchor without positives contributes 0 and stays in the mean.

    Args:
        z (Tensor): (B, V, D), V views of each sample, or (B, D).
        target (Tensor, optional): (B,) labels. None: the other views of the same sample are the positives.
        temperature (float): T. base_temperature (float, optional): T_0; None: T / T_0 is 1.
        contrast_mode (str): ``"all"``: every view is an anchor; ``"one"``: the first.
        normalize (bool): divide rows by their norm.
        impl (str): ``"auto"`` or ``"reference"``: plain torch is its only backend.

    Returns:
        Tensor: (), float32 (float64 for float64). First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: Khosla et al., "Supervised Contrastive Learning" (2020); InfoPro's code for rows without positives.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> print(f"{LF.supcon_loss(z, torch.tensor([0, 0, 1]), temperature=1.0).item():.4f}")
        0.2088
    """
    _contrastive_input(z, temperature)
    checks.dims("z", z, (2, 3), "(B, V, D) or (B, D)")
    if base_temperature is not None:
        checks.positive("base_temperature", base_temperature)
    checks.choice("contrast_mode", contrast_mode, ("all", "one"))
    if target is None:
        labels = torch.arange(z.shape[0], device=z.device)
    else:
        _rows("target", target, z, "one label per row of z")
        checks.same_device(z=z, target=target)
        labels = target
    rows, views = z, 1
    if z.dim() == 3:
        views = z.shape[1]
        rows = z.transpose(0, 1).reshape(-1, z.shape[2])
    anchors = z.shape[0] if contrast_mode == "one" else rows.shape[0]
    factor = 1.0 if base_temperature is None else temperature / base_temperature
    return _local.contrastive(rows, labels.repeat(views), anchors, float(temperature), factor, bool(normalize), impl)


def info_nce_loss(query, keys, *, negatives, temperature=1.0, impl="auto"):
    r"""InfoNCE with given negatives: query i against its key and the keys listed for it.

    .. math:: L = \frac1N \sum_i \Big(\log\big(e^{q_i k_i / T} + \sum_n e^{q_i k_n / T}\big) - q_i k_i / T\Big)

    The keys are gathered for a block of rows at a time, never for all of them.

    Args:
        query (Tensor): (N, D). keys (Tensor): (M, D), M >= N; row i is the positive of query i.
        negatives (Tensor): (N, n) integers: row numbers of ``keys``.
        temperature (float): T.
        impl (str): ``"auto"`` or ``"reference"``: plain torch is its only backend.

    Returns:
        Tensor: (), float32 (float64 for float64). First derivatives only.

    Raises: ValueError, TypeError naming the argument.

    Source: van den Oord et al. (2018); Lowe et al., "Greedy InfoMax" (2019), whose queries are already multiplied by
    the prediction matrix (its 1e-11 inside the logarithm is left out).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> print(f"{LF.info_nce_loss(torch.eye(2), torch.eye(2), negatives=torch.tensor([[1], [0]])).item():.4f}")
        0.3133
    """
    checks.floating("query", query)
    checks.dims("query", query, (2,), "(N, D)")
    _not_empty("query", query)
    checks.floating("keys", keys)
    if keys.dim() != 2 or keys.shape[1] != query.shape[1] or keys.shape[0] < query.shape[0]:
        raise ValueError(
            f"keys must be (M, {query.shape[1]}) with M >= {query.shape[0]} (row i is the positive of "
            f"query i), got shape {checks.shape_of(keys)}"
        )
    if keys.dtype != query.dtype:
        raise TypeError(f"keys must be {str(query.dtype)[6:]} like query, got {str(keys.dtype)[6:]}")
    checks.integer("negatives", negatives)
    if negatives.dim() != 2 or negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives must be ({query.shape[0]}, n): row numbers of keys for each query, "
            f"got shape {checks.shape_of(negatives)}"
        )
    checks.positive("temperature", temperature)
    checks.same_device(query=query, keys=keys, negatives=negatives)
    return _local.info_nce(query, keys, negatives, float(temperature), impl)
