"""The contrastive losses of the family local_loss, for which local_loss.py has no room."""

from typing import Literal

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import refuse_transforms
from ..ops.local_loss import autograd as _local
from ..ops.local_loss.options import ContrastiveOptions

__all__ = ["info_nce_loss", "nt_xent_loss", "supcon_loss"]


def _contrastive(z: Tensor, temperature: float, normalize: bool, impl: str) -> float:
    """The temperature as a float."""
    checks.floating("z", z)
    checks.not_empty("z", z)
    checks.boolean("normalize", normalize)
    checks.impl(impl)
    return checks.positive("temperature", temperature)


def nt_xent_loss(z: Tensor, *, temperature: float = 0.1, normalize: bool = True, impl: str = "auto") -> Tensor:
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
    temperature = _contrastive(z, temperature, normalize, impl)
    if z.dim() != 2 or z.shape[0] % 2:
        raise ValueError(f"z must be (2N, D), the second views below the first, got shape {checks.shape_of(z)}")
    labels = torch.arange(z.shape[0] // 2, device=z.device).repeat(2)
    options = ContrastiveOptions(z.shape[0], temperature, 1.0, normalize, False)
    return _local.contrastive("nt_xent_loss", z, labels, options, impl)


def supcon_loss(
    z: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    contrast_mode: Literal["all", "one"] = "all",
    anchors_without_positives: Literal["zero", "exclude"] = "zero",
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    r"""Supervised contrastive loss: every anchor against all other rows, its class (or its other views) as positives.

    .. math::
        L = \frac{T / T_0}{A} \sum_i \Big(\log \sum_{j \ne i} e^{S_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} S_{ip}\Big)

    with :math:`S = q q^T / T`, q the normalised rows, A the number of anchors. An anchor without positives (its class
    has one row in the batch) contributes 0; ``anchors_without_positives`` says whether A counts it.

    Args:
        z (Tensor): (B, V, D), V views of each sample, or (B, D).
        target (Tensor, optional): (B,) labels. None: the other views of the same sample are the positives.
        temperature (float): T. base_temperature (float, optional): T_0; None: T / T_0 is 1.
        contrast_mode (str): ``"all"``: every view is an anchor; ``"one"``: the first.
        anchors_without_positives (str): ``"zero"``: A counts them too, as in InfoPro's code; ``"exclude"``: the mean is
            over the others, as pytorch-metric-learning's, and 0 where there are none.
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
    refuse_transforms("supcon_loss")  # before the rows are laid out: what Dynamo has traced by then it cannot resume
    temperature = _contrastive(z, temperature, normalize, impl)
    checks.dims("z", z, (2, 3), "(B, V, D) or (B, D)")
    if base_temperature is not None:
        base_temperature = checks.positive("base_temperature", base_temperature)
    checks.choice("contrast_mode", contrast_mode, ("all", "one"))
    checks.choice("anchors_without_positives", anchors_without_positives, ("zero", "exclude"))
    exclude = anchors_without_positives == "exclude"
    if target is None:
        labels = torch.arange(z.shape[0], device=z.device)
    else:
        checks.class_targets("target", target, z, "z")
        checks.same_device(z=z, target=target)
        labels = target
    rows, views = z, 1
    if z.dim() == 3:
        views = z.shape[1]
        rows = z.transpose(0, 1).reshape(-1, z.shape[2])
    anchors = z.shape[0] if contrast_mode == "one" else rows.shape[0]
    factor = 1.0
    if base_temperature is not None:
        factor = checks.number("temperature / base_temperature", temperature / base_temperature)
    options = ContrastiveOptions(anchors, temperature, factor, normalize, exclude)
    return _local.contrastive("supcon_loss", rows, labels.repeat(views), options, impl)


def info_nce_loss(
    query: Tensor, keys: Tensor, *, negatives: Tensor, temperature: float = 1.0, impl: str = "auto"
) -> Tensor:
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
    checks.not_empty("query", query)
    checks.floating("keys", keys)
    if keys.dim() != 2 or keys.shape[1] != query.shape[1] or keys.shape[0] < query.shape[0]:
        raise ValueError(
            f"keys must be (M, {query.shape[1]}) with M >= {query.shape[0]} (row i is the positive of "
            f"query i), got shape {checks.shape_of(keys)}"
        )
    if keys.dtype != query.dtype:
        raise TypeError(f"keys must be {checks.dtype_of(query)} like query, got {checks.dtype_of(keys)}")
    checks.integer("negatives", negatives, "row numbers of keys are expected")
    if negatives.dim() != 2 or negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives must be ({query.shape[0]}, n): row numbers of keys for each query, "
            f"got shape {checks.shape_of(negatives)}"
        )
    temperature = checks.positive("temperature", temperature)
    checks.impl(impl)
    checks.same_device(query=query, keys=keys, negatives=negatives)
    return _local.info_nce(query, keys, negatives, temperature, impl)
