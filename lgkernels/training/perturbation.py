"""Blocks of LocalMixer with a tangent beside every activation, and the gradients that come of it. No graph is recorded.

A pass leaves a tape: of each stage its layer, what it multiplied, and what stood before and behind the layer norm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.dual_layers import as_noise
from ..nn.forward_gradient import EPS, LocalMixer, LocalMixerBlock, linear
from ..ops.forward_gradient import autograd, layers
from ..random import RandomFeedback

Noise = Tensor | RandomFeedback


class Stage(NamedTuple):
    """What a stage of a block leaves for its gradient."""

    kind: str
    module: Any
    factor: float  # of the bias
    a: Tensor  # what the layer multiplies
    z: Tensor  # before the norm
    y: Tensor  # behind the ReLU
    noise: Any  # of the activity, or of weight and bias


def _bias(block: LocalMixerBlock, kind: str, bias: Tensor) -> Tensor:
    return bias if kind == "group" or block.bias_factor == 1 else bias * block.bias_factor


def _token(x: Tensor, x_tangent: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear map over the patches of (N, P, D)."""
    both = layers.halves(x, x_tangent)
    if both is not None:
        out = torch.matmul(weight, both)
        return out[0].add_(bias.unsqueeze(1)), out[1]
    y = torch.matmul(weight, x).add_(bias.unsqueeze(1))
    return y, None if x_tangent is None else torch.matmul(weight, x_tangent)


def _product(
    block: LocalMixerBlock, kind: str, module: Any, a: Tensor, a_tangent: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """z and its tangent; None: zero."""
    bias = _bias(block, kind, module.bias)
    if kind == "token":
        return _token(a, a_tangent, module.weight, bias)
    function = layers.dual_group_linear if kind == "group" else layers.dual_linear
    z, z_tangent = function(a, a_tangent, module.weight, bias)
    return z, None if a_tangent is None else z_tangent


def _moved(block: LocalMixerBlock, kind: str, a: Tensor, weight_tangent: Tensor, bias_tangent: Tensor) -> Tensor:
    """The tangent of z that tangents of weight and bias make."""
    bias = _bias(block, kind, bias_tangent)
    if kind == "token":
        return torch.matmul(weight_tangent, a).add_(bias.unsqueeze(1))
    if kind == "group":
        return layers.dual_group_linear(a, None, weight_tangent, bias)[0]
    return torch.nn.functional.linear(a, weight_tangent, bias)


@torch.no_grad()
def dual_block(
    block: LocalMixerBlock, x: Tensor, x_tangent: Tensor | None, noise: Sequence[Any], perturb: str, impl: str
) -> tuple[Tensor, Tensor | None, list[Stage]]:
    """`(out, its tangent, tape)` of x (N, P, channels).

    noise: of each stage a tensor or a formula shaped like its output for perturb="activities", a pair of tensors
    shaped like its parameters for "weights", anything for "nothing".
    """
    y, y_tangent = x, x_tangent
    tape = []
    for i, (kind, module) in enumerate(block.stages()):
        if kind == "group":
            y, y_tangent = block.grouped(y), None if y_tangent is None else block.grouped(y_tangent)
        a, a_tangent = y, y_tangent
        if block.has_norm(i):
            a, a_tangent = layers.dual_norm(y, y_tangent, None, layers.NO_NOISE, y.dim() - 1, EPS, False, impl)
        z, z_tangent = _product(block, kind, module, a, a_tangent)
        if perturb == "weights":
            moved = _moved(block, kind, a, *noise[i])
            z_tangent = moved if z_tangent is None else z_tangent.add_(moved)
        residual = block.grouped(x) if kind == "group" and block.token is not None else None
        u = as_noise(noise[i], z) if perturb == "activities" else layers.NO_NOISE
        if residual is not None and x_tangent is not None:  # it enters where the noise does
            added = block.grouped(x_tangent)
            if perturb == "activities":
                added = added + (noise[i].materialize(z.shape, z.device, z.dtype) if u[0] is None else noise[i])
            u = (added, *layers.NO_NOISE[1:])
        y, y_tangent = layers.dual_norm(z, z_tangent, residual, u, z.dim() - 1, EPS, True, impl)
        tape.append(Stage(kind, module, 1.0 if kind == "group" else block.bias_factor, a, z, y, noise[i]))
    return y, y_tangent, tape


def _patch_products(grad: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight (P, P) and bias (P,) of a layer over the patches, of grad and a (N, P, D)."""
    weight = torch.addbmm(grad.new_empty(()), grad, a.transpose(1, 2), beta=0)
    return weight, grad.sum((0, 2))


@torch.no_grad()
def activity_gradients(stage: Stage, coefficient: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a stage from the derivatives (N, P, G) along the noise of its activity; (N, 1, 1)
    where all patches and groups have one loss."""
    z = stage.z
    dim, u = z.dim() - 1, as_noise(stage.noise, z)
    if stage.kind == "group":
        q = coefficient.expand(z.shape[:-1]).unsqueeze(-1)
        return layers.activity_grads(stage.a, z, stage.y, q, u, dim, EPS, True, impl)
    q = coefficient.sum(2, keepdim=True) if stage.kind == "token" else coefficient
    q = q.expand(-1, z.shape[1], -1)
    if stage.kind == "channel":
        return layers.activity_grads(stage.a, z, stage.y, q, u, dim, EPS, False, impl)
    return _patch_products(torch.ops.lgkernels.activity_grad(z, stage.y, q, *u, dim, EPS, True, impl), stage.a)


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
        return linear(kind, module, a).add_(_moved(block, kind, a, weight * step, bias * step))

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
