"""The estimators that make no use of noise: back-propagation of global and local losses, the same through fixed random
weights (FA), and direct feedback (DFA), for LocalMixer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.forward_gradient import linear, norm

Finished = Callable[[int, dict[nn.Parameter, Tensor]], None]


def _through(value: Tensor, backward: Tensor) -> Tensor:
    """`value`, whose gradient goes to `backward` as well."""
    return value + (backward - backward.detach())


class _Backward:
    """Linear maps whose inputs get their gradients through fixed random weights; exact ones without `weights`."""

    def __init__(self, weights: list[Any] | None) -> None:
        self.weights = None if weights is None else iter(weights)

    def __call__(self, kind: str, module: Any, a: Tensor) -> Tensor:
        if self.weights is None:
            return linear(kind, module, a)
        weight = next(self.weights).materialize(module.weight.shape, a.device, a.dtype)
        value = linear(kind, module, a.detach())
        if not a.requires_grad:
            return value
        if kind == "token":
            return _through(value, torch.matmul(weight, a))
        if kind == "group":
            return _through(value, torch.einsum("...gc,gdc->...gd", a, weight))
        return _through(value, F.linear(a, weight))


def _head_loss(trainer: Any, block: Any, outputs: list[Tensor], target: Tensor, weights: Any) -> Tensor:
    """The mean of a block's loss, in the ordinary form: replicas change nothing in reverse mode."""
    pooled = [(norm(out) if trainer.model.head_norm else out).mean(1).flatten(1) for out in outputs]
    rows = torch.cat(pooled)
    h = _Backward(weights)("channel", block.head, rows)
    if len(outputs) == 1:
        return F.cross_entropy(h, target.long())
    q = h * h.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
    itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
    logits = (q @ q.detach().t() / trainer.temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(q), device=q.device).roll(len(q) // 2))


def _readout_loss(trainer: Any, features: Tensor, target: Tensor, weights: Any) -> Tensor:
    model = trainer.model
    trainer.output = _Backward(weights)("channel", model.readout, model.summary(features))
    loss = F.cross_entropy(trainer.output, target.long())
    trainer.output = trainer.output.detach()
    return loss


def _take(trainer: Any, part: int, found: dict[nn.Parameter, Tensor], finished: Finished) -> None:
    """Gradients of one block (or of the read-out, the last part) into `finished`, scaled as the trainer says."""
    model, gradients = trainer.model, {}
    owned = trainer.parameter_groups[part]
    last = part == len(model.blocks)
    head = set() if last else set(model.blocks[part].head.parameters())
    for parameter in owned:
        if parameter in found:
            factor = trainer.factors[1] if last else trainer.factors[0] if parameter in head else 1.0
            gradients[parameter] = found[parameter] * factor
    finished(part, gradients)


def _differentiate(loss: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    if not parameters or not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {p: g for p, g in zip(parameters, grads) if g is not None}


@torch.enable_grad()
def gradients(trainer: Any, views: list[Tensor], target: Tensor, finished: Finished) -> Tensor:
    """The losses; `finished(part, gradients)` is called for each block and the read-out, for a greedy estimator while
    no other block's activations live."""
    if trainer.estimator == "DFA":
        return _direct(trainer, views[0], target, finished)
    model, kind, noise = trainer.model, trainer.kind, trainer.noise
    count = len(model.blocks)
    losses: list[Tensor] = []
    total: Any = 0.0
    xs = views
    for b, block in enumerate(model.blocks):
        xs = [x.detach() for x in xs] if kind.greedy else xs
        weights = noise.of_block(noise.backward_weight, b) if kind.feedback else None
        outputs = [block(x, linear=_Backward(weights)) for x in xs]
        if kind.local:
            head = [noise.backward_head[b]] if kind.feedback else None
            loss = _head_loss(trainer, block, outputs, target, head)
            losses.append(loss.detach())
            if kind.greedy:
                _take(trainer, b, _differentiate(loss, trainer.parameter_groups[b]), finished)
            else:
                total = total + loss
            del loss
        xs = [out.flatten(-2) for out in outputs]
    features = outputs[0].detach() if kind.local else outputs[0]
    loss = _readout_loss(trainer, features, target, [noise.backward_head[count]] if kind.feedback else None)
    losses.append(loss.detach())
    if kind.greedy:
        _take(trainer, count, _differentiate(loss, trainer.parameter_groups[count]), finished)
    else:
        found = _differentiate(total + loss, [p for group in trainer.parameter_groups for p in group])
        for part in range(count + 1):
            _take(trainer, part, found, finished)
    return torch.stack(losses)


def _direct(trainer: Any, x: Tensor, target: Tensor, finished: Finished) -> Tensor:
    """Nokland's: the error of the read-out, (softmax - one-hot) / N, times a fixed random matrix stands for the
    gradient of every activity."""
    model, noise = trainer.model, trainer.noise
    activities: list[list[Tensor]] = []
    for block in model.blocks:
        activities.append([])
        y = x.detach()
        for i, (kind, module) in enumerate(block.stages()):
            y = block.grouped(y) if kind == "group" else y
            z = linear(kind, module, norm(y) if block.has_norm(i) else y)
            if block.bias_factor != 1 and kind != "group":
                z = z + (block.bias_factor - 1) * (module.bias.unsqueeze(1) if kind == "token" else module.bias)
            u = norm(z) + (block.grouped(x) if kind == "group" and block.token is not None else 0)
            activities[-1].append(F.relu(u))
            y = activities[-1][-1].detach()
        x = y.flatten(-2)
    loss = _readout_loss(trainer, y, target, None)
    count = len(model.blocks)
    _take(trainer, count, _differentiate(loss, trainer.parameter_groups[count]), finished)
    error = torch.softmax(trainer.output, 1)
    error = (error - F.one_hot(target.long(), error.shape[1])) / len(error)
    for b, block in enumerate(model.blocks):
        found: dict[nn.Parameter, Tensor] = {}
        for direct, (_, module), out in zip(noise.of_block(noise.direct, b), block.stages(), activities[b]):
            matrix = direct.materialize((error.shape[1], out.shape[1:].numel()), error.device, error.dtype)
            own = [p for p in module.parameters() if p.requires_grad]
            if not own:
                continue
            signal = (error @ matrix).view(out.shape)
            found.update(zip(own, torch.autograd.grad(out, own, signal)))
        _take(trainer, b, found, finished)
    return torch.stack([loss.detach()])
