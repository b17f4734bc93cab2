"""Equilibrium propagation without weight symmetry: check the arguments, then call the family's entry."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import checks
from ..core.ops import wide
from ..ops.equilibrium import autograd as _entry
from ..ops.equilibrium.gradients import gradients as _gradients
from ..ops.equilibrium.options import SCHEDULES, Settling, one_phase
from .equilibrium_arguments import (
    Checked,
    activation_and_loss,
    complex_number,
    holomorphic,
    layers,
    net_and_input,
    refuse_compiled,
    targets,
)
from .equilibrium_errors import bptt_gradients, continuous_ep_error, recurrent_backprop_error
from .equilibrium_homeostasis import homeostatic_loss, jacobian_symmetry, softmax_pool2d, weight_angle

__all__ = [
    "bptt_gradients",
    "continuous_ep_error",
    "ep_gradients",
    "ep_residual",
    "ep_settle",
    "ep_settle_report",
    "holomorphic_ep_error",
    "homeostatic_loss",
    "jacobian_symmetry",
    "recurrent_backprop_error",
    "softmax_pool2d",
    "weight_angle",
]

Activation = Literal["sigmoid", "dsilu", "hard_sigmoid", "clipped_relu"]
Loss = Literal["cross_entropy", "mse"]
Schedule = Literal["synchronous", "asynchronous"]


def ep_settle(
    weights: Mapping[str, Tensor],
    x: Tensor,
    state: Mapping[str, Tensor] | None = None,
    *,
    steps: int,
    beta: complex | float = 0.0,
    target: Tensor | None = None,
    activation: Activation = "sigmoid",
    loss: Loss = "cross_entropy",
    schedule: Schedule = "synchronous",
    tolerance: float | None = None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    r"""The states of a recurrent layered net after some steps, from zero or from `state`.

    .. math:: u_b \leftarrow \sum_{a \to b} \phi(u_a) W_{ab} + b_b \;[\, + \beta\, \partial L / \partial r_{out}
        \text{ on the last layer}\,], \qquad r = \phi(u)

    All layers at once by the same old activities (``schedule="synchronous"``, as published), or the layers 0, 2, ...
    and then 1, 3, ... by the new ones (``"asynchronous"``), which reaches the same fixed points in fewer steps. The
    input's part is computed once.

    Args:
        weights (dict): ``"a-b/kernel"``, ``"a-b/bias"`` of the edge from layer a to b, from ``in`` to ``out``, and
            ``"readout/Dense_0/kernel"``, ``".../bias"``. Layers and their order follow from the edges. Dense kernels
            are (in, out). Convolutions (O, I, 3, 3), padding 1 (to ``out``: 0), each with a 2x2 softmax pool; a
            feedback convolution ``high-low`` has the shape of ``low-high``, no bias, and acts through its
            vector-Jacobian product.
        x (Tensor): (B, n), or (B, C, H, W).
        state (dict, optional): layer -> u before the activation, (B, n) or (B, C, H, W); complex too, for complex beta.
        steps (int): at most this many.
        beta (float or complex): the nudge; of type complex, states are complex.
        target (Tensor, optional): class indices (B,) of any integer dtype, or numbers (B, C). Needed for beta != 0.
        activation (str): ``"sigmoid"`` 1/(1+exp(2-4u)), ``"dsilu"``; ``"hard_sigmoid"`` clip(u/2, 0, 1),
            ``"clipped_relu"`` clip(u, 0, 1), both for real beta alone.
        loss (str): ``"cross_entropy"`` of the readout (of the last layer's r where there is none), not divided by B;
            ``"mse"``: half the squared error of the last layer's r, whatever the readout.
        schedule (str): see above.
        tolerance (float, optional): stop when every sample moves by less in a step, or in two steps (an orbit).
        impl (str): ``"auto"`` or a backend.

    Returns:
        dict: layer -> u, float32 (float64 for float64), complex for complex beta. No graph is recorded.

    Raises: ValueError, TypeError naming the argument; NotImplementedError inside of torch.func transforms.

    Source: Laborieux & Zenke, "Improving equilibrium propagation without weight symmetry through Jacobian homeostasis"
    (ICLR 2024), section 2, and their code, where beta dL/dr is added with this sign.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights = {"in-h/kernel": torch.eye(2), "h-out/kernel": torch.ones(2, 1), "out-h/kernel": torch.zeros(1, 2)}
        >>> state = LF.ep_settle(weights, torch.tensor([[0.5, 0.5]]), steps=10)
        >>> state["h"], state["out"]
        (tensor([[0.5000, 0.5000]]), tensor([[1.]]))
    """
    words = activation, loss, schedule
    return _settle("ep_settle", weights, x, state, target, steps, beta, words, tolerance, impl)[0]


def ep_settle_report(
    weights: Mapping[str, Tensor],
    x: Tensor,
    state: Mapping[str, Tensor] | None = None,
    *,
    steps: int,
    beta: complex | float = 0.0,
    target: Tensor | None = None,
    activation: Activation = "sigmoid",
    loss: Loss = "cross_entropy",
    schedule: Schedule = "synchronous",
    tolerance: float | None = None,
    impl: str = "auto",
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """:func:`ep_settle`, and how each sample settled.

    Args: as :func:`ep_settle`.

    Returns:
        (dict, Tensor, Tensor, Tensor): the states; steps (B,) until the sample had settled (all that were made, where
        it did not, or without tolerance); residual (B,), the norm of the last step over all layers; orbit (B,), that
        of the last two together: near 0 on a period-two orbit too, where the residual is not.

    Raises: as :func:`ep_settle`.

    Source: Laborieux & Zenke (ICLR 2024); replications found period-two orbits in 3-5 % of trained test samples.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights = {"in-out/kernel": torch.eye(2)}
        >>> _, steps, residual, orbit = LF.ep_settle_report(weights, torch.ones(1, 2), steps=10, tolerance=1e-3)
        >>> steps, residual
        (tensor([2]), tensor([0.]))
    """
    refuse_compiled("ep_settle_report")
    words = activation, loss, schedule
    return _settle("ep_settle_report", weights, x, state, target, steps, beta, words, tolerance, impl)


def _settle(
    name: str,
    weights: Any,
    x: Any,
    state: Any,
    target: Any,
    steps: Any,
    beta: Any,
    words: tuple[Any, Any, Any],
    tolerance: Any,
    impl: Any,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    activation, loss, schedule = words
    net = net_and_input(name, weights, x)
    activation_and_loss(activation, loss)
    checks.choice("schedule", schedule, SCHEDULES)
    steps = checks.integer_between("steps", steps, 0, 2**31)
    beta = complex_number("beta", beta)
    tolerance = None if tolerance is None else checks.positive("tolerance", tolerance)
    checks.impl(impl)
    imaginary = isinstance(beta, complex)
    if imaginary:
        holomorphic("beta is complex", activation)
    start = _start(state, net, x, imaginary)
    goal = None if target is None else targets(target, net, x, loss)
    if goal is None and beta != 0:
        raise ValueError(f"target must be given where beta is not 0, got None with beta={beta}")
    options = Settling(activation, loss, schedule, steps, tolerance)
    u, *report = _entry.settle(weights, net.found, x, start, goal, one_phase(beta), options, impl)
    if imaginary:
        u = [torch.complex(*v.view(2, len(x), *v.shape[1:]).unbind()) for v in u]
    return (dict(zip(net.found.names, u)), *(part[0] for part in report))


def _start(state: Any, net: Checked, x: Tensor, imaginary: bool) -> list[Tensor]:
    """Rows of one phase: Re, then Im where it is complex."""
    if state is None:
        return [wide(x.detach()).new_zeros(((1 + imaginary) * len(x), *shape)) for shape in net.shapes]
    given = [v.detach() for v in layers("state", state, net, x, imaginary=imaginary)]
    if not imaginary:
        return [wide(v) for v in given]
    return [torch.cat((v.real, v.imag) if v.is_complex() else (wide(v), torch.zeros_like(wide(v)))) for v in given]


def ep_residual(
    weights: Mapping[str, Tensor],
    x: Tensor,
    state: Mapping[str, Tensor],
    *,
    activation: Activation = "sigmoid",
    impl: str = "auto",
) -> Tensor:
    r"""How far states are from a fixed point of the free dynamics: :math:`\|F(u)\|_2`, F(u) = H(phi(u)) - u.

    Args: weights, x, state, activation, impl: as :func:`ep_settle`; every backend computes it in torch.

    Returns:
        Tensor: (B,), the norm over all layers, float32 (float64 for float64). No graph is recorded.

    Raises: as :func:`ep_settle`.

    Source: Laborieux & Zenke (ICLR 2024): log10(residual + 1e-8) below -5.5 is their "converged".

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights = {"in-out/kernel": torch.eye(2)}
        >>> LF.ep_residual(weights, torch.ones(1, 2), {"out": torch.tensor([[1.0, 0.0]])})
        tensor([1.])
    """
    net = net_and_input("ep_residual", weights, x)
    activation_and_loss(activation)
    checks.impl(impl)
    return _entry.residual(weights, net.found, x, layers("state", state, net, x), activation)


def holomorphic_ep_error(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    state: Mapping[str, Tensor],
    *,
    beta: float,
    points: int,
    steps: int,
    activation: Activation = "sigmoid",
    loss: Loss = "cross_entropy",
    impl: str = "auto",
) -> dict[str, Tensor]:
    r"""How the equilibrium's activities answer to the nudge, from N points on a circle of nudges.

    .. math:: e = \frac{dr^*}{d\beta} \approx \frac1N \sum_{k=0}^{N-1} \frac{\phi(u_{\beta_k})}{\beta_k},
        \qquad \beta_k = \beta\, e^{2 \pi i k / N}

    each of `steps` synchronous steps from the free state; wrong by terms of order beta^N. By conjugate symmetry N/2
    of them are computed, all at once. N = 1: against the free state. N = 0: the derivative itself, by a tangent that
    goes along `steps` steps.

    Args:
        weights, x, target, activation, loss, impl: as :func:`ep_settle`.
        state (dict): the free state, layer -> u.
        beta (float): the circle's radius, greater than 0.
        points (int): N, 0 to 1024. More than 2 need a holomorphic activation.
        steps (int): steps of every phase.

    Returns:
        dict: layer -> e, in the activities' coordinates, shaped as the state. No graph is recorded.

    Raises: as :func:`ep_settle`.

    Source: Laborieux & Zenke (ICLR 2024), section 3; Laborieux & Zenke, "Holomorphic equilibrium propagation computes
    exact gradients through finite size oscillations" (NeurIPS 2022).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights, x = {"in-out/kernel": torch.eye(2)}, torch.tensor([[0.5, 0.5]])
        >>> state = LF.ep_settle(weights, x, steps=5)
        >>> e = LF.holomorphic_ep_error(weights, x, torch.tensor([0]), state, beta=0.1, points=4, steps=5)
        >>> e["out"]  # (softmax - one-hot) phi' = (-0.5, 0.5) 1, but for terms of order beta^4
        tensor([[-0.5000,  0.5000]])
    """
    return error_report(
        weights, x, target, state, beta=beta, points=points, steps=steps, activation=activation, loss=loss, impl=impl
    )[0]


def error_report(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    state: Mapping[str, Tensor],
    *,
    beta: float,
    points: int,
    steps: int,
    activation: Activation,
    loss: Loss,
    impl: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """:func:`holomorphic_ep_error`, and the norm of the last step of each phase that ran, (P, B): +beta, -beta where N
    is even, then the complex ones of the upper half; of N = 0 the free phase that goes along."""
    net = net_and_input("holomorphic_ep_error", weights, x)
    activation_and_loss(activation, loss)
    free = layers("state", state, net, x)
    goal = targets(target, net, x, loss)
    beta = checks.positive("beta", beta)
    points = checks.integer_between("points", points, 0, 1025)
    steps = checks.integer_between("steps", steps, 0, 2**31)
    checks.impl(impl)
    if points > 2:
        holomorphic(f"points={points}", activation)
    options = Settling(activation, loss, "synchronous", steps, None)
    e, residual = _entry.error(weights, net.found, x, free, goal, beta, points, options, impl)
    return dict(zip(net.found.names, e)), residual


def ep_gradients(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    state: Mapping[str, Tensor],
    error: Mapping[str, Tensor],
    *,
    activation: Activation = "sigmoid",
    loss: Loss = "cross_entropy",
    impl: str = "auto",
) -> dict[str, Tensor]:
    r"""Gradients of all weights from an error e of the activities, in closed form.

    .. math:: g_\theta = \frac1B \sum_b (\partial F / \partial \theta)^T e_b

    at the free state; for a dense edge :math:`r_a^T e_b / B`, and :math:`\sum e_b / B` for its bias. So edges in
    opposite directions learn differently. Weights descend along it: theta - lr * g.

    Args:
        weights, x, target, activation, loss, impl: as :func:`ep_settle`; every backend computes them in torch.
        state (dict): the free state, layer -> u.
        error (dict): layer -> e, shaped as the state; of :func:`holomorphic_ep_error`, or the delta of
            :func:`recurrent_backprop_error`.

    Returns:
        dict: as `weights`, means over the batch, in the weights' dtypes; of the readout the gradient of the mean cross
        entropy (0 for ``loss="mse"``, which does without it). No graph is recorded.

    Raises: as :func:`ep_settle`.

    Source: Laborieux & Zenke (ICLR 2024), equation 5.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights, x = {"in-out/kernel": torch.eye(2)}, torch.tensor([[0.5, 0.25]])
        >>> state, e = LF.ep_settle(weights, x, steps=5), {"out": torch.tensor([[-1.0, 1.0]])}
        >>> LF.ep_gradients(weights, x, torch.tensor([0]), state, e)["in-out/kernel"]
        tensor([[-0.5000,  0.5000],
                [-0.2500,  0.2500]])
    """
    net = net_and_input("ep_gradients", weights, x)
    activation_and_loss(activation, loss)
    checks.impl(impl)
    free, e = layers("state", state, net, x), layers("error", error, net, x)
    return _gradients(weights, net.found, x, targets(target, net, x, loss), free, e, activation, loss)
