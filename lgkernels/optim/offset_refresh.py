"""BP-modified local losses: every local gradient is corrected by an offset that back-propagation refreshes at times.

    refresh at tau:  Delta_h = bp_coef G_h^BP - local_coef G_h^loc           (means over one offset batch)
    steps after it:  g_h = local_scale dl_h/dw_h + offset_scale Delta_h      (then weight decay, momentum, step)

This file makes the offsets; :mod:`lgkernels.optim.offset` and :mod:`lgkernels.optim.offset_wrapper` step with them.

Source: Ren, Li, "BP-modified local loss" (ICLR 2025). There is no public code. The paper says that the offset is
additive, per parameter, averaged over small mini-batches and reused for a period. Where exactly the two factors stand,
and that the offset enters before momentum, is our reconstruction, so each of the four coefficients is a setting.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..core import checks, constructors, float64
from .untouched import no_float16, untouched

__all__ = ["refresh_due", "refresh_offsets"]

Group = dict[str, Any]
Losses = torch.Tensor | Iterable[torch.Tensor]
Gradients = dict[torch.Tensor, torch.Tensor]


def refresh_due(step: int, period: int, first_period: int | None = None) -> bool:
    """Whether to refresh before step `step` (from 0): at 0, then every `period` steps; with `first_period`, an extra
    short period first (adapters start with a factor 0, so the first offset of the other factor is 0)."""
    constructors.size("step", step, 0)
    constructors.size("period", period)
    if first_period is not None:
        constructors.size("first_period", first_period)
    if first_period is None or step < first_period:
        return step % (period if first_period is None else first_period) == 0
    return (step - first_period) % period == 0


class _Refresh(NamedTuple):
    """What one refresh computes its offsets from: the arguments of :meth:`Offsets.refresh`, checked."""

    bp_closure: Callable[..., Losses]
    local_closure: Callable[..., Losses] | None
    data: tuple[torch.Tensor, ...]
    bp_chunk: int
    local_chunk: int
    average: Callable[[list[torch.Tensor]], int] | None
    parameters: list[torch.Tensor]


class Offsets:
    """What `OffsetSGD` and `OffsetOptimizer` share: coefficients, and the refresh."""

    param_groups: list[Group]

    def _offset(self, p: torch.Tensor) -> torch.Tensor | None:
        raise NotImplementedError

    def _set_offset(self, p: torch.Tensor, offset: torch.Tensor | None) -> None:
        raise NotImplementedError

    def offsets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(parameter, its offset)] of the parameters that have one."""
        pairs = [(p, self._offset(p)) for group in self.param_groups for p in group["params"]]
        return [(p, offset) for p, offset in pairs if offset is not None]

    def refresh(
        self,
        bp_closure: Callable[..., Losses],
        local_closure: Callable[..., Losses] | None,
        data: torch.Tensor | Sequence[torch.Tensor],
        *,
        bp_chunk: int = 8,
        local_chunk: int = 64,
        model: nn.Module | Iterable[nn.Module] | None = None,
        batch_norm: Literal["train", "eval"] = "train",
        estimate_local_scale: bool = False,
        estimate_offset_scale: bool = False,
        max_growth: float | None = None,
        average: Callable[[list[torch.Tensor]], int] | None = None,
    ) -> None:
        """Recompute the offsets on `data`. Weights, momentum, gradients, buffers and random state stay bit-identical.

        Both passes accumulate with opposite signs into one buffer per parameter. A parameter that the global loss does
        not reach (an auxiliary head) gets no offset. Within float16 autocast it runs in float32, where small gradients
        need no loss scale.

        Args:
            bp_closure (callable): chunk -> the global loss, mean over the chunk, differentiable through all blocks.
            local_closure (callable): chunk -> the local losses: one loss, or an iterable of them. Each is
                differentiated before the next is asked for: a generator that detaches between blocks holds the graph of
                one block at a time. None: no local part (the stale-gradient mix).
            data (tuple of Tensors): the offset batch; closures are called with slices of all of them.
            bp_chunk, local_chunk (int): samples a call. Local losses that are no means over samples (contrastive,
                similarity, batch normalisation) want the training batch size.
            model (nn.Module or iterable, optional): whose buffers and modes are restored; needed where it has any.
            batch_norm (str): ``"train"``: as the modes are; ``"eval"``: normalise by the running statistics.
            estimate_local_scale (bool): set every group's ``local_scale`` to the estimate of the value that makes the
                offset smallest, <E grad L, E grad l> / |E grad l|^2, at least 0.
            estimate_offset_scale (bool): set every group's ``offset_scale`` to the estimate of its best value,
                |b|^2 / (|b|^2 + tr S / B'). Both from the spread of the chunks, all of ``bp_chunk`` samples, and with
                three more buffers.
            max_growth (float, optional): a group whose offset's norm exceeds this factor times that of the refresh
                before (dropped or not) loses its offset until the next refresh, with a warning: the sign of too long a
                period.
            average (callable, optional): for data parallelism: makes each of a list of tensors its mean over the ranks
                and returns their number. The same offsets, estimates and decisions then on every rank.

        Raises: ValueError, TypeError naming the argument; RuntimeError where an offset is not finite (all are dropped),
        and in ``torch.inference_mode``.
        """
        bp_chunk = constructors.size("bp_chunk", bp_chunk)
        local_chunk = constructors.size("local_chunk", local_chunk)
        if model is not None and not isinstance(model, nn.Module):
            model = constructors.several("model", model, nn.Module, "torch.nn.Modules", 0)
        constructors.flags(estimate_local_scale=estimate_local_scale, estimate_offset_scale=estimate_offset_scale)
        checks.choice("batch_norm", batch_norm, ("train", "eval"))
        data = _offset_batch(data)
        if max_growth is not None:
            max_growth = constructors.bound_on_norm("max_growth", max_growth)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("refresh takes gradients, which torch.inference_mode forbids: call it outside")
        parameters = self._trainable()
        for name, closure in (("bp_closure", bp_closure), ("local_closure", local_closure), ("average", average)):
            if closure is not None or name == "bp_closure":
                constructors.function(name, closure)
        what = _Refresh(bp_closure, local_closure, data, bp_chunk, local_chunk, average, parameters)

        norms = [group.pop("dropped_norm", None) or self._norm(group["params"]) for group in self.param_groups]
        gradients = [(p, p.grad) for p in parameters]
        for p in parameters:
            self._set_offset(p, None)  # one buffer a parameter, not two
            p.grad = None
        try:
            with untouched(model, batch_norm), torch.enable_grad(), no_float16(parameters[0].device.type):
                if estimate_local_scale or estimate_offset_scale:
                    self._estimate(what, estimate_local_scale, estimate_offset_scale)
                else:
                    self._accumulate(what)
            offsets = [(p, p.grad) for p in parameters]
        finally:
            for p, grad in gradients:
                p.grad = grad

        if not all(torch.isfinite(offset).all() for _, offset in offsets if offset is not None):
            raise RuntimeError(
                "refresh: an offset is not finite; training goes on without offsets. The global loss or "
                "a local one has diverged: try a shorter period or a smaller offset_scale"
            )
        for p, offset in offsets:
            self._set_offset(p, offset)
        if max_growth is not None:
            self._drop_grown(norms, max_growth)

    # -- the offsets, left in p.grad -------------------------------------------------------------------------------

    def _accumulate(self, what: _Refresh) -> None:
        """p.grad <- bp_coef G_bp - local_coef G_loc, for the parameters that the global loss reaches.

        One buffer holds both parts: it is divided by local_coef between the passes and multiplied by it at the end.
        """
        for weight, chunk in _chunks(what.data, what.bp_chunk):
            for loss in _global_losses(what.bp_closure(*chunk)):
                (loss * weight).backward(inputs=what.parameters)
        reached = {id(p) for p in what.parameters if p.grad is not None}
        corrected: list[tuple[list[torch.Tensor], float]] = []  # (parameters with a local part, its coefficient)
        for group in self.param_groups:
            params, coefficient = [p for p in group["params"] if id(p) in reached], _local_coef(group)
            if not params:
                continue
            # a part so small is lost in rounding, and one over its coefficient may not be finite
            local = what.local_closure is not None and abs(coefficient) > 1e-20 * abs(group["bp_coef"])
            _multiply_gradients(params, group["bp_coef"] / (coefficient if local else 1.0))
            if local:
                corrected.append((params, coefficient))
        inputs = [p for params, _ in corrected for p in params]
        if what.local_closure is not None and inputs:
            for weight, chunk in _chunks(what.data, what.local_chunk):
                for loss in _losses(what.local_closure(*chunk)):
                    if loss.requires_grad:
                        (loss * -weight).backward(inputs=inputs)
            for params, coefficient in corrected:
                _multiply_gradients(params, coefficient)
        if what.average is not None:
            what.average([p.grad for p in what.parameters if p.grad is not None])

    def _estimate(self, what: _Refresh, local_scale: bool, offset_scale: bool) -> None:
        r"""As :meth:`_accumulate`, and the scales asked for, from the spread of n chunks of the offset batch.

        For the gradients G_k of the global and g_k of the local losses of chunk k, of one group, and their means over
        the chunks, every inner product of two means has the noise of the chunks in it:

            noise(x, y)   = (mean_k <x_k, y_k> - <mean x, mean y>) / (n - 1)
            product(x, y) = <mean x, mean y> - noise(x, y)                     without bias: <E x, E y>

        With them, c = bp_coef and, after the first line, l = local_coef:

            local_scale   = product(G, g) / product(g, g), at least 0
            |b|^2         = c^2 product(G, G) - 2 c l product(G, g) + l^2 product(g, g), at least 0
            tr S / B'     = the same of noise
            offset_scale  = |b|^2 / (|b|^2 + tr S / B')
        """
        bp, local, products, count = self._means_and_products(what)
        for group, mean_of_products in zip(self.param_groups, products):
            product_of_means = _inner_products(bp, local, group["params"])
            noise = (mean_of_products - product_of_means) / (count - 1)
            product = product_of_means - noise
            _, along, square = product.tolist()
            if local_scale and square > 0:
                group["local_scale"] = max(along / square, 0.0)
            bp_coef, local_coef = group["bp_coef"], _local_coef(group)
            if offset_scale:
                factors = torch.tensor(
                    [bp_coef**2, -2 * bp_coef * local_coef, local_coef**2], dtype=torch.float64, device="cpu"
                )
                spread, signal = (max((factors * value).sum().item(), 0.0) for value in (noise, product))
                group["offset_scale"] = signal / (signal + spread) if signal + spread else 0.0
            for p in group["params"]:
                if p in bp:
                    p.grad = bp[p].mul_(bp_coef)
                    if p in local:
                        p.grad.sub_(local[p], alpha=local_coef)

    def _means_and_products(self, what: _Refresh) -> tuple[Gradients, Gradients, Iterable[torch.Tensor], int]:
        """Over the chunks (of all ranks): the mean global and local gradients; of each group the mean of |G|^2, <G, g>,
        |g|^2; the number of chunks."""
        samples, size = len(what.data[0]), what.bp_chunk
        if samples % size or samples == size:
            raise ValueError(
                f"data must hold at least two whole chunks of bp_chunk={size} to estimate a scale, got "
                f"{samples} samples"
            )
        count = samples // size
        bp: Gradients = {}
        local: Gradients = {}
        products = torch.zeros(len(self.param_groups), 3, dtype=torch.float64, device="cpu")
        for _, chunk in _chunks(what.data, size):
            bp_part = _gradients(_global_losses(what.bp_closure(*chunk)), what.parameters)
            local_part = {} if what.local_closure is None else _gradients(what.local_closure(*chunk), list(bp_part))
            for i, group in enumerate(self.param_groups):
                products[i] += _inner_products(bp_part, local_part, group["params"]) / count
            for mean, part in ((bp, bp_part), (local, local_part)):
                for p, g in part.items():
                    mean[p] = mean[p].add_(g, alpha=1 / count) if p in mean else g.div_(count)
        if what.average is not None:
            device = what.parameters[0].device
            products = products.to(device, torch.float32 if float64.lacks(device) else torch.float64)
            count *= what.average([products, *bp.values(), *local.values()])
        return bp, local, products.cpu().double(), count

    # -- helpers that know the groups --------------------------------------------------------------------------------

    def _trainable(self) -> list[torch.Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not parameters:
            raise ValueError(
                "param_groups must hold a parameter that requires a gradient to refresh its offset, got "
                "none: all are frozen"
            )
        return parameters

    def _norm(self, params: Iterable[torch.Tensor]) -> float:
        """Of the offsets of `params` together."""
        offsets = [self._offset(p) for p in params]
        return sum(float(float64.double(o).square().sum()) for o in offsets if o is not None) ** 0.5

    def _drop_grown(self, norms: Iterable[float], max_growth: float) -> None:
        """Drop the offset of each group whose norm is more than `max_growth` times what it was, from `norms`."""
        for i, (group, old) in enumerate(zip(self.param_groups, norms)):
            new = self._norm(group["params"])
            if old and new > max_growth * old:
                warnings.warn(
                    f"param_groups[{i}]: the offset grew from {old:.3g} to {new:.3g}, more than "
                    f"{max_growth} times: dropped for this period. A shorter period or a smaller "
                    "offset_scale is stable",
                    stacklevel=3,
                )
                group["dropped_norm"] = new  # what the next refresh compares with; in state_dict
                for p in group["params"]:
                    self._set_offset(p, None)


class _Joint(Offsets):
    """Several optimizers as one, for a refresh."""

    def __init__(self, optimizers: Iterable[Offsets]) -> None:
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        self._owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}

    def _offset(self, p: torch.Tensor) -> torch.Tensor | None:
        return self._owners[p]._offset(p)

    def _set_offset(self, p: torch.Tensor, offset: torch.Tensor | None) -> None:
        self._owners[p]._set_offset(p, offset)


def refresh_offsets(
    optimizers: Iterable[Offsets],
    bp_closure: Callable[..., Losses],
    local_closure: Callable[..., Losses] | None,
    data: torch.Tensor | Sequence[torch.Tensor],
    **options: Any,
) -> None:
    """One refresh for several optimizers, of a block each, say: the arguments of :meth:`OffsetSGD.refresh`."""
    optimizers = constructors.several("optimizers", optimizers, Offsets, "OffsetSGDs or OffsetOptimizers")
    _Joint(optimizers).refresh(bp_closure, local_closure, data, **options)


# -- losses and gradients ------------------------------------------------------------------------------------------


def _local_coef(group: Group) -> float:
    return group["local_scale"] if group["local_coef"] is None else group["local_coef"]


def _multiply_gradients(params: list[torch.Tensor], factor: float) -> None:
    if factor != 1:
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], factor)


def _losses(result: Losses) -> Iterable[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else result


def _global_losses(result: Losses) -> Iterator[torch.Tensor]:
    for loss in _losses(result):
        if not loss.requires_grad:
            raise ValueError(
                "bp_closure must return a loss that depends on a parameter, got one without gradient: do "
                "not detach it or compute it under torch.no_grad, and freeze no parameter on its way"
            )
        yield loss


def _gradients(result: Losses, parameters: list[torch.Tensor]) -> Gradients:
    """{parameter: gradient} of the sum of losses; ``p.grad`` is None again."""
    for loss in _losses(result):
        if loss.requires_grad:
            loss.backward(inputs=parameters)
    grads = {p: p.grad for p in parameters if p.grad is not None}
    for p in grads:
        p.grad = None
    return grads


def _inner_products(a: Gradients, b: Gradients, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """float64 tensor: |a|^2, <a, b>, |b|^2 over `parameters`; what one of them lacks counts as 0."""
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    for p in parameters:
        pairs = [
            (float64.double(x[p]).flatten(), float64.double(y[p]).flatten()) if p in x and p in y else None
            for x, y in ((a, a), (a, b), (b, b))
        ]
        sums += torch.tensor(
            [0.0 if pair is None else torch.dot(*pair).item() for pair in pairs], dtype=torch.float64, device="cpu"
        )
    return sums


# -- the offset batch ----------------------------------------------------------------------------------------------


def _offset_batch(data: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    data = (data,) if isinstance(data, torch.Tensor) else data
    data = tuple(constructors.several("data", data, torch.Tensor, "tensors"))
    for t in data:
        checks.tensor("data", t)
    lengths = [len(t) if t.dim() else 0 for t in data]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"data must be tensors of one and the same length above 0, got lengths {lengths}")
    return data


def _chunks(data: tuple[torch.Tensor, ...], size: int) -> Iterator[tuple[float, tuple[torch.Tensor, ...]]]:
    """(weight, tensors) of consecutive chunks: the weights are the chunks' shares of the batch."""
    batch = len(data[0])
    for start in range(0, batch, size):
        part = tuple(t[start : start + size] for t in data)
        yield len(part[0]) / batch, part
