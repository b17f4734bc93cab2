"""Local forward gradients: check the arguments, then call the family's autograd entry."""

from torch import Tensor

from ..core import checks
from ..ops.forward_gradient import autograd as _entry
from ..ops.forward_gradient.layers import refuse_duals
from .dual_layers import activity_perturbation_grad, dual_group_linear, dual_linear, dual_norm_noise_relu, tangents
from .forward_gradient_estimator import forward_gradient

__all__ = [
    "activity_perturbation_grad",
    "dual_group_linear",
    "dual_linear",
    "dual_norm_noise_relu",
    "forward_gradient",
    "replicated_cross_entropy",
    "replicated_cross_entropy_dual",
    "replicated_nt_xent",
    "replicated_nt_xent_dual",
]


def _features(**inputs: Tensor) -> None:
    for name, x in inputs.items():
        checks.floating(name, x)
        checks.dims(name, x, (4,), "(N, P, G, C)")
        checks.not_empty(name, x)


def _head(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.floating("weight", weight)
    width = x.shape[2] * x.shape[3]
    if weight.dim() != 2 or weight.shape[0] != width or not weight.shape[1]:
        raise ValueError(
            f"weight must be ({width}, K), of the G * C = {width} channels of x and at least one column, got shape "
            f"{checks.shape_of(weight)}"
        )
    checks.precision("weight", weight, "x", x)
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, weight.shape[1:], "one for each column of weight")
        checks.precision("bias", bias, "x", x)
    checks.same_device(x=x, weight=weight, bias=bias)


# -- losses -----------------------------------------------------------------------------------------------------------


def replicated_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, layer_norm: bool = False, impl: str = "auto"
) -> Tensor:
    r"""One cross entropy for each patch and group, all of the same value: average pool, linear layer, cross entropy.

    .. math:: L_{npg} = \mathrm{CE}(W^T \bar x_n + b,\; y_n), \qquad \bar x_n = \frac1P \sum_p x_{np}

    The loss of patch p and group g passes a gradient to the channels :math:`x_{npg}` alone, and to the whole head:
    with :math:`s_n = (\mathrm{softmax} - \mathrm{onehot}) W^T`, its derivative along :math:`\dot x` is
    :math:`\dot L_{npg} = \frac1P \langle \dot x_{npg}, s_{ng} \rangle` (and the head's part). So one forward pass with
    tangents gives P G separate numbers. The sum of all gradients of x is that of the ordinary loss; that of the head
    is P G times the ordinary one.

    Args:
        x (Tensor): (N, P, G, C): samples, patches, groups, channels of a group.
        weight (Tensor): (G * C, K), of K classes. bias (Tensor, optional): (K,). Both float64 if and only if x is.
        target (Tensor): (N,) class indices, any integer dtype.
        layer_norm (bool): pool LN(x), a layer norm of each group without scale and shift, eps 1e-5.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: (N, P, G), not divided by N; float32 (float64 for float64). Differentiable by ``backward`` for any
        incoming gradient, by ``torch.func.jvp``, dual levels, and ``torch.func.vmap`` over several tangents; once.
        :func:`replicated_cross_entropy_dual` takes the tangents as arguments, and compiles.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for a second derivative, and when compiled
        inside of a dual level.

    Source: Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses" (ICLR 2023), section 4 and
    algorithm 1. The VJP is exact, where the authors' code takes the incoming gradient to be constant.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x = torch.ones(2, 3, 2, 4)
        >>> loss = LF.replicated_cross_entropy(x, torch.zeros(8, 5), None, torch.tensor([0, 4]))
        >>> tuple(loss.shape), f"{loss[0, 0, 0].item():.4f}"
        ((2, 3, 2), '1.6094')
    """
    _cross_entropy_arguments(x, weight, bias, target, layer_norm, impl)
    return _entry.cross_entropy(x, weight, bias, target, layer_norm, impl)


def _cross_entropy_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, layer_norm: bool, impl: str
) -> None:
    _features(x=x)
    _head(x, weight, bias)
    checks.class_targets("target", target, x, "x")
    checks.boolean("layer_norm", layer_norm)
    checks.impl(impl)
    checks.same_device(x=x, target=target)


def replicated_cross_entropy_dual(
    x: Tensor,
    tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    weight_tangent: Tensor | None = None,
    bias_tangent: Tensor | None = None,
    layer_norm: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r""":func:`replicated_cross_entropy` and its derivatives along given tangents, for ``torch.compile`` too.

    .. math:: \dot L_{npg} = \frac1P \langle \dot x_{npg}, s_{ng} \rangle
        + \langle \mathrm{softmax} - \mathrm{onehot},\; \dot W^T \bar x_n + \dot b \rangle

    Args:
        x, weight, bias, target, layer_norm, impl: as :func:`replicated_cross_entropy`.
        tangent (Tensor, optional): of x, shaped like it; None: zero.
        weight_tangent, bias_tangent (Tensor, optional): shaped like weight and bias; None: zero.

    Returns:
        (Tensor, Tensor): the loss (N,), the same for all patches and groups, and the derivatives (N, P, G); neither
        divided by N. No graph is recorded.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for dual tensors.

    Source: Ren et al. (ICLR 2023), algorithm 1.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, tangent = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> loss, dloss = LF.replicated_cross_entropy_dual(x, tangent, torch.eye(2), None, torch.tensor([0]))
        >>> dloss
        tensor([[[-0.2500],
                 [ 0.2500]]])
    """
    _cross_entropy_arguments(x, weight, bias, target, layer_norm, impl)
    tangents(tangent=(tangent, x), weight_tangent=(weight_tangent, weight), bias_tangent=(bias_tangent, bias))
    tensors = x, tangent, weight, bias, weight_tangent, bias_tangent
    refuse_duals("replicated_cross_entropy_dual", *tensors)
    return _entry.cross_entropy_dual(x, tangent, weight, bias, target, weight_tangent, bias_tangent, layer_norm, impl)[
        :2
    ]


def _nt_xent_arguments(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, impl: str
) -> float:
    _features(x=x, y=y)
    checks.shape("y", y, x.shape, "that of the other view x")
    if y.dtype != x.dtype:
        raise TypeError(f"y must be {checks.dtype_of(x)} like the other view x, got {checks.dtype_of(y)}")
    _head(x, weight, bias)
    temperature = checks.positive("temperature", temperature)
    checks.impl(impl)
    checks.same_device(x=x, y=y)
    return temperature


def replicated_nt_xent(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float = 0.5, impl: str = "auto"
) -> Tensor:
    r"""One contrastive loss for each sample, patch and group of two views; no gradient through the keys.

    With :math:`q = h / |h|`, :math:`h = W^T \bar x + b` for x and for y, and keys :math:`k = q` without gradient,

    .. math:: L_{n} = -\log \frac{\exp(q^x_n \cdot k^y_n / \tau)}
        {\sum_m \exp(q^x_n \cdot k^y_m / \tau) + \sum_{m \ne n} \exp(q^x_n \cdot k^x_m / \tau)}

    and the same with x and y changed for rows N, ..., 2N - 1. Every patch and group has the value of its row, and
    passes a gradient to its own channels alone, as in :func:`replicated_cross_entropy`.

    Args:
        x, y (Tensor): (N, P, G, C), two views of the same N samples.
        weight (Tensor): (G * C, D), the projector. bias (Tensor, optional): (D,).
        temperature (float): tau.
        impl (str): ``"auto"`` or a backend.

    Returns:
        Tensor: (2N, P, G): rows below N have x as query, the others y; not divided by the rows. Differentiable as
        :func:`replicated_cross_entropy`.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for a second derivative, and when compiled
        inside of a dual level.

    Source: Ren et al. (ICLR 2023), section 4 and algorithm 2; NT-Xent of Chen et al. (SimCLR, 2020) but for the keys.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x = torch.eye(2).view(2, 1, 1, 2)
        >>> loss = LF.replicated_nt_xent(x, x, torch.eye(2), None)
        >>> tuple(loss.shape), f"{loss[0].item():.4f}"
        ((4, 1, 1), '0.2395')
    """
    temperature = _nt_xent_arguments(x, y, weight, bias, temperature, impl)
    return _entry.nt_xent(x, y, weight, bias, temperature, impl)


def replicated_nt_xent_dual(
    x: Tensor,
    y: Tensor,
    x_tangent: Tensor | None,
    y_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float = 0.5,
    weight_tangent: Tensor | None = None,
    bias_tangent: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`replicated_nt_xent` and its derivatives along given tangents, for ``torch.compile`` too.

    Args:
        x, y, weight, bias, temperature, impl: as :func:`replicated_nt_xent`.
        x_tangent, y_tangent (Tensor, optional): shaped like the views; None: zero.
        weight_tangent, bias_tangent (Tensor, optional): shaped like weight and bias; None: zero.

    Returns:
        (Tensor, Tensor): the losses (2N,) and the derivatives (2N, P, G). No graph is recorded.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for dual tensors.

    Source: Ren et al. (ICLR 2023), algorithm 2.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x = torch.eye(2).view(2, 1, 1, 2)
        >>> loss, dloss = LF.replicated_nt_xent_dual(x, x, None, None, torch.eye(2), None)
        >>> dloss.abs().max().item()
        0.0
    """
    temperature = _nt_xent_arguments(x, y, weight, bias, temperature, impl)
    tangents(
        x_tangent=(x_tangent, x),
        y_tangent=(y_tangent, y),
        weight_tangent=(weight_tangent, weight),
        bias_tangent=(bias_tangent, bias),
    )
    tensors = x, y, x_tangent, y_tangent, weight, bias, weight_tangent, bias_tangent
    refuse_duals("replicated_nt_xent_dual", *tensors)
    return _entry.nt_xent_dual(
        x, y, x_tangent, y_tangent, weight, bias, weight_tangent, bias_tangent, temperature, impl
    )[:2]
