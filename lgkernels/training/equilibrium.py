"""Equilibrium propagation, with and without weight symmetry: a trainer for nets that settle."""

import cmath
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks, constructors
from ..functional.equilibrium import (
    ep_gradients,
    ep_settle_report,
    error_report,
    homeostatic_loss,
    recurrent_backprop_error,
)
from ..functional.equilibrium_arguments import holomorphic
from ..functional.equilibrium_errors import continuous_report
from ..nn.equilibrium import EquilibriumConvNet, EquilibriumMLP
from ..nn.hopfield import HopfieldNet
from ..ops.equilibrium.energy import VARIANTS
from ..ops.equilibrium.options import circle
from ..random import RandomFeedback
from .hopfield import Phases, gradients_through_time
from .trainer import OptimizerFactory, SchedulerFactory, Trainer
from .unsettled import Unsettled, UnsettledError, judged, no_numbers, nudge_names, settled, text

__all__ = ["EquilibriumTrainer"]

METHODS = ("holomorphic", "continuous", "recurrent_backprop")
CHOICES = ("skip", "leave_out", "raise")


class EquilibriumTrainer(Trainer):
    r"""Trains nets that settle: a free phase, nudged phases, and gradients from how the equilibrium answers.

    =======================  =====================================================================================
    method                   error
    =======================  =====================================================================================
    ``"holomorphic"``        :func:`lgkernels.functional.holomorphic_ep_error`, of `points` nudges of size `beta`
    ``"continuous"``         :func:`lgkernels.functional.continuous_ep_error`: a nudge that goes round, `plateaus` of
                             `nudge_steps` steps; there is no free phase
    ``"recurrent_backprop"`` :func:`lgkernels.functional.recurrent_backprop_error`, `nudge_steps` iterations: the true
                             gradient of the equilibrium, which needs the transposed weights
    =======================  =====================================================================================

    A :class:`lgkernels.nn.HopfieldNet` has tied weights and an energy E, and is nudged to E + beta L, L the loss: its
    gradient is (dE/dw(beta_2) - dE/dw(beta_1)) / (beta_2 - beta_1), both phases of `nudge_steps` steps from the free
    state. `variant`: ``"positive"`` (0, beta), ``"negative"`` (-beta, 0), ``"centered"`` (-beta, beta), whose error is
    of order beta^2. Of it ``"recurrent_backprop"`` goes back through `nudge_steps` steps from the free state.

    The gradients of all weights are in ``.grad`` when the optimizers step, and that of the homeostatic loss is added,
    `homeostasis` times. Reported is a nudge (of ``"continuous"`` by its last plateau), and of ``"recurrent_backprop"``
    the free phase, that diverges or moves by more than `limit` in its last step, and a sample whose input or error is
    no number: a warning says which samples, which phase and which residual, and ``.report`` keeps it.

    Args:
        model (EquilibriumMLP, EquilibriumConvNet or HopfieldNet): the net.
        optimizer_factory (callable): parameters of one learning rate -> their optimizer.
        method (str): as above.
        points (int): N. beta (float): greater than 0. nudge_steps (int): steps of a nudge.
        plateaus (int): of ``"continuous"``.
        variant (str): of a HopfieldNet, and of nothing else; points, plateaus and homeostasis are not for it.
        homeostasis (float): coefficient of the homeostatic loss; published: 1 or 0.1 (dense), 10 or 15 (conv).
        estimator (str): of :func:`lgkernels.functional.homeostatic_loss`. probes (int): its noise, made by formula.
        rates (dict, optional): edge, as ``"in-conv1"`` or ``"readout/Dense_0"`` -> what its learning rate is multiplied
            with. Edges in both directions between two layers share that of ``"low-high"``.
        unsettled (str): what becomes of a batch with a report: ``"skip"``: it teaches nothing; ``"leave_out"``: those
            samples teach nothing, and the others as much as without a report; ``"raise"``: :class:`UnsettledError`.
        limit (float): see above.
        seed (int): of the noise.
        scheduler_factory, accumulation_steps, clip_grad_norm: as :class:`BlockwiseTrainer`.

    ``step(x, target)`` takes the input and class indices (B,); it returns the homeostatic loss, where it has a
    coefficient, and the cross entropy (squared error) of the free state.

    Raises: ValueError, TypeError naming the argument; UnsettledError.

    Source: Laborieux & Zenke, "Improving equilibrium propagation without weight symmetry through Jacobian homeostasis"
    (ICLR 2024). Energies: Scellier & Bengio (2017); Laborieux et al. (2021); Scellier et al. (NeurIPS 2023).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> from lgkernels.training import EquilibriumTrainer
        >>> _ = torch.manual_seed(0)
        >>> net = lnn.EquilibriumMLP(4, (16,), 8, num_classes=2, steps=30, angle=90)
        >>> trainer = EquilibriumTrainer(net, lambda p: torch.optim.SGD(p, 0.5), points=2, beta=0.2, homeostasis=0.1)
        >>> x, target = torch.rand(64, 4), torch.arange(64) % 2
        >>> first = trainer.step(x + target.unsqueeze(1), target)
        >>> for _ in range(20):
        ...     losses = trainer.step(x + target.unsqueeze(1), target)
        >>> losses.shape, bool(losses[-1] < first[-1])
        (torch.Size([2]), True)
    """

    def __init__(
        self,
        model: EquilibriumMLP | EquilibriumConvNet | HopfieldNet,
        optimizer_factory: OptimizerFactory,
        *,
        method: Literal["holomorphic", "continuous", "recurrent_backprop"] = "holomorphic",
        points: int = 2,
        beta: float = 0.5,
        nudge_steps: int = 20,
        plateaus: int = 20,
        variant: Literal["positive", "negative", "centered"] = "centered",
        homeostasis: float = 0.0,
        estimator: Literal["paper", "symmetric", "exact"] = "paper",
        probes: int = 5,
        rates: Mapping[str, float] | None = None,
        unsettled: Literal["skip", "leave_out", "raise"] = "skip",
        limit: float = 1.0,
        seed: int = 0,
        scheduler_factory: SchedulerFactory | None = None,
        accumulation_steps: int = 1,
        clip_grad_norm: float | None = None,
    ) -> None:
        kinds = EquilibriumMLP, EquilibriumConvNet, HopfieldNet
        constructors.instance("model", model, kinds, "a lgkernels.nn.EquilibriumMLP, EquilibriumConvNet or HopfieldNet")
        checks.choice("method", method, METHODS)
        checks.choice("variant", variant, VARIANTS)
        self.variant = variant
        points = checks.integer_between("points", points, 0, 1025)
        if method == "continuous" and points < 1:
            raise ValueError(f"points must be at least 1 for method='continuous', got {points}")
        self.method, self.points, self.beta = method, points, checks.positive("beta", beta)
        self.nudge_steps = checks.integer_between("nudge_steps", nudge_steps, 0, 2**31)
        self.plateaus = checks.positive_integer("plateaus", plateaus, 2**20)
        constructors.not_negative("homeostasis", homeostasis)
        self.homeostasis = float(checks.item(homeostasis))
        if isinstance(model, HopfieldNet):
            if method == "continuous":
                raise ValueError(
                    f"method must be 'holomorphic' or 'recurrent_backprop' for a HopfieldNet, got {method!r}"
                )
            if self.homeostasis:
                raise ValueError(f"homeostasis must be 0 for a HopfieldNet, whose weights are tied, got {homeostasis}")
            for name, value, usual in (("points", points, 2), ("plateaus", self.plateaus, 20)):
                if value != usual:
                    raise ValueError(f"{name} must be left at {usual} for a HopfieldNet, which has none, got {value}")
        else:
            if variant != "centered":
                raise ValueError(f"variant must be left at 'centered' but for a HopfieldNet, got {variant!r}")
            if method == "continuous" or method == "holomorphic" and points > 2:
                holomorphic(f"method={method!r} and points={points}", model.activation)
        _refuse_tied(model)
        checks.choice("estimator", estimator, ("paper", "symmetric", "exact"))
        self.estimator, self.probes = estimator, checks.positive_integer("probes", probes, 2**20)
        checks.choice("unsettled", unsettled, CHOICES)
        self.unsettled, self.limit = unsettled, checks.positive("limit", limit)
        seed = checks.integer_between("seed", seed, -(2**63), 2**64)
        factors = _factors(model, rates)
        self.model = model
        distinct = dict.fromkeys(factor for _, factor in factors)
        groups = [[p for p, factor in factors if factor == one and p.requires_grad] for one in distinct]

        def scaled(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = optimizer_factory(parameters)
            factor = next(f for p, f in factors if p is parameters[0])
            for group in getattr(optimizer, "param_groups", ()):
                group["lr"] = group["lr"] * factor
            return optimizer

        constructors.function("optimizer_factory", optimizer_factory)
        super().__init__(
            [model],
            scaled,
            groups,
            scheduler_factory=scheduler_factory,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            grad_scaler=None,
        )
        device = next(model.parameters()).device
        self.noise = RandomFeedback(seed, 0, "normal").to(device)
        self.report: list[Unsettled] = []  # of the last batch
        self.reported = 0  # batches with a report so far
        self.residual: Tensor | None = None  # (B,), of the last batch's free phase
        self._warned = False

    def _model(self) -> nn.ModuleList:
        """What a checkpoint's random states are taken from."""
        return nn.ModuleList([self.model, self.noise])

    # -- a step --------------------------------------------------------------------------------------------------------

    def _step(self, x: Tensor, target: Tensor, last: bool) -> Tensor:
        losses, gradients, report = self._pass(x, target)
        self.report = report
        if report:
            self.reported += 1
            if self.unsettled == "raise":
                raise UnsettledError(report)
            if not self._warned:
                self._warned = True
                what = "the batch teaches nothing" if self.unsettled == "skip" else "they teach nothing"
                warnings.warn(f"{text(report)}; {what}. Said once; see .report and .reported", stacklevel=3)
        if not report or self.unsettled == "leave_out" and settled(report, len(x)):
            for key, gradient in gradients.items():
                parameter = self.model.weights[key]
                if parameter.requires_grad:
                    gradient = gradient / self.accumulation_steps
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if last:
            for optimizer, parameters in zip(self.optimizers, self.parameter_groups):
                if any(p.grad is not None for p in parameters):
                    self._update(optimizer, parameters)
        self.noise.advance()
        return losses

    def gradients(self, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Unsettled]]:
        """`(losses, gradients by key of the weights, report)` of a batch: what a step would hand to the optimizers."""
        result = self._pass(x, target)
        self.noise.advance()
        return result

    def _pass(self, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Unsettled]]:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step takes gradients, which torch.inference_mode() has not: call it outside")
        model = self.model
        made = self._energy_pass(model, x, target) if isinstance(model, HopfieldNet) else self._error_pass(x, target)
        losses, gradients, report = made
        if report and self.unsettled == "leave_out" and not settled(report, len(x)):
            gradients = {key: torch.zeros_like(g) for key, g in gradients.items()}
        return losses, gradients, report

    def _error_pass(self, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Unsettled]]:
        model = self.model
        assert not isinstance(model, HopfieldNet)
        state, e, report = self.error(x, target)
        self.output = out = model.readout(state).detach()
        weights = {k: w.detach() for k, w in model.named_weights().items()}
        words: dict[str, Any] = dict(activation=model.activation, loss=model.loss)
        x, share, own = model.input_of(x), 1.0, target
        keep = self._kept(report, len(x))
        if keep is not None:
            x, own, share = x[keep], own[keep], len(keep) / len(x)
            state, e = ({layer: v[keep] for layer, v in values.items()} for values in (state, e))
        gradients = _times(share, ep_gradients(weights, x, own, state, e, **words))
        losses = [self._loss(out, target)]
        if self.homeostasis:
            losses.insert(0, self._homeostasis(weights, state, gradients))
        return torch.stack(losses), gradients, report

    def _kept(self, report: list[Unsettled], samples: int) -> list[int] | None:
        """The samples that teach, where some but not all do: of the others not even a 0 may meet their nan."""
        if self.unsettled != "leave_out" or not report:
            return None
        return settled(report, samples) or None

    def _energy_pass(
        self, model: HopfieldNet, x: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], list[Unsettled]]:
        self._check(x, target)
        if self.method == "recurrent_backprop":
            return self._through_time(model, x, target)
        phases = self._phases(model, x, target)
        self.output = model.readout(phases.free).detach()
        report = self._answers(phases)
        keep = self._kept(report, len(x))
        gradients = phases.gradients() if keep is None else _times(len(keep) / len(x), phases.of(keep).gradients())
        return self._loss(self.output, target).unsqueeze(0), gradients, report

    def _through_time(
        self, model: HopfieldNet, x: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], list[Unsettled]]:
        state, self.residual = model.settle_report(x)
        self.output = model.readout(state).detach()
        values = {"x": model.input_of(x), "out": self.output}
        report = judged(values, self.residual.unsqueeze(0), ["free"], self.limit)
        keep, share, own = self._kept(report, len(x)), 1.0, target
        if keep is not None:
            x, own, share = x[keep], target[keep], len(keep) / len(x)
            state = {layer: v[keep] for layer, v in state.items()}
        gradients = _times(share, gradients_through_time(model, x, own, state, self.nudge_steps))
        taught = keep is not None or not report
        if taught and not bool(torch.stack([g.isfinite().all() for g in gradients.values()]).all()):
            report = report + no_numbers(settled(report, len(target)))  # whose it is, nobody knows
        return self._loss(self.output, target).unsqueeze(0), gradients, report

    def _answers(self, phases: Phases) -> list[Unsettled]:
        values = {**phases.error(), "x": phases.x}
        return judged(values, phases.residual, nudge_names(phases.betas), self.limit)

    def _phases(self, model: HopfieldNet, x: Tensor, target: Tensor) -> Phases:
        phases = Phases(model, x, target, self.variant, self.beta, self.nudge_steps)
        self.residual = phases.free_residual
        return phases

    def error(self, x: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Unsettled]]:
        """How the net answers to its nudges, as a step would find it; nothing is learned.

        Args: x (Tensor): the batch. target (Tensor): class indices (B,).

        Returns: the free state, layer -> u (s of a HopfieldNet); its error, layer -> e (ds / d beta of a HopfieldNet,
        by its nudges whatever the method); and a list of :class:`Unsettled`. ``.residual`` is the free phase's.
        """
        model = self.model
        self._check(x, target)
        if isinstance(model, HopfieldNet):
            phases = self._phases(model, x, target)
            return phases.free, phases.error(), self._answers(phases)
        x, weights = model.input_of(x), {k: w.detach() for k, w in model.named_weights().items()}
        words: dict[str, Any] = dict(activation=model.activation, loss=model.loss)
        nudge: dict[str, Any] = dict(beta=self.beta, points=self.points, steps=self.nudge_steps)
        if self.method == "continuous":
            own = {**nudge, **words, "plateaus": self.plateaus}
            state, e, residual = continuous_report(weights, x, target, **own, impl=model.impl)
            names = nudge_names([cmath.rect(self.beta, 2 * math.pi * k / self.points) for k in range(len(residual))])
            return state, e, judged({**e, "x": x}, residual, names, self.limit)
        free = ep_settle_report(weights, x, steps=model.steps, **model.dynamics())
        state, self.residual = free[0], free[2]
        if self.method == "recurrent_backprop":
            e = recurrent_backprop_error(weights, x, target, state, steps=self.nudge_steps, **words)
            return state, e, judged({**e, "x": x}, self.residual.unsqueeze(0), ["free"], self.limit)
        e, residual = error_report(weights, x, target, state, **nudge, **words, impl=model.impl)
        names = nudge_names(circle(self.beta, self.points).betas if self.points else [0j])
        return state, e, judged({**e, "x": x}, residual, names, self.limit)

    def _check(self, x: Tensor, target: Tensor) -> None:
        x = self.model.input_of(x)
        checks.class_targets("target", target, x, "x")
        if not len(x):
            raise ValueError(f"x must have at least one sample, got shape {checks.shape_of(x)}")

    def _loss(self, out: Tensor, target: Tensor) -> Tensor:
        if self.model.loss == "cross_entropy":
            return F.cross_entropy(out, target.long())
        return F.mse_loss(out, F.one_hot(target.long(), out.shape[1]).to(out.dtype), reduction="sum") / 2 / len(out)

    def _homeostasis(self, weights: Any, state: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        learning = [k for k in weights if not k.startswith(("in-", "readout/"))]
        leaves = {k: w.detach().requires_grad_(k in learning) for k, w in weights.items()}
        assert not isinstance(self.model, HopfieldNet)
        r, impl = self.model.activities(state), self.model.impl
        with torch.enable_grad():
            loss = homeostatic_loss(
                leaves, r, estimator=self.estimator, probes=self.probes, noise=self.noise, impl=impl
            )
        found = torch.autograd.grad(loss, [leaves[k] for k in learning]) if loss.requires_grad else ()
        for key, gradient in zip(learning, found):
            gradients[key] = gradients[key] + self.homeostasis * gradient
        return loss.detach()


def _times(share: float, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients if share == 1 else {key: g * share for key, g in gradients.items()}


def _refuse_tied(model: nn.Module) -> None:
    """The gradients are by key, and each would move the one parameter."""
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in seen:
            names = f"{seen[id(p)]} and {name}"
            raise ValueError(f"model's weights must not share parameters, got one as {names}: give each its own")
        seen[id(p)] = name


def _factors(model: Any, rates: Any) -> list[tuple[nn.Parameter, float]]:
    """(parameter, what its learning rate is multiplied with)."""
    if rates is None:
        rates = {}
    constructors.instance("rates", rates, Mapping, "a dict, edge -> number")
    edges = {key.rpartition("/")[0] for key in model.weights.keys()}
    result = dict.fromkeys(edges, 1.0)
    for edge, factor in rates.items():
        if edge not in edges:
            raise ValueError(f"rates must name edges of the net, {', '.join(sorted(edges))}, got a dict with {edge!r}")
        factor = checks.positive("rates", factor)
        result[edge] = factor
        back = "-".join(reversed(edge.split("-")))
        if back in edges and back not in rates:
            result[back] = factor
    return [(parameter, result[key.rpartition("/")[0]]) for key, parameter in model.weights.items()]
