"""Layers with explicit tangents: check the arguments, then compute without a graph."""

from torch import Tensor

from ..core import checks
from ..ops.forward_gradient import layers as _layers
from ..ops.forward_gradient.layers import refuse_duals
from ..random import RandomFeedback

__all__ = ["activity_perturbation_grad", "dual_group_linear", "dual_linear", "dual_norm_noise_relu"]


def tangents(**pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Each of (tangent, of what): None, or shaped like it and on its device, float64 if and only if it is."""
    for name, (tangent, of) in pairs.items():
        if tangent is None:
            continue
        checks.floating(name, tangent)
        own = "x" if name == "tangent" else name.removesuffix("_tangent")
        if of is None:
            raise ValueError(f"{name} must be None where there is no {own}, got shape {checks.shape_of(tangent)}")
        checks.shape(name, tangent, of.shape, f"that of {own}")
        checks.precision(name, tangent, own, of)
        checks.same_device(**{own: of, name: tangent})


def dual_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_tangent: Tensor | RandomFeedback | None = None,
    bias_tangent: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""A linear layer and its derivative along tangents.

    .. math:: y = x W^T + b, \qquad \dot y = \dot x W^T + x \dot W^T + \dot b

    No product is made for a zero tangent. Where x and its tangent lie one behind the other in memory, as the results
    of these functions do, the two products with W are one.

    Args:
        x (Tensor): (..., in). x_tangent (Tensor, optional): shaped like x; None: zero.
        weight (Tensor): (out, in), torch's layout. bias (Tensor, optional): (out,).
        weight_tangent (Tensor or RandomFeedback, optional): shaped like weight; a formula is written out some rows at
            a time. bias_tangent (Tensor, optional): shaped like bias.
        impl (str): ``"auto"`` or a backend; each takes torch's products.

    Returns:
        (Tensor, Tensor): y and its tangent, (..., out). No graph is recorded.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for dual tensors.

    Source: forward-mode differentiation; Ren et al. (ICLR 2023), section 3.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.dual_linear(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]]))
        (tensor([[5.]]), tensor([[2.]]))
    """
    checks.linear(x, weight, bias)
    checks.impl(impl)
    given = weight_tangent
    if isinstance(given, RandomFeedback):
        checks.same_device(weight=weight, weight_tangent=given.state)
        given = None
    tangents(x_tangent=(x_tangent, x), weight_tangent=(given, weight), bias_tangent=(bias_tangent, bias))
    refuse_duals("dual_linear", x, x_tangent, weight, bias, bias_tangent, given)
    return _layers.dual_linear(x, x_tangent, weight, bias, weight_tangent, bias_tangent)


def dual_group_linear(
    x: Tensor, x_tangent: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""A linear layer of each group of channels, and its derivative along the tangent of x.

    .. math:: y_g = W_g x_g + b_g, \qquad \dot y_g = W_g \dot x_g

    Args:
        x (Tensor): (..., G, C). x_tangent (Tensor, optional): shaped like x; None: zero.
        weight (Tensor): (G, C_out, C). bias (Tensor, optional): (G, C_out).
        impl (str): ``"auto"`` or a backend; each takes torch's products.

    Returns:
        (Tensor, Tensor): y and its tangent, (..., G, C_out). No graph is recorded.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for dual tensors.

    Source: Ren et al. (ICLR 2023), section 5 (the group layer of LocalMixer).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> y, y_tangent = LF.dual_group_linear(torch.ones(2, 3), None, torch.ones(2, 1, 3))
        >>> y, y_tangent
        (tensor([[3.],
                [3.]]), tensor([[0.],
                [0.]]))
    """
    checks.floating("x", x)
    checks.floating("weight", weight)
    checks.dims("weight", weight, (3,), "(G, C_out, C)")
    if x.dim() < 2 or x.shape[-2:] != (weight.shape[0], weight.shape[2]):
        raise ValueError(
            f"x must be (..., {weight.shape[0]}, {weight.shape[2]}), groups and channels of weight, got shape "
            f"{checks.shape_of(x)}"
        )
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, weight.shape[:2], "one for each output of weight")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {checks.dtype_of(x)}, got {checks.dtype_of(value)}")
    checks.impl(impl)
    checks.same_device(x=x, weight=weight, bias=bias)
    tangents(x_tangent=(x_tangent, x))
    refuse_duals("dual_group_linear", x, x_tangent, weight, bias)
    return _layers.dual_group_linear(x, x_tangent, weight, bias)


def as_noise(noise: Tensor | RandomFeedback, z: Tensor) -> tuple:
    """The noise as the ops take it."""
    if isinstance(noise, RandomFeedback):
        checks.same_device(z=z, noise=noise.state)
        return None, noise.state, noise.law, noise.scale, noise.low
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor shaped like z or a RandomFeedback, got {checks.got(noise)}")
    checks.floating("noise", noise)
    checks.shape("noise", noise, z.shape, "that of z")
    checks.precision("noise", noise, "z", z)
    checks.same_device(z=z, noise=noise)
    return noise, None, "normal", 1.0, None


def _norm_arguments(z: Tensor, dim: int, eps: float) -> tuple[int, float]:
    checks.floating("z", z)
    if z.dim() < 2:
        raise ValueError(f"z must be (N, ...) with at least 2 dimensions, got shape {checks.shape_of(z)}")
    dim = checks.integer_between("dim", dim, -z.dim(), z.dim()) % z.dim()
    if not dim:
        raise ValueError("dim must not be 0, the samples, which no layer norm mixes")
    return dim, checks.positive("eps", eps)


def dual_norm_noise_relu(
    z: Tensor,
    z_tangent: Tensor | None,
    residual: Tensor | None = None,
    *,
    noise: Tensor | RandomFeedback,
    dim: int = -1,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Layer norm, ReLU, and their derivative along a tangent to which noise is added between the two.

    .. math:: y = \mathrm{relu}(\mathrm{LN}(z) + r), \qquad
        \dot y = 1[y > 0]\, (\mathrm{LN}'(z)\, \dot z + u)

    The layer norm has no scale and shift. The noise u perturbs the activity after the norm: it is the tangent that an
    activity-perturbed forward gradient sends on. By a formula it is made where it is used, and never stored.

    Args:
        z (Tensor): (N, ...). z_tangent (Tensor, optional): shaped like z; None: zero.
        residual (Tensor, optional): r, shaped like z; it has no tangent.
        noise (Tensor or RandomFeedback): u, shaped like z. By a formula row n of the matrix is sample n, flattened.
        dim (int): the dimension of the norm, not 0.
        eps (float): added to the variance.
        impl (str): ``"auto"`` or a backend.

    Returns:
        (Tensor, Tensor): y and its tangent, like z, one behind the other in memory. No graph is recorded.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for dual tensors.

    Source: Ren et al. (ICLR 2023), sections 3 and 5.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> y, y_tangent = LF.dual_norm_noise_relu(torch.tensor([[1.0, 3.0]]), None, noise=torch.ones(1, 2))
        >>> y_tangent
        tensor([[0., 1.]])
    """
    dim, eps = _norm_arguments(z, dim, eps)
    tangents(z_tangent=(z_tangent, z))
    if residual is not None:
        checks.floating("residual", residual)
        checks.shape("residual", residual, z.shape, "that of z")
        checks.precision("residual", residual, "z", z)
        checks.same_device(z=z, residual=residual)
    u = as_noise(noise, z)
    checks.impl(impl)
    refuse_duals("dual_norm_noise_relu", z, z_tangent, residual, u[0])
    return _layers.dual_norm(z, z_tangent, residual, u, dim, eps, True, impl)


def activity_perturbation_grad(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    coefficient: Tensor,
    *,
    noise: Tensor | RandomFeedback,
    dim: int = -1,
    eps: float = 1e-5,
    groups: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""The activity-perturbed gradient of a linear layer that is followed by :func:`dual_norm_noise_relu`.

    .. math:: g = \mathrm{LN}'(z)\,(q\, u\, 1[y > 0]), \qquad \Delta W = \sum g x^T, \qquad \Delta b = \sum g

    with the coefficient q, the derivative of the loss along the noise u, which is made again and never stored.

    Args:
        x (Tensor): (..., in), the layer's input: z = x W^T + b. With ``groups`` (..., G, in).
        z (Tensor): (..., out), the layer's output, before the norm; (..., G, out). y (Tensor): after the ReLU.
        coefficient (Tensor): q: z's sizes but that of ``dim``, which divides z's: one number for each run of
            channels. Of z (N, P, D) with losses of G groups it is (N, P, G); of z (N, D, P) with dim=1, (N, 1, P).
        noise, dim, eps, impl: as :func:`dual_norm_noise_relu`.
        groups (bool): a layer of its own for each group, as :func:`dual_group_linear`.

    Returns:
        (Tensor, Tensor): the gradients of weight (out, in) or (G, out, in) and of bias (out,) or (G, out), float32
        (float64 for float64), sums over all samples. No graph is recorded.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for dual tensors.

    Source: Ren et al. (ICLR 2023), section 3 (activity perturbation) and 5.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, z = torch.ones(1, 2), torch.tensor([[1.0, 3.0, 2.0]])
        >>> y, _ = LF.dual_norm_noise_relu(z, None, noise=torch.ones(1, 3))
        >>> grad_weight, grad_bias = LF.activity_perturbation_grad(x, z, y, torch.ones(1, 1), noise=torch.ones(1, 3))
        >>> tuple(grad_weight.shape), tuple(grad_bias.shape)
        ((3, 2), (3,))
    """
    dim, eps = _norm_arguments(z, dim, eps)
    checks.boolean("groups", groups)
    checks.floating("x", x)
    if x.dim() != z.dim() or x.shape[:-1] != z.shape[:-1] or groups and z.dim() < 3:
        expected = (*z.shape[:-1], x.shape[-1] if x.dim() else 1)
        raise ValueError(
            f"x must be {tuple(expected)} but for its last size (z's rows), got shape {checks.shape_of(x)}"
        )
    checks.precision("x", x, "z", z)
    checks.floating("y", y)
    checks.shape("y", y, z.shape, "that of z")
    checks.precision("y", y, "z", z)
    checks.floating("coefficient", coefficient)
    runs = coefficient.shape[dim] if coefficient.dim() == z.dim() else 0
    if not runs or z.shape[dim] % runs or coefficient.shape != (*z.shape[:dim], runs, *z.shape[dim + 1 :]):
        raise ValueError(
            f"coefficient must have z's shape {checks.shape_of(z)} but for dimension {dim}, whose size divides z's, "
            f"got shape {checks.shape_of(coefficient)}"
        )
    checks.precision("coefficient", coefficient, "z", z)
    u = as_noise(noise, z)
    checks.impl(impl)
    checks.same_device(z=z, x=x, y=y, coefficient=coefficient)
    refuse_duals("activity_perturbation_grad", x, z, y, coefficient, u[0])
    return _layers.activity_grads(x, z, y, coefficient, u, dim, eps, groups, impl)
