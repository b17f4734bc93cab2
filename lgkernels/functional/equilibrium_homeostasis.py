"""The homeostatic loss, the measures of a net's symmetry, and the softmax pool."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import refuse_transforms
from ..core.float64 import double
from ..core.ops import wide
from ..ops.equilibrium import autograd as _entry
from ..ops.equilibrium.network import Network, network, widths
from ..ops.equilibrium.options import ESTIMATORS
from ..ops.equilibrium.pool import pooled
from ..random import RandomFeedback
from .equilibrium_arguments import Checked, layers, refuse_compiled


def _activities(weights: Any, activities: Any) -> tuple[Network, list[Tensor]]:
    found = network(weights)
    sizes = widths(found, weights)
    if not isinstance(activities, Mapping):
        raise TypeError(f"activities must be a dict of tensors by layer, got {type(activities).__name__}")
    if set(activities) != set(found.names):
        names = ", ".join(found.names)
        got = f"a {type(activities).__name__} {list(activities)}"
        raise ValueError(f"activities must have the layers {names}, got {got}")
    shapes, previous = [], None
    for name, channels in zip(found.names, sizes[1:]):
        r = activities[name]
        checks.floating("activities", r)
        if r.dim() != (4 if found.conv else 2) or r.shape[1] != channels:
            meaning = f"(B, {channels}{', H, W' if found.conv else ''})"
            raise ValueError(f"activities must be {meaning} in {name}, got shape {checks.shape_of(r)}")
        if previous is not None and found.conv:
            less = 2 * (name == "out")
            checks.shape(
                "activities",
                r,
                (len(r), channels, *((n - less) // 2 for n in previous)),
                f"half the layer below, in {name}",
            )
        previous = r.shape[2:]
        shapes.append(tuple(r.shape[1:]))
    first = activities[found.names[0]]
    checks.precision("activities", first, "weights", next(iter(weights.values())))
    checks.same_device(weights=next(iter(weights.values())), activities=first)
    return found, layers("activities", activities, Checked(found, shapes, 0, 0), first)


def _probes(eps: Any, noise: Any, probes: Any, found: Network, r: list[Tensor]) -> tuple[Any, Any]:
    """`(eps by layer or None, ((state, law), (K, B)) or None)`."""
    probes = checks.positive_integer("probes", probes, 2**20)
    if eps is not None:
        if not isinstance(eps, Mapping):
            raise TypeError(f"eps must be a dict of tensors by layer, got {type(eps).__name__}")
        first = next(iter(eps.values()), None)
        lead = (len(first),) if isinstance(first, Tensor) and first.dim() and len(first) else (probes,)
        shapes = [tuple(v.shape[1:]) for v in r]
        given = layers("eps", eps, Checked(found, shapes, 0, 0), r[0], lead)
        if noise is not None:
            raise ValueError(f"noise must be None where eps is given, got {type(noise).__name__}")
        return [e.detach() for e in given], None
    if noise is None:
        seed = torch.randint(2**62, (1,), device=r[0].device)
        state, law = torch.cat((seed, torch.zeros_like(seed), torch.zeros_like(seed))), "normal"
    else:
        if not isinstance(noise, RandomFeedback):
            raise TypeError(f"noise must be a RandomFeedback, got {type(noise).__name__}")
        if noise.low is not None:
            raise ValueError(f"noise must have mean 0, so no low, got low={noise.low}")
        checks.same_device(activities=r[0], noise=noise.state)
        state, law = noise.state, noise.law  # the scale does not matter: its law's deviation is divided out
    return None, ((state, law), (probes, len(r[0])))


def homeostatic_loss(
    weights: Mapping[str, Tensor],
    activities: Mapping[str, Tensor],
    *,
    estimator: Literal["paper", "symmetric", "exact"] = "paper",
    probes: int = 5,
    eps: Mapping[str, Tensor] | None = None,
    noise: RandomFeedback | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""How asymmetric the Jacobian J of a net's vector field by its activities is; weights descend along its gradient.

    .. math:: E\,[\|J \epsilon\|^2 - \epsilon^T J^2 \epsilon] / n = \|J - J^T\|_F^2 / 2n, \qquad
        \epsilon \sim N(0, 1)

    n: states of a sample. For a dense net J = W - 1, and the loss draws weights of opposite edges together, and those
    of edges without one to 0.

    Args:
        weights (dict): as :func:`ep_settle`; the loss is differentiable in them (with a gradient of 0 for those of the
            input and the readout).
        activities (dict): layer -> r = phi(u), (B, n) or (B, C, H, W); constants.
        estimator (str): ``"paper"``: the left side above, a mean over samples and probes, which may be negative.
            ``"symmetric"``: the mean of :math:`\|(J - J^T) \epsilon\|^2 / 2n`, never negative, of no greater variance.
            ``"exact"``: the right side, without noise; for a conv net by the products of its kernels.
        probes (int): K, where `eps` is not given.
        eps (dict, optional): layer -> (K, B, *), the noise.
        noise (RandomFeedback, optional): probe k of sample b is row k * B + b, one column a unit in the layers' order,
            divided by the standard deviation of its law, which has no `low`. It is made when it is used, and never
            stored. None: of law normal, with a seed from torch's generator.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: a scalar, float32 (float64 for float64). Its gradient is taken in the forward; once differentiable.

    Raises: ValueError, TypeError naming the argument; NotImplementedError inside of torch.func transforms.

    Source: Laborieux & Zenke (ICLR 2024), section 4, equation 9. The symmetric and exact forms are ours.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights = {"in-h/kernel": torch.eye(2), "h-out/kernel": torch.eye(2), "out-h/kernel": torch.zeros(2, 2)}
        >>> r = {"h": torch.zeros(1, 2), "out": torch.zeros(1, 2)}
        >>> LF.homeostatic_loss(weights, r, estimator="exact")  # two differences of 1, four units
        tensor(0.5000)
    """
    refuse_transforms("homeostatic_loss")
    found, r = _activities(weights, activities)
    if not len(r[0]):
        raise ValueError(f"activities must have at least one sample, got shape {checks.shape_of(r[0])}")
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.impl(impl)
    eps_, noise_ = _probes(eps, noise, probes, found, r)
    return _entry.homeostasis(weights, found, [v.detach() for v in r], eps_, noise_, estimator, impl)


def jacobian_symmetry(
    weights: Mapping[str, Tensor],
    activities: Mapping[str, Tensor],
    *,
    probes: int = 5,
    eps: Mapping[str, Tensor] | None = None,
    noise: RandomFeedback | None = None,
) -> Tensor:
    r"""The symmetric part of the Jacobian J by the activities: :math:`\|S\|_F / (\|S\|_F + \|A\|_F)`, 1 if symmetric.

    .. math:: \|S\|^2, \|A\|^2 = (\|J\|_F^2 \pm \mathrm{tr}\, J^2) / 2

    exactly for dense nets; for conv nets both are means over probes, so that n may be large.

    Args: weights, activities, probes, eps, noise: as :func:`homeostatic_loss`; the noise is for conv nets.

    Returns:
        Tensor: (B,), of each sample. No graph is recorded.

    Raises: as :func:`homeostatic_loss`.

    Source: Laborieux & Zenke (ICLR 2024), figure 4; the probes are ours.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights = {"in-h/kernel": torch.eye(2), "h-out/kernel": torch.eye(2), "out-h/kernel": torch.eye(2)}
        >>> LF.jacobian_symmetry(weights, {"h": torch.zeros(1, 2), "out": torch.zeros(1, 2)})
        tensor([1.])
    """
    refuse_transforms("jacobian_symmetry")
    refuse_compiled("jacobian_symmetry")
    found, r = _activities(weights, activities)
    eps_, noise_ = _probes(eps, noise, probes, found, r)
    return _entry.symmetry(weights, found, [v.detach() for v in r], eps_, noise_)


def weight_angle(weights: Mapping[str, Tensor]) -> Tensor:
    r"""The angle in degrees between forward and feedback weights, over all pairs of opposite edges.

    .. math:: \arccos \frac{\sum \langle W_f, W_b^T \rangle}{\sqrt{\sum \|W_f\|^2 \sum \|W_b\|^2}}

    Args:
        weights (dict): as :func:`ep_settle`. Convolutions have one layout in both directions, and are not transposed.

    Returns:
        Tensor: a scalar; nan where no layers are connected both ways. No graph is recorded.

    Raises: ValueError, TypeError naming the argument.

    Source: Laborieux & Zenke (ICLR 2024), figure 3.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights = {"in-h/kernel": torch.eye(2), "h-out/kernel": torch.eye(2), "out-h/kernel": torch.eye(2)}
        >>> LF.weight_angle(weights)
        tensor(0.)
    """
    refuse_transforms("weight_angle")
    refuse_compiled("weight_angle")
    found = network(weights)
    widths(found, weights)
    with torch.no_grad():
        any_weight = wide(next(iter(weights.values())))
        sums = double(any_weight.new_zeros(3))
        for up, down in found.pairs():
            w, v = (double(weights[f"{found.key(edge)}/kernel"]) for edge in (up, down))
            v = v if found.conv else v.t()
            sums += torch.stack([(w * v).sum(), w.square().sum(), v.square().sum()])
        cosine = sums[0] / (sums[1] * sums[2]).sqrt()
        return torch.rad2deg(cosine.clamp(-1, 1).acos()).to(any_weight.dtype).to(any_weight.device)


def softmax_pool2d(x: Tensor, *, temperature: float = 1.0, impl: str = "auto") -> Tensor:
    r"""A 2x2 pool of stride 2 that weighs the entries of a window by their softmax.

    .. math:: o = \sum_i z_i p_i, \qquad p = \mathrm{softmax}(z / T)

    Between the mean (T large) and the maximum (T small), and holomorphic.

    Args:
        x (Tensor): (N, C, H, W) or (C, H, W), real or complex, at least 2x2 pixels; an odd last row or column is left
            out.
        temperature (float): T.
        impl (str): ``"auto"`` or a backend; every one computes it in torch.

    Returns:
        Tensor: (..., H // 2, W // 2), x's dtype. Differentiable any number of times, in both modes, under torch.func
        too; the derivative of a window's value is :math:`p_i (1 + (z_i - o) / T)`.

    Raises: ValueError, TypeError naming the argument.

    Source: Laborieux & Zenke (ICLR 2024), appendix; the pool of their convolutional nets.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.softmax_pool2d(torch.tensor([[[0.0, 0.0], [0.0, 4.0]]]), temperature=0.1)
        tensor([[[4.]]])
    """
    checks.floating("x", x, (*checks.FLOATING, torch.complex64, torch.complex128))
    if x.dim() not in (3, 4) or min(x.shape[-2:]) < 2:
        expected = "(N, C, H, W) or (C, H, W) of at least 2x2 pixels"
        raise ValueError(f"x must be {expected}, got shape {checks.shape_of(x)}")
    temperature = checks.positive("temperature", temperature)
    checks.impl(impl)
    values = x if x.is_complex() else wide(x)
    return pooled(values, temperature)[0].to(x.dtype)
