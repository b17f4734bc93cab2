"""SGD on local gradients plus offsets: the optimizer of BP-modified local losses, see :mod:`.offset_refresh`."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import ParamsT

from ..core import checks, constructors
from ..ops.offset import op as _op
from .offset_refresh import Group, Offsets, refresh_due, refresh_offsets  # noqa: F401  as before

__all__ = ["OffsetSGD"]

COEFFICIENTS = ("local_scale", "offset_scale", "bp_coef", "local_coef")


def check_group(values: Mapping[str, Any], where: str = "") -> None:
    """Check the numbers among a group's `values`; `where` names the group in messages."""
    for name in COEFFICIENTS:
        if name in values and not (name == "local_coef" and values[name] is None):
            checks.number(where + name, checks.item(values[name]))
    for name in ("lr", "momentum", "weight_decay"):
        if name in values:
            constructors.not_negative(where + name, checks.item(values[name]))


class _Factors(NamedTuple):
    """The numbers of a group's step, in the order in which the op takes them."""

    lr: float
    momentum: float
    weight_decay: float
    local_scale: float
    offset_scale: float


class _Member(NamedTuple):
    """A parameter of a group that takes part in a step."""

    parameter: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]


class _Plan:
    """A group's step, as the next one may run it again: the backends' tables of addresses, already checked.

    It may be reused while `key` is what :func:`_key` gives for the step to come, that is, while every parameter,
    gradient, momentum buffer and offset is the same tensor at the same address with the same shape, strides and dtype,
    the same backends are chosen, and momentum and offset_scale are 0 or not as before. The factors themselves may
    change: each run takes them anew. A new offset drops all plans (:meth:`OffsetSGD._set_offset`).
    """

    def __init__(
        self, key: list, launches: list, written: list[torch.Tensor], offsets: list[torch.Tensor | None]
    ) -> None:
        self.key, self.launches, self.written = key, launches, written
        self.offsets = offsets  # kept alive: only so long does an id in the key belong to one tensor

    def run(self, factors: _Factors) -> None:
        for kernels, table, device in self.launches:
            kernels.run(table, device, *factors)
        _op.changed(self.written)


def _key(factors: _Factors, members: list[_Member]) -> list | None:
    """Where everything of a step lies; None where nothing can be reused. See :class:`_Plan`."""
    if torch.compiler.is_compiling() or any(grad.layout != torch.strided for _, grad, _ in members):
        return None
    choice = os.environ.get("LGKERNELS_IMPL"), os.environ.get("LGKERNELS_TRUST")
    places: list[tuple] = [(choice, not factors.momentum, not factors.offset_scale)]
    for p, grad, state in members:
        kept = [t for t in (state.get("momentum_buffer"), state.get("offset")) if t is not None]
        places.append(
            (
                id(p),
                p.data_ptr(),
                p.shape,
                p.stride(),
                p.dtype,
                grad.data_ptr(),
                grad.stride(),
                grad.dtype,
                *((id(t), t.data_ptr(), t.shape, t.stride(), t.dtype) for t in kept),
            )
        )
    return places


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
        params: ParamsT,
        lr: float,
        momentum: float = 0,
        weight_decay: float = 0,
        *,
        local_scale: float = 1.0,
        offset_scale: float = 1.0,
        bp_coef: float = 1.0,
        local_coef: float | None = None,
        offset_dtype: torch.dtype | None = None,
    ) -> None:
        params = constructors.parameters("params", params)
        if offset_dtype is not None and offset_dtype is not torch.bfloat16:
            raise TypeError(f"offset_dtype must be torch.bfloat16 or None, got {checks.got(offset_dtype)}")
        self.offset_dtype = offset_dtype
        self._plans: dict[int, _Plan] = {}  # by the group's number
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

    def add_param_group(self, param_group: Group) -> None:
        """As torch's."""
        if isinstance(param_group, dict):  # else torch's says so
            check_group(param_group, f"param_groups[{len(self.param_groups)}]: ")
        super().add_param_group(param_group)

    def _offset(self, p: torch.Tensor) -> torch.Tensor | None:
        return self.state[p].get("offset") if p in self.state else None

    def _set_offset(self, p: torch.Tensor, offset: torch.Tensor | None) -> None:
        self._plans.clear()
        if offset is None:
            self.state[p].pop("offset", None)
        else:
            self.state[p]["offset"] = offset if self.offset_dtype is None else offset.to(self.offset_dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Offsets become ``offset_dtype``, if there is one."""
        super().load_state_dict(state_dict)
        for p in self.state:  # torch has cast them to the parameter's dtype
            self._set_offset(p, self._offset(p))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "offset_dtype": self.offset_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """One step over the parameters that have a gradient. `closure`, as torch's, re-evaluates the loss. `max_norm`:
        bound on the norm, over all groups, of what momentum gets without weight decay: local gradient plus offset."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip = 1.0 if max_norm is None else self._clip(max_norm)
        steps = []
        for i, group in enumerate(self.param_groups):
            factors = _factors(group, clip)
            members = [_Member(p, p.grad, self.state[p]) for p in group["params"] if p.grad is not None]
            if i not in self._plans or self._plans[i].key != _key(factors, members):
                self._plans.pop(i, None)
                for member in members:
                    _check_member(i, member)
            steps.append((i, factors, members))
        for i, factors, members in steps:  # everything is checked before anything changes
            if i in self._plans:
                self._plans[i].run(factors)
            elif plan := _first_step(factors, members):
                self._plans[i] = plan
        return loss

    def _clip(self, max_norm: float) -> float:
        """What torch's clip_grad_norm_ would multiply the modified gradient by."""
        max_norm = constructors.bound_on_norm("max_norm", max_norm)
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


def _factors(group: Group, clip: float) -> _Factors:
    """Of a group; `clip` multiplies the modified gradient."""
    return _Factors(
        float(group["lr"]),
        float(group["momentum"]),
        float(group["weight_decay"]),
        float(group["local_scale"]) * clip,
        float(group["offset_scale"]) * clip,
    )


def _first_step(factors: _Factors, members: list[_Member]) -> _Plan | None:
    """Step, and return what the next step can reuse; None where a backend has nothing to run again."""
    launches = []
    written: list[torch.Tensor] = []
    kept: list[torch.Tensor | None] = []
    for some in _by_kernel(members):
        params, grads, states = [list(column) for column in zip(*some)]
        buffers = [_momentum_buffer(p, state) for p, state in zip(params, states)] if factors.momentum else []
        offsets = [state.get("offset") for state in states]
        step = params, grads, buffers, offsets, *factors, 1.0
        kernels = _op.trusted_kernels(*step)
        table = _op.step(kernels, *step)
        launches.append((kernels, table, params[0].device))
        written += params + buffers
        kept += offsets
    key = _key(factors, members)  # after the step, which may have made the momentum buffers
    if key is None or any(table is None for _, table, _ in launches):
        return None
    return _Plan(key, launches, written, kept)


def _by_kernel(members: list[_Member]) -> Iterable[list[_Member]]:
    """The members that one backend steps together: of one device, and all float32 (what the kernels take) or none."""
    kinds: dict[tuple, list[_Member]] = {}
    for member in members:
        p = member.parameter
        kinds.setdefault((p.device, p.dtype == torch.float32), []).append(member)
    return kinds.values()


def _momentum_buffer(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)
    return state["momentum_buffer"]


def _check_member(index: int, member: _Member) -> None:
    """Raises where the step cannot take a gradient or a loaded state."""
    p, grad, state = member
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
