"""Zeroth-order optimisation: layers at perturbed weights, and the step along noise by formula."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..core import checks
from ..core.autograd import refuse_transforms
from ..core.ops import require_no_overlap, wide_dtype
from ..ops.zeroth_order import op as _op  # noqa: F401  registers the ops
from ..random import RandomFeedback

__all__ = ["formula_update_", "perturbed_linear"]

_ops = torch.ops.lgkernels
_FORMULAS = "a lgkernels.random.RandomFeedback, or a sequence of them, one for each member"


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    noise: Tensor | RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    impl: str = "auto",
) -> Tensor:
    r"""Linear layer whose weight is perturbed, for each member of a batch by its own multiple of the noise.

    .. math:: y_m = x_m (W + c_m Z_m)^T + b

    W is read once for all members and never written. Noise by formula is made where it is used, and never stored: with
    coefficients :math:`\pm\epsilon` and one noise this is both sides of a two-sided estimate at once.

    Args:
        x (Tensor): (M, ..., in), M members. weight (Tensor): (out, in). bias (Tensor, optional): (out,). float32,
            bfloat16, float16, and float64 in the reference; of one dtype outside of autocast.
        noise: Z, a tensor (out, in); or a :class:`lgkernels.random.RandomFeedback`; or a list of M of these, of one law
            and scale, one for each member.
        coefficients (float, or M of them in a sequence or a tensor): c.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``.

    Returns:
        Tensor: (M, ..., out) in x's dtype, or autocast's. A perturbation that a half weight could not hold still
        counts: kernels compute in float32, ``"torch"`` adds two products in x's dtype. There is no gradient.

    Raises: ValueError, TypeError naming the argument. NotImplementedError inside of torch.func transforms.

    Source: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
    1992; Malladi et al., "Fine-tuning language models with just forward passes", NeurIPS 2023 (noise from a seed).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight, noise = torch.ones(2, 1, 3), torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])
        >>> LF.perturbed_linear(x, weight, noise=noise, coefficients=[0.5, -0.5]).flatten()
        tensor([ 3., -3.])
    """
    refuse_transforms("perturbed_linear")
    checks.linear(x, weight, bias)
    if x.dim() < 2:
        raise ValueError(f"x must be (M, ..., {weight.shape[1]}), members first, got shape {checks.shape_of(x)}")
    values, formulas = _noise(noise, weight, len(x))
    checks.impl(impl)
    if checks.autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    factors = _coefficients(coefficients, len(x), x)
    rows = x.shape[1:-1].numel()
    with torch.no_grad():
        y = _ops.perturbed_linear(x.reshape(len(x), rows, x.shape[-1]), weight, bias, factors, values, *formulas, impl)
    return y.view(*x.shape[:-1], len(weight))


def formula_update_(
    weight: Tensor,
    noise: RandomFeedback | Sequence[RandomFeedback],
    coefficients: float | Sequence[float] | Tensor,
    *,
    weight_decay: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    r"""A step along noise by formula, in place and in one pass: no noise is ever stored.

    .. math:: W \leftarrow (1 - \lambda)\, W + \sum_i c_i Z_i

    Args:
        weight (Tensor): W of any shape: the noise is a matrix (first size, the others). float32, bfloat16, float16,
            and float64 in the reference. A half weight is rounded once, to the nearest: steps below half a unit in its
            last place are lost.
        noise: a :class:`lgkernels.random.RandomFeedback`, or a sequence of them, of one law and scale.
        coefficients (float, or one for each noise in a sequence or a tensor): c, the learning rate in it.
        weight_decay (float): :math:`\lambda` in [0, 1], the learning rate in it.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``.

    Returns:
        Tensor: weight itself. With the laws sign, uniform8 and uniform every backend gives the same bits: what was done
        can be done again elsewhere.

    Raises: ValueError, TypeError naming the argument. NotImplementedError inside of torch.func transforms.

    Source: as :func:`perturbed_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> from lgkernels.random import RandomFeedback
        >>> noise = RandomFeedback(seed=0, law="sign")
        >>> LF.formula_update_(torch.zeros(2, 3), noise, 0.5).equal(0.5 * noise.materialize((2, 3)))
        True
    """
    refuse_transforms("formula_update_")
    checks.floating("weight", weight)
    require_no_overlap("weight", weight)
    if isinstance(noise, Tensor):
        raise TypeError(f"noise must be {_FORMULAS}, got {type(noise).__name__}: add a tensor with weight.add_")
    _, formulas = _noise(noise, weight, None)
    decay = checks.between("weight_decay", weight_decay, 0.0, 1.0)
    checks.impl(impl)
    factors = _coefficients(coefficients, len(formulas[0]), weight)
    shape = (weight.shape[0], weight.shape[1:].numel()) if weight.dim() else (1, 1)
    with torch.no_grad():
        own = weight.detach()
        as_it_lies = own.dim() == 2 or own.is_contiguous()
        matrix = own if own.dim() == 2 else own.reshape(shape)
        _ops.formula_update_(matrix, factors, None, *formulas, 1.0 - decay, impl)
        if not as_it_lies:  # channels_last, say: no view of it is a matrix
            own.copy_(matrix.view(own.shape))
    return weight


def _noise(noise: Any, weight: Tensor, members: int | None) -> tuple[Tensor | None, tuple]:
    """`(values, (states, law, scale, low))` as the ops take them; `members`: how many a sequence may have."""
    if isinstance(noise, Tensor):
        checks.floating("noise", noise)
        checks.shape("noise", noise, weight.shape, "that of weight")
        checks.precision("noise", noise, "weight", weight)
        checks.same_device(weight=weight, noise=noise)
        return noise.detach(), (None, "normal", 1.0, None)
    several = list(noise) if isinstance(noise, (list, tuple)) else [noise]
    if not several or not all(isinstance(one, RandomFeedback) for one in several):
        expected = _FORMULAS if members is None else f"a tensor like weight, {_FORMULAS}"
        raise TypeError(f"noise must be {expected}, got {checks.got(noise)}")
    if members is not None and isinstance(noise, (list, tuple)) and len(several) != members:
        raise ValueError(f"noise must be one RandomFeedback for each of the {members} members, got {len(several)}")
    kinds = [(one.law, one.scale, one.low) for one in several]
    for kind in kinds:
        if kind != kinds[0]:
            raise ValueError(f"noise must have one law, scale and low, got {kinds[0]} and {kind}")
    states = [one.verified() for one in several]
    for state in states:
        checks.same_device(weight=weight, noise=state)
    return None, (torch.stack(states), *kinds[0])


def _coefficients(value: Any, members: int, like: Tensor) -> Tensor:
    """(M,) in the dtype that is computed in."""
    dtype = wide_dtype(like.dtype)
    if isinstance(value, Tensor) and not is_lazy(value) and value.dim() == 1 and len(value) == members:
        checks.floating("coefficients", value)
        checks.same_device(weight=like, coefficients=value)
        return value.detach().to(dtype)
    expected = f"a number, or {members} of them"
    if isinstance(value, (list, tuple)):
        if len(value) != members:
            raise ValueError(f"coefficients must be {expected}, got {checks.got(value)}")
        numbers = [checks.number("coefficients", one, expected) for one in value]
        return torch.tensor(numbers, dtype=dtype, device=like.device)
    return torch.full((members,), checks.number("coefficients", value, expected), dtype=dtype, device=like.device)
