"""Other ways to the error of an equilibrium, or to its gradients: in continuous time, by recurrent back-propagation, by
back-propagation through time."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..core import checks
from ..core.ops import wide
from ..ops.equilibrium import autograd as _entry
from ..ops.equilibrium.activations import activity
from ..ops.equilibrium.options import SCHEDULES, Phases, Settling
from .equilibrium_arguments import activation_and_loss, holomorphic, layers, net_and_input, refuse_compiled, targets


def continuous_ep_error(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    *,
    beta: float,
    points: int,
    plateaus: int,
    steps: int,
    activation: Literal["sigmoid", "dsilu"] = "sigmoid",
    loss: Literal["cross_entropy", "mse"] = "cross_entropy",
    impl: str = "auto",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Mean state and error of a nudge that goes round and round, without a free phase.

    Plateau i nudges with :math:`\beta_i = \beta e^{2 \pi i\, i / N}` for `steps` steps; each starts where the last one
    ended, the first at zero.

    .. math:: \bar u = \mathrm{Re} \frac1q \sum_i u_i, \qquad e = \mathrm{Re} \frac1q \sum_i \phi(u_i) / \beta_i

    Args:
        weights, x, target, loss, impl: as :func:`ep_settle`. activation (str): a holomorphic one.
        beta (float): the circle's radius, greater than 0. points (int): N, plateaus of a period.
        plateaus (int): q of them. steps (int): of each.

    Returns:
        (dict, dict): layer -> the mean u, which takes the free state's place in :func:`ep_gradients`, and layer -> e.

    Raises: as :func:`ep_settle`.

    Source: Laborieux & Zenke (ICLR 2024), section 3 (continuous-time estimate), and their code.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights, x = {"in-out/kernel": torch.eye(2)}, torch.tensor([[0.5, 0.5]])
        >>> u, e = LF.continuous_ep_error(weights, x, torch.tensor([0]), beta=0.1, points=4, plateaus=8, steps=5)
        >>> e["out"]
        tensor([[-0.5000,  0.5000]])
    """
    return continuous_report(
        weights,
        x,
        target,
        beta=beta,
        points=points,
        plateaus=plateaus,
        steps=steps,
        activation=activation,
        loss=loss,
        impl=impl,
    )[:2]


def continuous_report(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    *,
    beta: float,
    points: int,
    plateaus: int,
    steps: int,
    activation: Literal["sigmoid", "dsilu"],
    loss: Literal["cross_entropy", "mse"],
    impl: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """:func:`continuous_ep_error`, and (N, B) the norm of the last step of each nudge's last plateau (of as
    many nudges as there are plateaus, where they are fewer)."""
    refuse_compiled("continuous_ep_error")
    net = net_and_input("continuous_ep_error", weights, x)
    activation_and_loss(activation, loss)
    holomorphic("the nudge is complex", activation)
    goal = targets(target, net, x, loss)
    beta = checks.positive("beta", beta)
    points = checks.positive_integer("points", points, 1025)
    plateaus = checks.positive_integer("plateaus", plateaus, 2**20)
    steps = checks.integer_between("steps", steps, 0, 2**31)
    checks.impl(impl)
    options = Settling(activation, loss, "synchronous", steps, None)
    rows = [wide(x.detach()).new_zeros((2 * len(x), *shape)) for shape in net.shapes]
    mean = [torch.zeros_like(v[: len(x)]) for v in rows]
    e = [torch.zeros_like(v) for v in mean]
    angles = torch.arange(points, dtype=torch.float64, device="cpu") * (2 * torch.pi / points)
    circle = [(beta * re, beta * im) for re, im in zip(angles.cos().tolist(), angles.sin().tolist())]
    moved: dict[int, Tensor] = {}
    for i in range(plateaus):
        re, im = circle[i % points]
        rows, _, residual, _ = _entry.settle(weights, net.found, x, rows, goal, Phases([re], [im], 0), options, impl)
        moved[i % points] = residual[0]
        for layer, v in enumerate(rows):
            u = torch.complex(v[: len(x)], v[len(x) :])
            mean[layer] = mean[layer] + u.real / plateaus
            e[layer] = e[layer] + (activity(u, activation) / complex(re, im)).real / plateaus
    return dict(zip(net.found.names, mean)), dict(zip(net.found.names, e)), torch.stack(list(moved.values()))


def recurrent_backprop_error(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    state: Mapping[str, Tensor],
    *,
    steps: int,
    method: Literal["iteration", "neumann"] = "iteration",
    activation: Literal["sigmoid", "dsilu", "hard_sigmoid", "clipped_relu"] = "sigmoid",
    loss: Literal["cross_entropy", "mse"] = "cross_entropy",
) -> dict[str, Tensor]:
    r"""The true error of an equilibrium, by recurrent back-propagation.

    .. math:: \delta \leftarrow \delta + J_u^T \delta + \partial L / \partial u, \qquad
        \delta^* = -J_u^{-T} \partial L / \partial u

    from 0, with J_u the Jacobian of F at the free state. ``method="neumann"`` adds the series' terms instead, which is
    the same sum. Where the weights are symmetric, delta is the error of equilibrium propagation.

    Args:
        weights, x, target, activation, loss: as :func:`ep_settle`.
        state (dict): the free state, layer -> u.
        steps (int): iterations, or terms. method (str): see above.

    Returns:
        dict: layer -> delta, shaped as the state, not divided by B: an `error` of :func:`ep_gradients`.

    Raises: as :func:`ep_settle`.

    Source: Almeida (1987), Pineda (1987); as in the code of Laborieux & Zenke (ICLR 2024).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights, x = {"in-out/kernel": torch.eye(2)}, torch.tensor([[0.5, 0.5]])
        >>> state = LF.ep_settle(weights, x, steps=5)
        >>> LF.recurrent_backprop_error(weights, x, torch.tensor([0]), state, steps=3)["out"]
        tensor([[-0.5000,  0.5000]])
    """
    refuse_compiled("recurrent_backprop_error")
    net = net_and_input("recurrent_backprop_error", weights, x)
    activation_and_loss(activation, loss)
    checks.choice("method", method, ("iteration", "neumann"))
    free, goal = layers("state", state, net, x), targets(target, net, x, loss)
    steps = checks.integer_between("steps", steps, 0, 2**31)
    delta, _ = _entry.recurrent(weights, net.found, x, free, goal, steps, method, activation, loss)
    return dict(zip(net.found.names, delta))


def bptt_gradients(
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    state: Mapping[str, Tensor],
    *,
    steps: int,
    activation: Literal["sigmoid", "dsilu", "hard_sigmoid", "clipped_relu"] = "sigmoid",
    loss: Literal["cross_entropy", "mse"] = "cross_entropy",
    schedule: Literal["synchronous", "asynchronous"] = "synchronous",
) -> dict[str, Tensor]:
    r"""Gradients of all weights by back-propagation through time: through `steps` more free steps from a state.

    .. math:: g_\theta = \frac1B \sum_b \frac{d L(u_T)}{d \theta}, \qquad u_{t+1} = H_\theta(\phi(u_t)),

    :math:`u_0` the free state, which counts as a constant. There it is :func:`ep_gradients` of `steps` Neumann terms of
    :func:`recurrent_backprop_error`. All steps are kept until their way back: memory grows with `steps`.

    Args:
        weights, x, target, activation, loss, schedule: as :func:`ep_settle`.
        state (dict): the free state, layer -> u.
        steps (int): T.

    Returns:
        dict: as `weights`, of the mean loss of the batch, in the weights' dtypes. No graph is recorded.

    Raises: as :func:`ep_settle`.

    Source: the "BP" of the code of Laborieux & Zenke (ICLR 2024), whose steps are synchronous; Ernoult et al. (NeurIPS
    2019).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> weights, x = {"in-out/kernel": torch.eye(2)}, torch.tensor([[0.5, 0.25]])
        >>> state = LF.ep_settle(weights, x, steps=5)
        >>> exact = LF.bptt_gradients(weights, x, torch.tensor([0]), state, steps=3)
        >>> delta = LF.recurrent_backprop_error(weights, x, torch.tensor([0]), state, steps=3)
        >>> by_errors = LF.ep_gradients(weights, x, torch.tensor([0]), state, delta)
        >>> torch.allclose(exact["in-out/kernel"], by_errors["in-out/kernel"])
        True
    """
    refuse_compiled("bptt_gradients")
    net = net_and_input("bptt_gradients", weights, x)
    activation_and_loss(activation, loss)
    checks.choice("schedule", schedule, SCHEDULES)
    free, goal = layers("state", state, net, x), targets(target, net, x, loss)
    steps = checks.integer_between("steps", steps, 0, 2**31)
    options = Settling(activation, loss, schedule, steps, None)
    return _entry.through_time(weights, net.found, x, [v.detach() for v in free], goal, options)
