"""BP-modified local losses: every local gradient is corrected by an offset that back-propagation refreshes at times.

    refresh at tau:  Delta_h = bp_coef G_h^BP - local_coef G_h^loc           (means over one offset batch)
    steps after it:  g_h = local_scale dl_h/dw_h + offset_scale Delta_h      (then weight decay, momentum, step)

Source: Ren, Li, "BP-modified local loss" (ICLR 2025). There is no public code: that the offset is additive, per
parameter, averaged over small mini-batches and reused for a period is known; where exactly the two factors stand, and
that the offset enters before momentum, is our reconstruction, so each of the four coefficients is a setting.
"""

import contextlib
import os
import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core import checks
from ..ops.offset import op as _op

COEFFICIENTS = ("local_scale", "offset_scale", "bp_coef", "local_coef")


def refresh_due(step, period, first_period=None):
    """Whether to refresh before step `step` (from 0): at 0, then every `period` steps; with `first_period`, an extra
    short period first (adapters start with a factor 0, so the first offset of the other factor is 0)."""
    if first_period is None or step < first_period:
        return step % (period if first_period is None else first_period) == 0
    return (step - first_period) % period == 0


def _losses(result):
    return [result] if isinstance(result, torch.Tensor) else result


def _global_losses(result):
    for loss in _losses(result):
        if not loss.requires_grad:
            raise ValueError(
                "bp_closure must return a loss that depends on a parameter, got one without gradient: do "
                "not detach it or compute it under torch.no_grad, and freeze no parameter on its way"
            )
        yield loss


def _gradients(result, parameters):
    """{parameter: gradient} of the sum of losses; ``p.grad`` is None again."""
    for loss in _losses(result):
        if loss.requires_grad:
            loss.backward(inputs=parameters)
    grads = {p: p.grad for p in parameters if p.grad is not None}
    for p in grads:
        p.grad = None
    return grads


def _inner_products(a, b, parameters):
    """float64 tensor: |a|^2, <a, b>, |b|^2 over the parameters of a; what b lacks is 0."""
    sums = torch.zeros(3, dtype=torch.float64)
    for p in parameters:
        pairs = [
            (x[p].double().flatten(), y[p].double().flatten()) if p in x and p in y else None
            for x, y in ((a, a), (a, b), (b, b))
        ]
        sums += torch.tensor([0.0 if pair is None else torch.dot(*pair).item() for pair in pairs], dtype=torch.float64)
    return sums


def _chunks(data, size):
    """(weight, tensors) of consecutive chunks: the weights are the chunks' shares of the batch."""
    batch = len(data[0])
    for start in range(0, batch, size):
        part = tuple(t[start : start + size] for t in data)
        yield len(part[0]) / batch, part


@contextlib.contextmanager
def _untouched(model, batch_norm):
    """Restores buffers, modes and random state bit for bit."""
    modules = (
        []
        if model is None
        else [m for root in ([model] if isinstance(model, nn.Module) else model) for m in root.modules()]
    )
    names = [(m, dict(m._buffers)) for m in modules]  # a forward may put another tensor in a buffer's place
    buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
    modes = [(m, m.training) for m in modules]
    devices = {b.device for b, _ in buffers} | {p.device for m in modules for p in m.parameters(recurse=False)}
    try:
        with torch.random.fork_rng([d.index for d in devices if d.type == "cuda"]):
            if batch_norm == "eval":
                for m in modules:
                    if isinstance(m, _BatchNorm):
                        m.eval()
            yield
    finally:
        for m, training in modes:
            m.training = training
        for m, own in names:
            m._buffers.clear()
            m._buffers.update(own)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _no_float16(device):
    """Switches off an autocast whose gradients would want a loss scale."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class Offsets:
    """What `OffsetSGD` and `OffsetOptimizer` share: coefficients, and the refresh."""

    def _offset(self, p):
        raise NotImplementedError

    def _set_offset(self, p, offset):
        raise NotImplementedError

    def _local_coef(self, group):
        return group["local_scale"] if group["local_coef"] is None else group["local_coef"]

    def offsets(self):
        """[(parameter, its offset)] of the parameters that have one."""
        pairs = [(p, self._offset(p)) for group in self.param_groups for p in group["params"]]
        return [(p, offset) for p, offset in pairs if offset is not None]

    def refresh(
        self,
        bp_closure,
        local_closure,
        data,
        *,
        bp_chunk=8,
        local_chunk=64,
        model=None,
        batch_norm="train",
        estimate_local_scale=False,
        estimate_offset_scale=False,
        max_growth=None,
        average=None,
    ):
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
        checks.positive_integer("bp_chunk", bp_chunk)
        checks.positive_integer("local_chunk", local_chunk)
        checks.choice("batch_norm", batch_norm, ("train", "eval"))
        data = (data,) if isinstance(data, torch.Tensor) else tuple(data)
        if not data or any(len(t) != len(data[0]) for t in data) or not len(data[0]):
            raise ValueError(
                f"data must be tensors of one and the same length above 0, got lengths {[len(t) for t in data]}"
            )
        if max_growth is not None:
            checks.positive("max_growth", max_growth)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("refresh takes gradients, which torch.inference_mode forbids: call it outside")
        groups = self.param_groups
        parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        if not parameters:
            raise ValueError(
                "param_groups must hold a parameter that requires a gradient to refresh its offset, got "
                "none: all are frozen"
            )
        before = [group.pop("dropped_norm", None) or self._norm(group["params"]) for group in groups]
        gradients = [(p, p.grad) for p in parameters]
        for p in parameters:
            self._set_offset(p, None)  # one buffer a parameter, not two
            p.grad = None
        try:
            with _untouched(model, batch_norm), torch.enable_grad(), _no_float16(parameters[0].device.type):
                if estimate_local_scale or estimate_offset_scale:
                    self._estimate(
                        bp_closure,
                        local_closure,
                        data,
                        bp_chunk,
                        parameters,
                        average,
                        estimate_local_scale,
                        estimate_offset_scale,
                    )
                else:
                    self._accumulate(
                        bp_closure, local_closure, _chunks(data, bp_chunk), _chunks(data, local_chunk), parameters
                    )
                    if average is not None:
                        average([p.grad for p in parameters if p.grad is not None])
            offsets = [(p, p.grad) for p in parameters]
        finally:
            for p, grad in gradients:
                p.grad = grad
        if not all(torch.isfinite(o).all() for _, o in offsets if o is not None):
            raise RuntimeError(
                "refresh: an offset is not finite; training goes on without offsets. The global loss or "
                "a local one has diverged: try a shorter period or a smaller offset_scale"
            )
        for p, offset in offsets:
            self._set_offset(p, offset)
        if max_growth is not None:
            self._guard(before, max_growth)

    def _accumulate(self, bp_closure, local_closure, bp_chunks, local_chunks, parameters):
        """p.grad <- bp_coef G_bp - local_coef G_loc, for the parameters that the global loss reaches."""
        for weight, chunk in bp_chunks:
            for loss in _global_losses(bp_closure(*chunk)):
                (loss * weight).backward(inputs=parameters)
        reached = {id(p) for p in parameters if p.grad is not None}
        corrected = []  # groups with a local part: divided by its coefficient now, multiplied afterwards
        for group in self.param_groups:
            grads, coefficient = [p.grad for p in group["params"] if id(p) in reached], self._local_coef(group)
            if not grads:
                continue
            # a part so small is lost in rounding, and one over its coefficient may not be finite
            local = local_closure is not None and abs(coefficient) > 1e-20 * abs(group["bp_coef"])
            factor = group["bp_coef"] / (coefficient if local else 1.0)
            if factor != 1:
                torch._foreach_mul_(grads, factor)
            if local:
                corrected.append((grads, coefficient, [p for p in group["params"] if id(p) in reached]))
        inputs = [p for _, _, members in corrected for p in members]
        if inputs:
            for weight, chunk in local_chunks:
                for loss in _losses(local_closure(*chunk)):
                    if loss.requires_grad:
                        (loss * -weight).backward(inputs=inputs)
            for grads, coefficient, _ in corrected:
                if coefficient != 1:
                    torch._foreach_mul_(grads, coefficient)

    def _estimate(self, bp_closure, local_closure, data, size, parameters, average, local_scale, offset_scale):
        """As `_accumulate`, chunk by chunk, with the chunks' inner products, whose spread gives the estimates."""
        if len(data[0]) % size or len(data[0]) == size:
            raise ValueError(
                f"data must hold at least two whole chunks of bp_chunk={size} to estimate a scale, got "
                f"{len(data[0])} samples"
            )
        count, total = len(data[0]) // size, {}
        # |L|^2, <L, l>, |l|^2 of the gradients: means over the chunks
        products = [torch.zeros(3, dtype=torch.float64) for _ in self.param_groups]
        for _, chunk in _chunks(data, size):
            both = [_gradients(_global_losses(bp_closure(*chunk)), parameters)]
            both.append({} if local_closure is None else _gradients(local_closure(*chunk), list(both[0])))
            for i, group in enumerate(self.param_groups):
                products[i] = products[i] + _inner_products(*both, group["params"]) / count
            for mean, grads in zip((total.setdefault(k, {}) for k in ("bp", "local")), both):
                for p, g in grads.items():
                    mean[p] = mean[p].add_(g, alpha=1 / count) if p in mean else g.div_(count)
        if average is not None:
            products = torch.stack(products).to(parameters[0].device)
            count *= average([products, *(g for mean in total.values() for g in mean.values())])
            products = products.cpu()
        for i, group in enumerate(self.param_groups):
            biased = _inner_products(total["bp"], total["local"], group["params"])
            noise = (products[i] - biased) / (count - 1)  # of the means over all chunks
            (_, along, square), bp_coef = (biased - noise).tolist(), group["bp_coef"]
            if local_scale and square > 0:
                group["local_scale"] = max(along / square, 0.0)
            local_coef = self._local_coef(group)
            factors = torch.tensor([bp_coef**2, -2 * bp_coef * local_coef, local_coef**2], dtype=torch.float64)
            noise, signal = (max((factors * v).sum().item(), 0.0) for v in (noise, biased - noise))
            if offset_scale:
                group["offset_scale"] = signal / (signal + noise) if signal + noise else 0.0
            for p in group["params"]:
                if p in total["bp"]:
                    p.grad = total["bp"][p].mul_(bp_coef)
                    if p in total["local"]:
                        p.grad.sub_(total["local"][p], alpha=local_coef)

    def _norm(self, params):
        offsets = [self._offset(p) for p in params]
        return sum(float(o.double().square().sum()) for o in offsets if o is not None) ** 0.5

    def _guard(self, before, max_growth):
        for i, (group, old) in enumerate(zip(self.param_groups, before)):
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

    def __init__(self, optimizers):
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        self._owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}

    def _offset(self, p):
        return self._owners[p]._offset(p)

    def _set_offset(self, p, offset):
        self._owners[p]._set_offset(p, offset)


def refresh_offsets(optimizers, bp_closure, local_closure, data, **options):
    """One refresh for several optimizers, of a block each, say: the arguments of :meth:`OffsetSGD.refresh`."""
    optimizers = list(optimizers)
    for i, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Offsets):
            raise TypeError(f"optimizers[{i}] must be an OffsetSGD or OffsetOptimizer, got {type(optimizer).__name__}")
    _Joint(optimizers).refresh(bp_closure, local_closure, data, **options)


def check_group(values, where=""):
    """The numbers among a group's `values`; `where` names it in messages."""
    for name in COEFFICIENTS:
        if name in values and not (name == "local_coef" and values[name] is None):
            checks.number(where + name, checks.item(values[name]))
    for name in ("lr", "momentum", "weight_decay"):
        if name in values:
            checks.number(where + name, checks.item(values[name]))
            if values[name] < 0:
                raise ValueError(f"{where}{name} must be at least 0, got {values[name]}")


class OffsetSGD(Offsets, torch.optim.Optimizer):
    """SGD, torch's momentum and weight decay, on ``local_scale * grad + offset_scale * offset``.

    Args:
        params (iterable): parameters, or groups: one group a block gives every block its own coefficients.
        lr (float), momentum (float), weight_decay (float): as ``torch.optim.SGD``.
        local_scale (float): lambda, factor of the local gradient.
        offset_scale (float): alpha, factor of the offset.
        bp_coef, local_coef (float): of the two gradients in the offset; ``local_coef`` None: ``local_scale``.
        offset_dtype (torch.dtype, optional): ``torch.bfloat16`` halves the offsets' memory; default: the parameter's.

    The offset enters before momentum: it is the gradient of the linear tilt <offset, w>. Before the first
    ``refresh`` there is none. Offsets are in ``state_dict``. A step is one pass over all tensors of a group, and checks
    every group before it changes any. To clip the modified gradient, call ``step(max_norm=...)``: torch's
    ``clip_grad_norm_`` sees the local gradient alone.

    Raises: ValueError, TypeError naming the argument.

    Example:
        >>> import torch
        >>> from lgkernels.optim import OffsetSGD
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = OffsetSGD([w], lr=0.1)
        >>> optimizer.refresh(lambda x: (w * x).mean(), lambda x: (w * 2).sum(), torch.full((16,), 5.0))
        >>> (w * 2).sum().backward()           # the local gradient is 2, the offset 5 - 2
        >>> optimizer.step()
        >>> w.data
        tensor([0.5000])
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0,
        weight_decay=0,
        *,
        local_scale=1.0,
        offset_scale=1.0,
        bp_coef=1.0,
        local_coef=None,
        offset_dtype=None,
    ):
        if offset_dtype not in (None, torch.bfloat16):
            raise TypeError(f"offset_dtype must be torch.bfloat16 or None, got {offset_dtype}")
        self.offset_dtype, self._plans = offset_dtype, {}
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            local_scale=local_scale,
            offset_scale=offset_scale,
            bp_coef=bp_coef,
            local_coef=local_coef,
        )
        check_group(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """As torch's."""
        if isinstance(param_group, dict):  # else torch's says so
            check_group(param_group, f"param_groups[{len(self.param_groups)}]: ")
        super().add_param_group(param_group)

    def _offset(self, p):
        return self.state[p].get("offset") if p in self.state else None

    def _set_offset(self, p, offset):
        self._plans.clear()
        if offset is None:
            self.state[p].pop("offset", None)
        else:
            self.state[p]["offset"] = offset if self.offset_dtype is None else offset.to(self.offset_dtype)

    def load_state_dict(self, state_dict):
        """As torch's. Offsets become ``offset_dtype``, if there is one."""
        super().load_state_dict(state_dict)
        for p in self.state:  # torch has cast them to the parameter's dtype
            self._set_offset(p, self._offset(p))

    def __getstate__(self):
        return {**super().__getstate__(), "offset_dtype": self.offset_dtype}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._plans = {}

    @torch.no_grad()
    def step(self, closure=None, *, max_norm=None):
        """One step over the parameters that have a gradient. `closure`, as torch's, re-evaluates the loss. `max_norm`:
        bound on the norm, over all groups, of what momentum gets without weight decay: local gradient plus offset."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip, work = 1.0 if max_norm is None else self._clip(max_norm), []
        for i, group in enumerate(self.param_groups):
            members = [(p, p.grad, self.state[p]) for p in group["params"] if p.grad is not None]
            factors = [float(group[name]) for name in ("lr", "momentum", "weight_decay")]
            factors += [float(group[name]) * clip for name in ("local_scale", "offset_scale")]
            memory = self._memory(factors, members)
            if memory is None or self._plans.get(i, (None,))[0] != memory:
                self._plans.pop(i, None)
                for member in members:
                    self._check(i, *member)
            work.append((i, factors, members))
        for i, factors, members in work:  # all were checked before any of them changes
            if i in self._plans:
                self._run(factors, *self._plans[i][1:])
            else:
                self._plan(i, factors, members)
        return loss

    def _clip(self, max_norm):
        """What torch's clip_grad_norm_ would multiply the modified gradient by."""
        checks.positive("max_norm", max_norm)
        norms = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    g, offset = p.grad * group["local_scale"], self._offset(p)
                    if offset is not None:
                        g.add_(offset, alpha=group["offset_scale"])
                    norms.append(torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)))
        total = torch.stack([n.to(norms[0]) for n in norms]).norm().item() if norms else 0.0
        return min(max_norm / (total + 1e-6), 1.0)

    @staticmethod
    def _memory(factors, members):
        """Where everything lies: as long as this is the same, the tables of addresses and the checks hold."""
        if torch.compiler.is_compiling() or any(g.layout != torch.strided for _, g, _ in members):
            return None
        return [(os.environ.get("LGKERNELS_IMPL"), not factors[1], not factors[4])] + [
            (
                id(p),
                p.data_ptr(),
                p.stride(),
                g.data_ptr(),
                g.stride(),
                g.dtype,
                *((id(t), t.data_ptr()) for t in (s.get("momentum_buffer"), s.get("offset")) if t is not None),
            )
            for p, g, s in members
        ]

    @staticmethod
    def _run(factors, steps, written, _):
        for kernels, table, device in steps:
            kernels.run(table, device, *factors)
        _op.changed(written)

    def _plan(self, i, factors, members):
        """A step, and what the next one can take over from it."""
        kinds, steps, written, kept = {}, [], [], []
        for member in members:  # by device, and by whether the kernels take them
            p = member[0]
            kinds.setdefault((p.device, p.dtype == torch.float32), []).append(member)
        for (device, _), some in kinds.items():
            params, grads, states = map(list, zip(*some))
            buffers = []
            if factors[1]:
                for p, state in zip(params, states):
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    buffers.append(state["momentum_buffer"])
            offsets = [state.get("offset") for state in states]
            kernels = _op.kernels_for(params, "auto")
            steps.append((kernels, _op.step(kernels, params, grads, buffers, offsets, *factors, 1.0), device))
            written, kept = written + params + buffers, kept + offsets
        memory = self._memory(factors, members)
        if memory is not None and all(table is not None for _, table, _ in steps):
            self._plans[i] = memory, steps, written, kept  # kept: an id belongs to one tensor while that is alive

    @staticmethod
    def _check(index, p, grad, state):
        if grad.layout != torch.strided:
            raise TypeError(
                f"param_groups[{index}]: a gradient is sparse ({grad.layout}); OffsetSGD takes dense "
                "gradients: make the layer's gradient dense (sparse=False)"
            )
        for name in ("offset", "momentum_buffer"):
            value = state.get(name)
            if value is None:
                continue
            if value.shape != p.shape or value.device != p.device:
                raise ValueError(
                    f"param_groups[{index}]: a state's {name} must have its parameter's shape "
                    f"{tuple(p.shape)} and device {p.device}, got {tuple(value.shape)} on {value.device}: "
                    "load a state_dict of this model"
                )
            if value.dtype != p.dtype and (name == "momentum_buffer" or value.dtype != torch.bfloat16):
                raise TypeError(
                    f"param_groups[{index}]: a state's {name} must be {p.dtype} like its parameter, got "
                    f"{value.dtype} (an offset may be bfloat16)"
                )
