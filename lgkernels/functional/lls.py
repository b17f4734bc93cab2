"""LLS (Local Learning rule inspired by neural activity Synchronization): check, then call the autograd entry."""

from typing import Literal

import torch
from torch import Tensor

from ..core import checks
from ..ops.lls import autograd as _lls
from ..ops.lls import basis as _basis
from ..ops.lls.options import LOSSES, REDUCTIONS, WAVEFORMS, HeadOptions

__all__ = ["lls_basis", "lls_loss"]


def lls_basis(
    rows: int,
    dim: int,
    *,
    waveform: Literal["square", "cosine"] = "square",
    min_freq: float = 50.0,
    max_freq: float = 512.0,
    device: torch.device | str | int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Periodic basis of LLS.

    .. math:: \Phi_{kj} = \sin(\mathrm{fl32}(f_k\, j)), \qquad f = \mathrm{linspace}(f_{min}, f_{max}, K)

    in radians, ``j = 0 .. d-1``; ``waveform="square"`` is its sign (column 0, sin 0, stays 0). Built once on the
    CPU in float32 and cached for each device: linspaces and sines of other devices differ.

    Args:
        rows (int): K, number of basis rows (classes, unless the modulation is reduced).
        dim (int): d, size of the latents.
        waveform (str): ``"square"`` or ``"cosine"``. "cosine" is the paper's name; the authors' code computes a
            sine, and so do we.
        min_freq, max_freq (float): first and last frequency.
        device: where the table lies. Default: CPU.
        impl (str): one of the usual names; they all give this table.

    Returns:
        Tensor: (rows, dim) float32, a copy that you may write to.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Apolinario, Roy, Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural Activity
    Synchronization", WACV 2025, and its code.

    Example:
        >>> import lgkernels.functional as LF
        >>> LF.lls_basis(2, 4)
        tensor([[ 0., -1., -1., -1.],
                [ 0.,  1., -1.,  1.]])
    """
    rows, dim = checks.positive_integer("rows", rows), checks.positive_integer("dim", dim)
    checks.choice("waveform", waveform, WAVEFORMS)
    min_freq, max_freq = checks.number("min_freq", min_freq), checks.number("max_freq", max_freq)
    checks.number("max_freq * dim", max_freq * dim * 2)
    checks.number("min_freq * dim", min_freq * dim * 2)
    checks.device("device", device)
    checks.impl(impl)
    device = torch.device("cpu" if device is None else device)
    if torch.compiler.is_compiling():  # a graph holds one opaque call, not how the table is made
        return torch.ops.lgkernels.lls_basis(rows, dim, waveform, float(min_freq), float(max_freq), device, impl)
    return _basis.table(rows, dim, waveform, min_freq, max_freq, device).clone()


def lls_loss(
    activation: Tensor,
    target: Tensor,
    modulation: Tensor | None = None,
    *,
    num_classes: int,
    pool_size: int,
    waveform: Literal["square", "cosine"] = "square",
    temperature: float = 0.5,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    eps: float = 1e-12,
    zero_gradient_below_eps: bool = False,
    basis: Tensor | None = None,
    basis_scale: float = 1.0,
    loss: Literal["cross_entropy", "hard_sigmoid_mse"] = "cross_entropy",
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Local loss of LLS, LLS-M and LLS-MxM: the layer's pooled activation against a fixed periodic basis.

    .. math::
        x = \mathrm{pool}(a), \quad s = \frac{x}{\max(\lVert x\rVert_2, \epsilon)} \Phi^T, \quad
        z = s \;|\; s \odot m \;|\; s M, \quad L = \mathrm{CE}(z / T, y)

    Args:
        activation (Tensor): (B, C, H, W), pooled to ``pool_size`` x ``pool_size`` by adaptive average pooling and
            flattened to d = C * pool_size^2 latents, or (B, N), pooled along N to d = pool_size. float32,
            bfloat16, float16; float64 runs in the reference.
        target (Tensor): (B,) class indices, any integer dtype.
        modulation (Tensor, optional): None is LLS; (num_classes,) LLS-M; (K, num_classes) LLS-MxM, K rows of the
            basis (K != num_classes: the reduced set). float64 if and only if the activation is.
        num_classes (int): C.
        pool_size (int): P. It may exceed the activation's size (features repeat), and bins may overlap.
        waveform (str): ``"square"`` or ``"cosine"``; see :func:`lls_basis`.
        temperature (float): T.
        label_smoothing (float): in [0, 1].
        normalize (bool): divide the latents by their L2 norm (False: the TESS variant).
        eps (float): lower bound of that norm. A row below it gets the gradient of the bounded formula, up to
            1/eps large, as torch's ``normalize`` gives.
        zero_gradient_below_eps (bool): give such a row no gradient instead.
        basis (Tensor, optional): (K, d) of any float dtype replaces the periodic basis (the random-basis control). Not
            trained.
        basis_scale (float): factor on the basis (TESS: 1/d).
        loss (str): ``"cross_entropy"`` or ``"hard_sigmoid_mse"`` (TESS): mean over classes of
            (hard_sigmoid(z/T) - onehot)^2, with a straight-through gradient, hard_sigmoid(v) = clamp(v/4 + 1/2, 0, 1).
        ignore_index (int): rows with this target count nothing.
        reduction (str): ``"mean"`` (over the rows not ignored), ``"sum"``, ``"none"``.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: the loss, () or (B,) for ``"none"``; float32 (float64 for float64). Its gradients to ``activation``
        and ``modulation`` are exact; there is no second derivative (differentiating twice raises).

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Results are bitwise repeatable. Source: Apolinario, Roy, Roy, WACV 2025 (LLS); TESS (its later head).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> activation = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> loss = LF.lls_loss(activation, torch.tensor([0, 1]), num_classes=2, pool_size=2)
        >>> loss.backward()
        >>> activation.grad.shape
        torch.Size([2, 3, 4, 4])
    """
    checks.floating("activation", activation)
    checks.dims("activation", activation, (2, 4), "(B, C, H, W) or (B, N)")
    checks.class_targets("target", target, activation, "activation")
    num_classes = checks.positive_integer("num_classes", num_classes, 2**31)
    pool_size = checks.positive_integer("pool_size", pool_size)
    checks.choice("waveform", waveform, WAVEFORMS)
    checks.choice("loss", loss, LOSSES)
    checks.choice("reduction", reduction, REDUCTIONS)
    temperature = checks.positive("temperature", temperature)
    eps = checks.positive("eps", eps)
    basis_scale = checks.number("basis_scale", basis_scale)
    checks.boolean("normalize", normalize)
    checks.boolean("zero_gradient_below_eps", zero_gradient_below_eps)
    ignore_index = checks.whole_number("ignore_index", ignore_index)
    checks.impl(impl)
    label_smoothing = checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
    if loss != "cross_entropy" and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 with loss={loss!r}, got {label_smoothing}")
    if 0 in activation.shape[1:]:
        raise ValueError(
            f"activation must have no empty dimension but the batch, got shape {checks.shape_of(activation)}"
        )
    dim = _lls.op.latent_size(activation.shape, pool_size)
    if dim >= 2**31:
        raise ValueError(f"pool_size must give fewer than 2**31 latents, got {pool_size} (which gives {dim})")
    if basis is not None:
        checks.floating("basis", basis)
        checks.dims("basis", basis, (2,), f"(K, {dim})")
        checks.shape("basis", basis, (basis.shape[0], dim), "the size of the pooled latents")
        basis = basis.detach()
    if modulation is not None:
        checks.floating("modulation", modulation)
        checks.dims("modulation", modulation, (1, 2), "(num_classes,) or (K, num_classes)")
        if modulation.shape[-1] != num_classes or not modulation.shape[0]:
            raise ValueError(
                f"modulation must be (num_classes,) or (K, num_classes) with num_classes={num_classes}, "
                f"got shape {checks.shape_of(modulation)}"
            )
    if basis is not None:
        rows = modulation.shape[0] if modulation is not None else num_classes
        if basis.shape[0] != rows:
            which = "num_classes" if modulation is None else "those of modulation"
            raise ValueError(f"basis must have {rows} rows ({which}), got shape {checks.shape_of(basis)}")
    checks.same_device(activation=activation, target=target, modulation=modulation, basis=basis)
    if modulation is not None:
        checks.precision("modulation", modulation, "activation", activation)
    options = HeadOptions(
        num_classes,
        temperature,
        label_smoothing,
        normalize,
        eps,
        zero_gradient_below_eps,
        basis_scale,
        loss,
        ignore_index,
        reduction,
    )
    return _lls.lls_loss(activation, target, modulation, basis, waveform, pool_size, options, impl)
