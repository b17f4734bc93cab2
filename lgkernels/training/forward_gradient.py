"""Local forward gradients and their relatives, for LocalMixer: every estimator of the paper's tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks, constructors
from ..nn.forward_gradient import LocalMixer, std
from ..random import Law, RandomFeedback
from . import exact, perturbation
from .perturbation import Stage
from .trainer import OptimizerFactory, SchedulerFactory, Trainer

__all__ = ["ForwardGradientTrainer"]


class Estimator(NamedTuple):
    """How gradients are made, by the three parts of a published name."""

    perturb: str  # "activities", "weights", "nothing" (exact or random feedback)
    local: bool  # whether blocks have losses of their own
    greedy: bool  # whether nothing flows back from a block to the one before it
    feedback: bool = False  # whether the backward pass goes through random matrices


ESTIMATORS = {
    "BP": Estimator("nothing", False, False),
    "L-BP": Estimator("nothing", True, False),
    "LG-BP": Estimator("nothing", True, True),
    "FA": Estimator("nothing", False, False, True),
    "L-FA": Estimator("nothing", True, False, True),
    "LG-FA": Estimator("nothing", True, True, True),
    "DFA": Estimator("nothing", False, False),
    "FG-W": Estimator("weights", False, False),
    "FG-A": Estimator("activities", False, False),
    "LG-FG-W": Estimator("weights", True, True),
    "LG-FG-A": Estimator("activities", True, True),
}
Gradients = dict[nn.Parameter, Tensor]


class _Noise(nn.Module):
    """The random numbers of a trainer: for each stage of each block the activity's noise, tangents of weight and bias,
    and backward weights; and the direct feedback of DFA. All are formulas."""

    def __init__(self, model: LocalMixer, seed: int, law: Law) -> None:
        super().__init__()
        blocks: list[Any] = list(model.blocks)
        stages = [(b, module) for b, block in enumerate(blocks) for _, module in block.stages()]
        self.counts = [sum(1 for owner, _ in stages if owner == b) for b in range(len(model.blocks))]

        def made(kind: int, law: Law, scales: Sequence[float] | None = None) -> nn.ModuleList:
            return nn.ModuleList(
                RandomFeedback(seed, 4096 * kind + i, law, 1.0 if scales is None else scales[i])
                for i in range(len(stages))
            )

        weights = [module.weight for _, module in stages]
        self.activity, self.weight, self.bias = made(0, law), made(1, law), made(2, law)
        self.backward_weight = made(3, "normal", [std(model.init, w.shape[-1]) for w in weights])
        self.direct = made(4, "normal", [model.num_classes**-0.5] * len(stages))
        heads = len(model.blocks) + 1
        self.backward_head = nn.ModuleList(
            RandomFeedback(seed, 4096 * 5 + i, "normal", std(model.init, model.readout.in_features))
            for i in range(heads)
        )

    def of_block(self, holders: nn.ModuleList, block: int) -> list[Any]:
        start = sum(self.counts[:block])
        return list(holders[start : start + self.counts[block]])

    def advance(self) -> None:
        for holders in (self.activity, self.weight, self.bias):
            for one in holders:
                assert isinstance(one, RandomFeedback)
                one.advance()


class ForwardGradientTrainer(Trainer):
    r"""Trains :class:`lgkernels.nn.LocalMixer` by forward gradients, or by what they are compared with.

    An activity-perturbed forward gradient adds noise u to the tangent of an activity z, sends it forward, and takes

    .. math:: g = \dot L\, u, \qquad \dot L = \langle \nabla_z L, u \rangle, \qquad \mathbb{E}[g] = \nabla_z L

    for the gradient of z. Its variance grows with the number of units behind one loss, so there is a loss for each
    block, patch and group. No backward pass is made; one block's activations live at a time.

    ============  ====================================================================================
    estimator     gradient
    ============  ====================================================================================
    ``LG-FG-A``   forward gradient, activities perturbed, local losses, nothing between the blocks
    ``LG-FG-W``   the same with weights perturbed, by one noise for all samples
    ``FG-A``      activities perturbed, one loss behind the last block for each sample
    ``FG-W``      weights perturbed, one loss
    ``BP``        back-propagation
    ``L-BP``      back-propagation of all local losses; ``LG-BP``: within each block
    ``FA``        BP with fixed random weights in the backward pass; ``L-FA``, ``LG-FA`` alike
    ``DFA``       the output's error, projected to every activity by a fixed random matrix (Nokland 2016; the
                  published code's "DFA" is a local loss with a random read-out, and is not this)
    ============  ====================================================================================

    Heads and read-out always have their exact gradients (through random weights with FA). The read-out learns from
    the last block's output, to which it passes nothing where losses are local.

    Args:
        model (LocalMixer): with ``head="contrastive"`` a step takes two views of the images.
        optimizer_factory (callable): the parameters of a block, or of the read-out -> their optimizer. It finds the
            gradients in ``.grad``.
        estimator (str): as above.
        draws (int): independent draws of the noise whose mean a step takes; 1 for estimators without noise.
        law (str): of the noise: ``"normal"``, or ``"sign"``: Rademacher, whose variance is smaller by the squared
            gradient.
        derivative (str): ``"forward"``, or ``"finite_difference"``: the loss at an activity moved by
            ``step_size * u`` less the loss, by ``step_size``; one number a sample and block.
        step_size (float): 1e-3 in the published code.
        temperature (float): of the contrastive loss.
        readout_factor, head_factor (float): of the gradients of the read-out (published: 0.1) and the heads (1.0).
        seed (int): of all that is random here.
        impl (str): ``"auto"`` or a backend.
        scheduler_factory, accumulation_steps, clip_grad_norm: as :class:`BlockwiseTrainer`.

    ``step(x, target)`` takes images (N, C, H, W), or two views as a pair, and class indices (N,); it returns the
    losses of the blocks that have one and of the read-out.

    Raises: ValueError, TypeError naming the argument.

    Source: Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses" (ICLR 2023).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> from lgkernels.training import ForwardGradientTrainer
        >>> _ = torch.manual_seed(0)
        >>> model = lnn.LocalMixer("M/4/4", image_size=8, in_channels=1, num_classes=2, blocks=2, width=16)
        >>> trainer = ForwardGradientTrainer(model, lambda parameters: torch.optim.SGD(parameters, 0.3))
        >>> x, target = torch.randn(64, 1, 8, 8), torch.arange(64) % 2
        >>> first = trainer.step(x + target.view(-1, 1, 1, 1), target)
        >>> for _ in range(20):
        ...     losses = trainer.step(x + target.view(-1, 1, 1, 1), target)
        >>> losses.shape, bool((losses < first).all())
        (torch.Size([3]), True)
    """

    def __init__(
        self,
        model: LocalMixer,
        optimizer_factory: OptimizerFactory,
        *,
        estimator: str = "LG-FG-A",
        draws: int = 1,
        law: Law = "normal",
        derivative: str = "forward",
        step_size: float = 1e-3,
        temperature: float = 0.5,
        readout_factor: float = 0.1,
        head_factor: float = 1.0,
        seed: int = 0,
        impl: str = "auto",
        scheduler_factory: SchedulerFactory | None = None,
        accumulation_steps: int = 1,
        clip_grad_norm: float | None = None,
    ) -> None:
        constructors.instance("model", model, LocalMixer, "a lgkernels.nn.LocalMixer")
        checks.choice("estimator", estimator, tuple(ESTIMATORS))
        self.estimator, self.kind = estimator, ESTIMATORS[estimator]
        self.draws = constructors.size("draws", draws)
        checks.choice("law", law, ("normal", "sign"))
        checks.choice("derivative", derivative, ("forward", "finite_difference"))
        self.derivative, self.step_size = derivative, checks.positive("step_size", step_size)
        self.temperature = checks.positive("temperature", temperature)
        constructors.not_negative("readout_factor", readout_factor)
        constructors.not_negative("head_factor", head_factor)
        self.factors = float(checks.item(head_factor)), float(checks.item(readout_factor))
        perturbation.refuse_unused(estimator, self.kind.perturb, self.draws, derivative)
        checks.impl(impl)
        self.impl = impl
        self.views = 2 if model.head == "contrastive" else 1
        if self.views == 2 and not self.kind.local:
            raise ValueError(
                f"estimator must have local losses (L-, LG-) for a contrastive model, got {estimator!r}: its read-out "
                "passes no gradient to the blocks"
            )
        self.model = model
        self.mixer_blocks: list[Any] = list(model.blocks)
        groups = [[p for p in part.parameters() if p.requires_grad] for part in (*model.blocks, model.readout)]
        perturbation.refuse_tied(model, groups)
        super().__init__(
            [model],
            optimizer_factory,
            groups,
            scheduler_factory=scheduler_factory,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            grad_scaler=None,
        )
        parameter = next(model.parameters())
        self.noise = _Noise(model, checks.integer_between("seed", seed, -(2**63), 2**64), law).to(parameter.device)

    def _model(self) -> nn.ModuleList:
        """What a checkpoint's random states are taken from."""
        return nn.ModuleList([self.model, self.noise])

    # -- a step ----------------------------------------------------------------------------------------------------

    def _check_batch(self, x: Any) -> None:
        for view in x if isinstance(x, (tuple, list)) else [x]:
            checks.any_tensor("x", view)

    def _step(self, x: Any, target: Tensor, last: bool) -> Tensor:
        views = self._views(x, target)

        def finished(part: int, gradients: Gradients) -> None:
            for parameter, gradient in gradients.items():
                gradient = (gradient / self.accumulation_steps).to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            if last:
                self._update(self.optimizers[part], self.parameter_groups[part])

        losses = self._pass(views, target, finished, None)
        self.noise.advance()
        return losses

    def gradients(
        self, x: Any, target: Tensor, *, noise: Sequence[Sequence[Any]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`(losses, gradients by parameter name)` of a batch: what a step would hand to the optimizers.

        noise: instead of the random one, a list for each block with an entry for each of its stages: where activities
        are perturbed a tensor, (N, P, D) for those over patches and channels, (N, P, G, C) for that of the groups, or a
        RandomFeedback; where weights are, a pair of tensors like weight and bias. With draws=1 alone. No parameter
        changes; the next noise is another.
        """
        patches = self._views(x, target)
        if noise is not None:
            perturbation.check_noise(self, noise, patches[0])
        found: Gradients = {}

        def finished(part: int, gradients: Gradients) -> None:
            found.update({p: gradient.to(p.dtype) for p, gradient in gradients.items()})

        losses = self._pass(patches, target, finished, noise)
        self.noise.advance()
        return losses, {name: found[p] for name, p in self.model.named_parameters() if p in found}

    def _views(self, x: Any, target: Tensor) -> list[Tensor]:
        views = list(x) if isinstance(x, (tuple, list)) else [x]
        if len(views) != self.views:
            raise ValueError(
                f"x must be {'a pair of views' if self.views == 2 else 'a batch of images'} for a model with "
                f"head={self.model.head!r}, got {len(views)}"
            )
        patches = [self.model.patches(view) for view in views]
        if not len(patches[0]):
            raise ValueError(f"x must have at least one sample, got shape {checks.shape_of(views[0])}")
        checks.class_targets("target", target, patches[0], "x")
        checks.class_indices("target", target, self.model.num_classes)
        perturbation.refuse_mixed(self.model, views)
        for view in patches[1:]:
            checks.shape("x", view, patches[0].shape, "two views of the same images")
        return patches

    def _pass(self, views: list[Tensor], target: Tensor, finished: Any, noise: Any) -> Tensor:
        if self.kind.perturb == "nothing":
            return exact.gradients(self, views, target, finished)
        if self.kind.greedy:
            return self._local(views, target, finished, noise)
        return self._global(views[0], target, finished, noise)

    # -- forward gradients -----------------------------------------------------------------------------------------

    def _draw(self, block: int, given: Any) -> list[Any]:
        """Noise for the stages of a block: formulas, or pairs of tensors for weight and bias."""
        if given is not None:
            return list(given[block])
        if self.kind.perturb == "activities":
            return self.noise.of_block(self.noise.activity, block)
        pairs = zip(self.noise.of_block(self.noise.weight, block), self.noise.of_block(self.noise.bias, block))
        stages: Any = self.model.blocks[block]
        return [
            (
                weight.materialize(module.weight.shape, dtype=module.weight.dtype),
                bias.materialize(module.bias.shape, dtype=module.bias.dtype),
            )
            for (weight, bias), (_, module) in zip(pairs, stages.stages())
        ]

    def _stage_gradients(self, tape: list[Stage], derivatives: Tensor, scale: float, total: Gradients) -> None:
        """Adds the gradients of a block's layers, from the derivatives (N, P, G) of its losses; empties the tape."""
        while tape:
            stage = tape.pop()
            if self.kind.perturb == "activities":
                grads = perturbation.activity_gradients(stage, derivatives, self.impl)
            else:
                grads = perturbation.weight_gradients(stage, derivatives.sum((0, 1)))
            for parameter, gradient in zip((stage.module.weight, stage.module.bias), grads):
                if parameter.requires_grad:
                    total[parameter] = total.get(parameter, 0) + gradient * scale

    def _losses(self, block: Any, outputs: list[Tensor], tangents: list[Any], target: Tensor) -> Any:
        return perturbation.head_losses(
            block.head, outputs, tangents, target, self.model.head_norm, self.temperature, self.impl
        )

    def _local(self, xs: list[Tensor], target: Tensor, finished: Any, given: Any) -> Tensor:
        losses = []
        for b, block in enumerate(self.mixer_blocks):
            total: Gradients = {}
            made: Any = None
            for draw in range(self.draws):
                if draw:
                    self.noise.advance()
                made = None  # its outputs do not stay while the next draw makes the same ones
                made = self._local_draw(block, xs, self._draw(b, given), target, total)
            outputs, result = made
            for parameter, gradient in ((block.head.weight, result.weight), (block.head.bias, result.bias)):
                if parameter.requires_grad:
                    total[parameter] = gradient * self.factors[0]
            losses.append(result.loss)
            finished(b, total)
            xs = [out.flatten(-2) for out in outputs]
        return self._read_out(outputs[0], target, losses, finished)

    def _local_draw(self, block: Any, xs: list[Tensor], noise: list[Any], target: Tensor, total: Gradients) -> Any:
        """A block's outputs and losses; adds one draw's gradients of its layers. Nothing else of it stays alive."""
        forward = self.derivative == "forward"
        perturb = self.kind.perturb if forward else "nothing"
        passes = (perturbation.dual_block(block, x, None, noise, perturb, self.impl) for x in xs)
        outputs, tangents, tapes = zip(*passes)
        result = self._losses(block, outputs, tangents, target)
        del tangents
        derivatives = result.derivatives
        if not forward:
            moved = [perturbation.moved_block(block, x, noise, self.kind.perturb, self.step_size) for x in xs]
            rows = (self._losses(block, moved, [None] * len(xs), target).rows - result.rows) / self.step_size
            derivatives = perturbation.of_all_patches(rows, len(xs))
        for tape, derivative in zip(tapes, derivatives):
            self._stage_gradients(tape, derivative, 1 / (self.draws * len(xs)), total)
        return outputs, result

    def _global(self, x: Tensor, target: Tensor, finished: Any, given: Any) -> Tensor:
        """One loss behind the last block."""
        totals: list[Gradients] = [{} for _ in self.mixer_blocks]
        features: Any = None
        for draw in range(self.draws):
            if draw:
                self.noise.advance()
            features = None
            features = self._global_draw(x, [self._draw(b, given) for b in range(len(totals))], target, totals)
        for b, total in enumerate(totals):
            finished(b, total)
        return self._read_out(features, target, [], finished)

    def _global_draw(self, x: Tensor, noises: list[Any], target: Tensor, totals: list[Gradients]) -> Tensor:
        """The last block's output; adds one draw's gradients of all layers. Nothing else of it stays alive."""
        forward = self.derivative == "forward"
        y, tangent, moved, tapes = x, None, x, []
        for block, noise in zip(self.mixer_blocks, noises):
            perturb = self.kind.perturb if forward else "nothing"
            y, tangent, tape = perturbation.dual_block(block, y, tangent, noise, perturb, self.impl)
            tapes.append(tape)
            last = y
            y, tangent = y.flatten(-2), None if tangent is None else tangent.flatten(-2)
            if not forward:
                moved = perturbation.moved_block(block, moved, noise, self.kind.perturb, self.step_size)
                moved = moved.flatten(-2)
        rows = perturbation.readout_derivatives(
            self.model, last, tangent if forward else None, None if forward else moved, self.step_size, target
        )
        (derivative,) = perturbation.of_all_patches(rows, 1)
        for tape, total in zip(tapes, totals):
            self._stage_gradients(tape, derivative, 1 / self.draws, total)
        return last

    @torch.no_grad()
    def _read_out(self, features: Tensor, target: Tensor, losses: list[Tensor], finished: Any) -> Tensor:
        """The exact gradient of the read-out, by itself."""
        with torch.enable_grad():
            self.output = self.model.readout(self.model.summary(features.detach()))
            loss = F.cross_entropy(self.output, target.long())
            parameters = [p for p in self.model.readout.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, parameters) if parameters else ()
        self.output = self.output.detach()
        finished(len(self.model.blocks), {p: g * self.factors[1] for p, g in zip(parameters, grads)})
        return torch.stack([*losses, loss.detach()])
