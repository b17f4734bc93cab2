"""How good a forward gradient is: its angle to the exact gradient, and its variance, measured and by formula.

For one linear map and a given sample the variance, as a mean over the weights, is (k + 1) S (Ren et al., table 1): k
numbers are perturbed, S is the mean square of the exact gradient. In a network k S is the squared length of the
gradient of all that is perturbed behind the loss, in all layers, and the noise of an activity goes on through the
derivatives of its ReLU and its layer norm. The groups' gradients of the layer over the patches are taken for
orthogonal.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.forward_gradient import EPS, linear, norm
from ..training import ForwardGradientTrainer

SAMPLES, DRAWS = 32, 8  # of a measurement


class Stage(NamedTuple):
    """A layer of a block, in a pass that autograd saw."""

    block: int
    kind: str
    module: Any
    a: Tensor  # its input
    z: Tensor  # its output
    added: Tensor  # zeros, where the noise is added

    @property
    def name(self) -> str:
        return f"block {self.block + 1}, {self.kind}"


def _pass(trainer: ForwardGradientTrainer, x: Tensor, target: Tensor) -> tuple[list[Stage], Tensor]:
    """The stages, and the sum of the losses."""
    model, local, stages = trainer.model, trainer.kind.local, list[Stage]()
    y, total = model.patches(x), x.new_zeros(())
    for b, block in enumerate(trainer.mixer_blocks):
        width, added = block.channel.out_features, []
        for kind, _ in block.stages():
            channels = (block.groups, width // block.groups) if kind == "group" else (width,)
            added.append(y.new_zeros(*y.shape[:2], *channels).requires_grad_())
        given = iter(added)

        def kept(kind: str, module: Any, a: Tensor, b: int = b, given: Any = given) -> Tensor:
            z = linear(kind, module, a)
            stages.append(Stage(b, kind, module, a.detach(), z, next(given)))
            return z

        out = block(y.detach() if trainer.kind.greedy else y, linear=kept, added=added)
        if local:
            rows = (norm(out) if model.head_norm else out).mean(1).flatten(1)
            total = total + F.cross_entropy(block.head(rows), target)
        y = out.flatten(-2)
    return stages, total if local else F.cross_entropy(model.readout(model.summary(out)), target)


def _of_activities(stages: list[Stage], gz: Any, reached: Any, groups: int, sign: int) -> list[Tensor]:
    """Sums over the weights of the variance, by stage. groups: with a loss of their own in each patch; 0: one loss a
    sample."""

    def by_loss(values: Tensor) -> Tensor:
        """(N, P, G) sums over the channels of each loss's group, of the layer over patches a G-th of all."""
        return values.flatten(2).unflatten(2, (max(groups, 1), -1)).sum(3)

    parts = [by_loss(g.square()) for g in reached]
    found = []
    for stage, g, u in zip(stages, gz, reached):
        behind = [part for part, other in zip(parts, stages) if not groups or other.block == stage.block]
        total = torch.stack(behind).sum(0)
        if not groups:
            total = total.sum((1, 2), keepdim=True)
        elif stage.kind == "token":
            total = total.sum(2, keepdim=True)
        else:  # each group's own
            token = [part for part, other in zip(parts, stages) if other.block == stage.block and other.kind == "token"]
            for part in token:
                total = total - part + part.sum(2, keepdim=True) / groups
        a, z, n = stage.a, stage.z.detach(), u.shape[-1]
        normed, passed = norm(z), (z.var(-1, correction=0, keepdim=True) + EPS).reciprocal() * (u != 0)
        if stage.kind == "token":  # the squares of what LN' makes of each patch's a
            mean, along = a.mean(2).unsqueeze(1), normed @ a.mT / n
            products = (mean @ a) + normed * (along @ a)
            squares = mean.square().sum(2, keepdim=True) + 2 * normed * (along * mean).sum(2, keepdim=True)
            squares = squares + normed.square() * along.square().sum(2, keepdim=True)
            kept = passed * (a.square().sum(1, keepdim=True) - 2 * products + squares)
            of_noise = kept * total
            own = torch.einsum("npd,nqd->npq", g, a).square()
        else:
            kept = passed * (1 - 1 / n - normed.square() / n)  # of the noise's square, behind LN'
            size = a.square().sum(-1, keepdim=True)
            if stage.kind == "channel" and groups:
                kept = kept.unflatten(2, (groups, -1)).sum(3)
            of_noise = kept * size * (total.unsqueeze(3) if stage.kind == "group" else total)
            own = g.square() * size
        found.append(of_noise.sum() + sign * own.sum())
    return found


def predicted(trainer: ForwardGradientTrainer, x: Tensor, target: Tensor) -> tuple[dict, dict]:
    """By layer: its weight with the exact gradient, and the mean over the weight of the estimate's variance."""
    with torch.enable_grad():
        stages, loss = _pass(trainer, x, target)
        weights = [s.module.weight for s in stages]
        wanted = [*weights, *(s.module.bias for s in stages), *(s.z for s in stages), *(s.added for s in stages)]
        found = torch.autograd.grad(loss, wanted)
    n = len(stages)
    exact = {s.name: (w, g) for s, w, g in zip(stages, weights, found)}
    sign = 1 if trainer.noise.activity[0].law == "normal" else -1
    groups = trainer.mixer_blocks[0].groups if trainer.kind.local else 0
    if trainer.kind.perturb == "activities":
        sums = _of_activities(stages, found[2 * n : 3 * n], found[3 * n :], groups, sign)
        return exact, {s.name: (v / w.numel()).item() for s, w, v in zip(stages, weights, sums)}
    squares = [found[i].square().sum() + found[n + i].square().sum() for i in range(n)]
    variances = {}
    for stage, gradient in zip(stages, found):
        behind = sum(v for v, other in zip(squares, stages) if not groups or other.block == stage.block)
        one = behind / groups if groups and stage.kind != "token" else behind
        variances[stage.name] = (one + sign * gradient.square().mean()).item()
    return exact, variances


def of(run: Any) -> dict[str, Any]:
    """For an epoch's record, by layer: the cosine between the estimate and the exact gradient of the same losses, and,
    where there is noise, the estimate's variance over draws, the formulas', and the ratio of both."""
    trainer = run.trainer
    holders = [m for m in trainer.noise.modules() if hasattr(m, "state")]
    states = [m.state.clone() for m in holders]
    x, target = run.batch_at(torch.arange(min(SAMPLES, run.settings.batch_size)), 0)
    exact, variances = predicted(trainer, x, target)
    names = {p: n for n, p in trainer.model.named_parameters()}
    noisy = trainer.kind.perturb != "nothing"
    draws = [trainer.gradients(x, target)[1] for _ in range(DRAWS if noisy else 1)]
    for holder, state in zip(holders, states):
        holder.state.copy_(state)
    samples = {layer: torch.stack([d[names[w]] for d in draws]) for layer, (w, _) in exact.items()}
    angles = {
        layer: F.cosine_similarity(samples[layer][0].double().flatten(), truth.double().flatten(), dim=0).item()
        for layer, (_, truth) in exact.items()
    }
    if not noisy:
        return {"cosine": angles}
    measured = {layer: sample.var(0).mean().item() for layer, sample in samples.items()}
    formulas = {layer: value / trainer.draws for layer, value in variances.items()}
    ratio = {layer: measured[layer] / value if value > 0 else None for layer, value in formulas.items()}
    return {"cosine": angles, "variance": measured, "variance_by_formula": formulas, "variance_ratio": ratio}
