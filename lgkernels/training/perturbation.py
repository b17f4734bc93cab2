"""Blocks of LocalMixer with a tangent beside every activation, and the gradients that come of it. No graph is recorded.

A pass leaves a tape of primals alone: of each stage its input, its layer's output, and what stood behind the ReLU.
Tangents live no longer than the next stage needs them, but where the norm's kernel writes both as halves of one tensor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..functional.dual_layers import as_noise
from ..nn.forward_gradient import EPS, LocalMixer, LocalMixerBlock, linear
from ..ops.forward_gradient import autograd, layers
from ..random import RandomFeedback

Noise = Tensor | RandomFeedback


class Stage(NamedTuple):
    """What a stage of a block leaves for its gradient: of weights, the noise alone."""

    kind: str
    module: Any
    noise: Any  # of the activity, or of weight and bias
    x: Tensor | None = None  # its input
    normed: bool = False  # whether the layer multiplies x's layer norm, or x itself
    z: Tensor | None = None  # what the layer makes, before the norm
    y: Tensor | None = None  # behind the ReLU


def refuse_unused(estimator: str, perturb: str, draws: int, derivative: str) -> None:
    """Options that an estimator without noise would ignore."""
    if perturb != "nothing":
        return
    for name, value, only in (("draws", draws, 1), ("derivative", derivative, "forward")):
        if value != only:
            raise ValueError(
                f"{name} must be {only!r} for estimator={estimator!r}, which perturbs nothing, got {value!r}"
            )


def check_noise(trainer: Any, noise: Any, x: Tensor) -> None:
    """The noise given for patches x (N, P, channels): by blocks and stages, as the trainer's estimator takes it."""
    perturb, blocks = trainer.kind.perturb, list[Any](trainer.model.blocks)
    if perturb == "nothing":
        raise ValueError(
            f"noise must be None for estimator={trainer.estimator!r}, which perturbs nothing, got {checks.got(noise)}"
        )
    if trainer.draws != 1:
        raise ValueError(
            f"noise must be None where a step takes draws={trainer.draws}, each of which would be the same, got "
            f"{checks.got(noise)}: give it to a trainer of draws=1"
        )
    _check_list("noise", noise, len(blocks), "one list for each block")
    for b, block in enumerate(blocks):
        stages = block.stages()
        _check_list(f"noise[{b}]", noise[b], len(stages), "one entry for each stage of the block")
        for i, (kind, module) in enumerate(stages):
            name, given = f"noise[{b}][{i}]", noise[b][i]
            if perturb == "weights":
                _check_list(name, given, 2, "a pair of tensors like the stage's weight and bias")
                for j, (own, parameter) in enumerate((("weight", module.weight), ("bias", module.bias))):
                    _check_tensor(f"{name}[{j}]", given[j], parameter.shape, f"that of the stage's {own}", parameter)
            elif not isinstance(given, RandomFeedback):
                width = block.channel.out_features
                channels = (block.groups, width // block.groups) if kind == "group" else (width,)
                _check_tensor(name, given, (*x.shape[:2], *channels), "that of the stage's activity", module.weight)


def _check_list(name: str, given: Any, length: int, what: str) -> None:
    if not isinstance(given, (list, tuple)) or len(given) != length:
        size = f" of {len(given)}" if isinstance(given, (list, tuple)) else ""
        raise ValueError(f"{name} must be a list or tuple of {length}, {what}, got a {type(given).__name__}{size}")


def _check_tensor(name: str, given: Any, shape: Sequence[int], what: str, like: Tensor) -> None:
    checks.floating(name, given)
    checks.shape(name, given, shape, what)
    checks.precision(name, given, "the model", like)
    checks.same_device(**{name: given}, model=like)


def _bias(block: LocalMixerBlock, kind: str, bias: Tensor) -> Tensor:
    return bias if kind == "group" or block.bias_factor == 1 else bias * block.bias_factor


def _product(kind: str, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A stage's layer by itself: primal and tangent are two tensors, since they live for different times."""
    if kind == "channel":
        return torch.nn.functional.linear(a, weight, bias)
    if kind == "group":
        return layers.group_linear(a, weight, bias)
    z = torch.matmul(weight, a)
    return z if bias is None else z.add_(bias.unsqueeze(1))


def _input(x: Tensor, x_tangent: Tensor | None, normed: bool, impl: str) -> tuple[Tensor, Tensor | None]:
    """What a stage's layer multiplies, and its tangent."""
    if not normed:
        return x, x_tangent
    return layers.dual_norm(x, x_tangent, None, layers.NO_NOISE, x.dim() - 1, EPS, False, impl)


@torch.no_grad()
def dual_block(
    block: LocalMixerBlock, x: Tensor, x_tangent: Tensor | None, noise: Sequence[Any], perturb: str, impl: str
) -> tuple[Tensor, Tensor | None, list[Stage]]:
    """`(out, its tangent, tape)` of x (N, P, channels).

    noise: of each stage a tensor or a formula shaped like its output for perturb="activities", a pair of tensors
    shaped like its parameters for "weights", anything for "nothing".
    """
    y, y_tangent = x, x_tangent
    tape, stages = list[Stage](), list[tuple[str, Any]](block.stages())
    for i, (kind, module) in enumerate(stages):
        if kind == "group":
            y, y_tangent = block.grouped(y), None if y_tangent is None else block.grouped(y_tangent)
        came, normed = y, block.has_norm(i)
        a, a_tangent = _input(y, y_tangent, normed, impl)
        z = _product(kind, a, module.weight, _bias(block, kind, module.bias))
        z_tangent = None if a_tangent is None else _product(kind, a_tangent, module.weight, None)
        if perturb == "weights":
            weight, bias = noise[i]
            moved = _product(kind, a, weight, _bias(block, kind, bias))
            z_tangent = moved if z_tangent is None else z_tangent.add_(moved)
            del moved
        del a, a_tangent
        residual = block.grouped(x) if kind == "group" and block.token is not None else None
        u = as_noise(noise[i], z) if perturb == "activities" else layers.NO_NOISE
        if residual is not None and x_tangent is not None:  # it enters where the noise does
            added = block.grouped(x_tangent)
            if perturb == "activities":
                added = added + (noise[i].materialize(z.shape, z.device, z.dtype) if u[0] is None else noise[i])
            u = (added, *layers.NO_NOISE[1:])
        y, y_tangent = layers.dual_norm(z, z_tangent, residual, u, z.dim() - 1, EPS, True, impl)
        if perturb == "weights":
            tape.append(Stage(kind, module, noise[i]))
        else:
            tape.append(Stage(kind, module, noise[i], came, normed, z, y))
        del z, z_tangent, came
    return y, y_tangent, tape


def _patch_products(grad: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight (P, P) and bias (P,) of a layer over the patches, of grad and a (N, P, D)."""
    weight = torch.addbmm(grad.new_empty(()), grad, a.transpose(1, 2), beta=0)
    return weight, grad.sum((0, 2))


@torch.no_grad()
def activity_gradients(stage: Stage, coefficient: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a stage from the derivatives (N, P, G) along the noise of its activity; (N, 1, 1)
    where all patches and groups have one loss."""
    x, z, y = stage.x, stage.z, stage.y
    assert x is not None and z is not None and y is not None
    dim, u = z.dim() - 1, as_noise(stage.noise, z)
    if stage.kind == "group":
        q = coefficient.expand(z.shape[:-1]).unsqueeze(-1)
    else:
        q = coefficient.sum(2, keepdim=True) if stage.kind == "token" else coefficient
        q = q.expand(-1, z.shape[1], -1)
    a, _ = _input(x, None, stage.normed, impl)
    if stage.kind == "token":
        return _patch_products(torch.ops.lgkernels.activity_grad(z, y, q, *u, dim, EPS, True, impl), a)
    return layers.activity_grads(a, z, y, q, u, dim, EPS, stage.kind == "group", impl)


@torch.no_grad()
def weight_gradients(stage: Stage, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """The same along tangents of weight and bias, from the derivatives (G,) of the groups' losses, or of one, (1,)."""
    weight, bias = stage.noise
    if stage.kind == "token":
        q = coefficient.sum()
        return weight * q, bias * q
    if stage.kind == "group":
        return weight * coefficient.view(-1, 1, 1), bias * coefficient.view(-1, 1)
    q = coefficient.repeat_interleave(len(bias) // len(coefficient))
    return weight * q.unsqueeze(1), bias * q


@torch.no_grad()
def moved_block(block: LocalMixerBlock, x: Tensor, noise: Sequence[Any], perturb: str, step: float) -> Tensor:
    """The block's output with activities or weights moved by `step` times the noise."""
    if perturb == "activities":
        width, added = block.channel.out_features, []
        for (kind, _), u in zip(block.stages(), noise):
            channels = (block.groups, width // block.groups) if kind == "group" else (width,)
            size = (*x.shape[:2], *channels)
            added.append((u.materialize(size, x.device, x.dtype) if isinstance(u, RandomFeedback) else u) * step)
        return block(x, added=added)
    given = iter(noise)

    def moved(kind: str, module: Any, a: Tensor) -> Tensor:
        weight, bias = next(given)
        return linear(kind, module, a).add_(_product(kind, a, weight * step, _bias(block, kind, bias * step)))

    return block(x, linear=moved)


def readout_derivatives(
    model: LocalMixer, features: Tensor, tangent: Tensor | None, moved: Tensor | None, step: float, target: Tensor
) -> Tensor:
    """(N,): the derivatives of the read-out's loss of each sample along the tangent of features (N, P, G, C), or its
    difference to that of moved features, by the step."""

    def losses(features: Tensor) -> Tensor:
        logits = model.readout(model.summary(features))
        return torch.nn.functional.cross_entropy(logits, target.long(), reduction="none")

    with torch.no_grad():
        if moved is not None:
            return (losses(moved.view(features.shape)) - losses(features)) / step
        assert tangent is not None
        return torch.func.jvp(losses, (features,), (tangent.view(features.shape),))[1]


def of_all_patches(rows: Tensor, views: int) -> list[Tensor]:
    """(N, 1, 1) of each view: one derivative a sample, of the mean over the samples."""
    return [part.view(-1, 1, 1) / len(part) for part in rows.chunk(views)]


class Losses(NamedTuple):
    """Of a head: losses and their derivatives, of each view, and the exact gradients of its parameters."""

    loss: Tensor  # mean
    rows: Tensor  # (N,) of each sample (2N of two views)
    derivatives: list[Tensor]  # (N, P, G) of each view, of the mean over the samples
    weight: Tensor
    bias: Tensor


@torch.no_grad()
def head_losses(
    head: Any,
    outputs: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    target: Tensor,
    layer_norm: bool,
    temperature: float,
    impl: str,
) -> Losses:
    """One view: cross entropy; two: the contrastive loss."""
    weight = head.weight.t()
    if len(outputs) == 2:
        (x, y), (x_tangent, y_tangent) = outputs, tangents
        rows, derivatives, pooled, delta = autograd.nt_xent_dual(
            x, y, x_tangent, y_tangent, weight, head.bias, None, None, temperature, impl
        )
    else:
        rows, derivatives, pooled, delta = autograd.cross_entropy_dual(
            outputs[0], tangents[0], weight, head.bias, target, None, None, layer_norm, impl
        )
    count = len(rows)
    split = [d / (count // len(outputs)) for d in derivatives.chunk(len(outputs))]
    return Losses(rows.mean(), rows, split, delta.t() @ pooled / count, delta.sum(0) / count)


# -- what a step refuses ----------------------------------------------------------------------------------------------


def refuse_tied(model: LocalMixer, groups: Sequence[Sequence[Any]]) -> None:
    """Blocks are updated one after the other, each by an optimizer of its own."""
    seen: set[Any] = set()
    for group in groups:
        for p in group:
            if p in seen:
                names = " and ".join(n for n, q in model.named_parameters(remove_duplicate=False) if q is p)
                raise ValueError(f"model's blocks and read-out must not share parameters, got one as {names}")
        seen.update(group)


def refuse_mixed(model: LocalMixer, views: Sequence[Tensor]) -> None:
    """The model is of one dtype, and x too, but where autocast is there to cast."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("step() takes gradients, which torch.inference_mode() has not: call it outside")
    names = {p.dtype: name for name, p in reversed(list(model.named_parameters()))}
    if len(names) > 1:
        found = " and ".join(f"{str(dtype)[6:]} ({name})" for dtype, name in names.items())
        raise TypeError(f"model's parameters must be of one dtype, got {found}: convert the whole model, .to(dtype)")
    for view in views:
        if view.dtype not in names and not checks.autocasts(view.device):
            expected = checks.dtype_of(next(model.parameters()))
            raise TypeError(f"x must be {expected} like the model's parameters, got {checks.dtype_of(view)}")
