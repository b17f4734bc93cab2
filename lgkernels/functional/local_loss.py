"""Local losses: check the arguments, then call the family's autograd entry."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..core.autograd import refuse_transforms
from ..core.ops import class_indices
from ..ops.local_loss import autograd as _local
from .contrastive import info_nce_loss, nt_xent_loss, supcon_loss

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


def _samples(name: str, value: Tensor) -> None:
    checks.floating(name, value)
    if value.dim() < 2:
        raise ValueError(f"{name} must be (B, ...) with at least 2 dimensions, got shape {checks.shape_of(value)}")


def local_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Local classifier: average pool, linear layer, cross entropy.

    .. math:: L = \mathrm{CE}(\bar h W^T + b,\; y)

    with the mean :math:`\bar h` over the positions. The gradient of ``h`` is constant over the positions: it is
    returned as one value per channel, repeated with stride 0, and ``h`` itself is not kept.

    Args:
        h (Tensor): (B, C, H, W), pooled over H and W; (B, T, C), pooled over T; (B, C), not pooled.
        weight (Tensor): (K, C), of K classes. bias (Tensor, optional): (K,). Both float64 if and only if h is: all is
            computed in float32 otherwise, so halves and float32 mix.
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
    checks.not_empty("h", h)
    checks.floating("weight", weight)
    checks.dims("weight", weight, (2,), "(num_classes, C)")
    channels = h.shape[1] if h.dim() == 4 else h.shape[-1]
    if weight.shape[1] != channels or not weight.shape[0]:
        raise ValueError(
            f"weight must be (num_classes, {channels}) for h of shape {checks.shape_of(h)}, "
            f"got shape {checks.shape_of(weight)}"
        )
    checks.bias("bias", bias, weight)
    checks.class_targets("target", target, h, "h")
    label_smoothing = checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.impl(impl)
    checks.same_device(h=h, weight=weight, bias=bias, target=target)
    checks.precision("weight", weight, "h", h)
    if bias is not None:
        checks.precision("bias", bias, "h", h)
    return _local.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, impl)


def goodness_loss(
    h: Tensor,
    is_positive: Tensor,
    *,
    threshold: float = 2.0,
    goodness: Literal["mean", "sum"] = "mean",
    impl: str = "auto",
) -> Tensor:
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


def check_is_positive(is_positive: Tensor, rows: Tensor) -> None:
    """One bool for each of the rows."""
    checks.tensor("is_positive", is_positive)
    if is_positive.dtype != torch.bool:
        raise TypeError(f"is_positive must be bool, got {checks.dtype_of(is_positive)}; pass `label == 1`, say")
    checks.shape("is_positive", is_positive, rows.shape[:1], "one entry per row of h")


def goodness_and_squares(
    h: Tensor, is_positive: Tensor, threshold: float, goodness: str, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`(loss, squares (B,))`: the rows' sums of squares also normalise the next layer's input."""
    _samples("h", h)
    checks.not_empty("h", h)
    check_is_positive(is_positive, h)
    checks.choice("goodness", goodness, ("mean", "sum"))
    threshold = checks.number("threshold", threshold)
    checks.impl(impl)
    checks.same_device(h=h, is_positive=is_positive)
    return _local.goodness(h, is_positive, threshold, goodness == "mean", impl)


def peer_normalization_loss(
    h_pos: Tensor, running_mean: Tensor, *, momentum: float = 0.9, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Forward-Forward's peer normalisation: units whose mean activity leaves that of their peers are pulled back.

    .. math:: m = \mu\, m_{old} + (1 - \mu)\, \mathrm{mean}_b h, \qquad L = \mathrm{mean}_d (\mathrm{mean}(m) - m_d)^2

    The running mean counts as a constant.

    Args:
        h_pos (Tensor): (B, ...), activity of positive samples. running_mean (Tensor): shaped like one row; float64 if
            and only if ``h_pos`` is.
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
    _samples("h_pos", h_pos)
    checks.not_empty("h_pos", h_pos)
    checks.floating("running_mean", running_mean)
    checks.shape("running_mean", running_mean, h_pos.shape[1:], "one row of h_pos")
    momentum = checks.between("momentum", momentum, 0.0, 1.0)
    checks.impl(impl)
    checks.same_device(h_pos=h_pos, running_mean=running_mean)
    checks.precision("running_mean", running_mean, "h_pos", h_pos)
    return _local.peer_normalization(h_pos, running_mean, momentum, impl)


def _entry(value: float | Tensor, x: Tensor) -> Tensor:
    """The value of `overlay_label` as a tensor () like x. One that is a tensor is not read: no device waits."""
    if isinstance(value, Tensor):
        checks.floating("value", value, checks.FLOATING + checks.INTEGER)
        if value.numel() != 1:
            raise ValueError(f"value must be one number, got shape {checks.shape_of(value)}")
        if value.device.type == "meta" and x.device.type != "meta":
            raise ValueError(f"value must have memory, got a tensor on {value.device}")
        return value.reshape(()).to(x)
    largest = torch.finfo(x.dtype).max
    number = checks.number("value", value)
    if abs(number) > largest:
        raise ValueError(f"value must be finite in {checks.dtype_of(x)}, that of x, got {number}")
    return torch.tensor(number, dtype=x.dtype, device=x.device)


def overlay_label(
    x: Tensor, label: Tensor, *, num_classes: int, value: float | Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Forward-Forward's label in the input: the first ``num_classes`` entries of a copy are 0, entry ``label`` is not.

    Args:
        x (Tensor): (B, D), or (B, C, H, W): the entries are then the first pixels of every channel, row by row.
        label (Tensor): (B,) class indices.
        num_classes (int): at most the entries there are.
        value (float or Tensor of one number, optional): what the label's entry holds, and where a tensor's gradient
            goes; its number is not looked at. None: the largest value of the batch.
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
    num_classes = checks.positive_integer("num_classes", num_classes)
    entry = x.detach() if value is None else _entry(value, x)
    checks.impl(impl)
    entries = x.shape[1:].numel() if x.dim() == 2 else x.shape[2] * x.shape[3]
    if num_classes > entries:
        raise ValueError(
            f"num_classes must be at most {entries}, the entries that x of shape {checks.shape_of(x)} "
            f"offers, got {num_classes}"
        )
    checks.class_targets("label", label, x, "x")
    checks.same_device(x=x, label=label)
    label = class_indices("label", label, num_classes)
    if not x.numel():
        return x.clone()
    entry = entry.amax() if value is None else entry
    classes = torch.arange(num_classes, device=x.device)
    patch = torch.where(label.unsqueeze(1) == classes, entry, torch.zeros_like(entry))
    flat = x.reshape(x.shape[0], -1, entries)
    patch = patch.unsqueeze(1).expand(-1, flat.shape[1], -1)
    return torch.cat([patch, flat[:, :, num_classes:]], 2).reshape(x.shape)


def similarity_matching_loss(
    h: Tensor,
    target: Tensor,
    sim_weight: Tensor | None = None,
    *,
    num_classes: int,
    use_std: bool = True,
    impl: str = "auto",
) -> Tensor:
    r"""Similarity matching: samples as alike as their labels.

    .. math:: L = \frac{1}{B^2} \sum_{ij} (R(x)_{ij} - R(\mathrm{onehot}(y))_{ij})^2

    R: every row centred and divided by 1e-8 + its norm, then all inner products, clamped to [-1, 1]. x is ``h``, or
    ``h`` through the learned layer ``sim_weight``. Neither one-hot labels nor, for more rows than features, the
    (B, B) matrices are built. Not multiplied by beta.

    Args:
        h (Tensor): (B, C, H, W) or (B, N).
        target (Tensor): (B,) class indices.
        sim_weight (Tensor, optional): (C, C, 3, 3), a convolution with padding 1, or (N, N); None: identity.
            float64 if and only if h is; cast to h's dtype.
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
    checks.not_empty("h", h)
    num_classes = checks.positive_integer("num_classes", num_classes)
    checks.boolean("use_std", use_std)
    checks.impl(impl)
    checks.class_targets("target", target, h, "h")
    if sim_weight is not None:
        checks.floating("sim_weight", sim_weight)
        checks.precision("sim_weight", sim_weight, "h", h)
    checks.same_device(h=h, target=target, sim_weight=sim_weight)
    x = h
    if sim_weight is not None:
        n = h.shape[1]
        expected, why = ((n, n, 3, 3), "convolution with padding 1") if h.dim() == 4 else ((n, n), "linear layer")
        checks.shape("sim_weight", sim_weight, expected, why)
        if not checks.autocasts(h.device):
            sim_weight = sim_weight.to(h.dtype)
        x = F.conv2d(h, sim_weight, padding=1) if h.dim() == 4 else F.linear(h, sim_weight)
    return _local.similarity(x, target, num_classes, use_std, impl)


def prediction_similarity_loss(
    h: Tensor,
    target: Tensor,
    sim_weight: Tensor | None,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None = None,
    *,
    num_classes: int,
    beta: float = 0.99,
    use_std: bool = True,
    pool_kernel: int | Sequence[int] = 1,
    pool_padding: int | Sequence[int] = 0,
    impl: str = "auto",
) -> Tensor:
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
    checks.not_empty("h", h)
    beta = checks.between("beta", beta, 0.0, 1.0)
    num_classes = checks.positive_integer("num_classes", num_classes)
    kernel, padding = checks.pair("pool_kernel", pool_kernel, 1), checks.pair("pool_padding", pool_padding, 0)
    pooled = h
    if (kernel, padding) != ((1, 1), (0, 0)):
        if h.dim() == 2:
            raise ValueError(
                f"pool_kernel must be 1 and pool_padding 0 for h of shape {checks.shape_of(h)}, "
                f"got {pool_kernel} and {pool_padding}"
            )
        if any(2 * p > k for k, p in zip(kernel, padding)):
            raise ValueError(f"pool_padding must be at most half of pool_kernel {kernel}, got {padding}")
        if any(n + 2 * p < k for n, k, p in zip(h.shape[2:], kernel, padding)):
            raise ValueError(
                f"pool_kernel must fit into h of shape {checks.shape_of(h)} padded by {padding}, got {kernel}"
            )
        pooled = F.avg_pool2d(h, kernel, padding=padding)
    pooled = pooled.flatten(1)
    checks.floating("decoder_weight", decoder_weight)
    checks.shape("decoder_weight", decoder_weight, (num_classes, pooled.shape[1]), "classes, pooled and flattened h")
    checks.bias("decoder_bias", decoder_bias, decoder_weight)
    checks.same_device(h=h, decoder_weight=decoder_weight, decoder_bias=decoder_bias)
    refuse_transforms("prediction_similarity_loss")
    checks.precision("decoder_weight", decoder_weight, "h", h)
    if decoder_bias is not None:
        checks.precision("decoder_bias", decoder_bias, "h", h)
    prediction = local_cross_entropy(pooled, decoder_weight, decoder_bias, target, impl=impl)
    similarity = similarity_matching_loss(h, target, sim_weight, num_classes=num_classes, use_std=use_std, impl=impl)
    return (1 - beta) * prediction + beta * similarity
