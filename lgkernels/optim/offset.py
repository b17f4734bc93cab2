"""SGD on local gradients plus offsets: the optimizer of BP-modified local losses, see :mod:`.offset_refresh`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..core import checks, constructors
from ..core.kept import capturing
from ..core.whole import require_whole
from ..ops.offset import op as _op
from ..ops.offset.options import StepOptions
from .offset_plan import Launch, Member, Plan, States
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
        self._plans: dict[int, Plan] = {}  # by the group's number
        self._states: States | None = None  # under which they were made
        self.offset_changes = 0  # by which a recorded step knows that it is an old one
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
        require_whole("params", self.param_groups[-1]["params"], "OffsetSGD")

    def _offset(self, p: torch.Tensor) -> torch.Tensor | None:
        return self.state[p].get("offset") if p in self.state else None

    def _set_offset(self, p: torch.Tensor, offset: torch.Tensor | None) -> None:
        self._plans.clear()
        self.offset_changes += 1
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
        self._plans, self._states, self.offset_changes = {}, None, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """One step over the parameters that have a gradient. `closure`, as torch's, re-evaluates the loss. `max_norm`:
        bound on the norm, over all groups, of what momentum gets without weight decay: local gradient plus offset."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip = 1.0 if max_norm is None else self._clip(max_norm)
        if torch.compiler.is_compiling() or self._plans and not self._states.are(self.state):  # type: ignore[union-attr]
            self._plans.clear()
        steps: list[tuple[int, StepOptions, Plan | None, list[Member]]] = []
        for i, group in enumerate(self.param_groups):
            options, plan = _options(group, clip), self._plans.get(i)
            if plan is not None and plan.fits(options, group["params"]):
                steps.append((i, options, plan, []))
                continue
            self._plans.pop(i, None)
            members = [Member(p, p.grad, self.state[p]) for p in group["params"] if p.grad is not None]
            for member in members:
                _check_member(i, member)
            steps.append((i, options, None, members))
        for i, options, plan, members in steps:  # everything is checked before anything changes
            if plan is not None:
                plan.run(options)
            elif made := _first_step(options, self.param_groups[i]["params"], members):
                self._plans[i], self._states = made, None
        if self._states is None and self._plans:
            self._states = States(self.state)
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


def _options(group: Group, clip: float) -> StepOptions:
    """Of a group; `clip` multiplies the modified gradient."""
    return StepOptions(
        float(group["lr"]),
        float(group["momentum"]),
        float(group["weight_decay"]),
        float(group["local_scale"]) * clip,
        float(group["offset_scale"]) * clip,
    )


def _first_step(options: StepOptions, group: list[torch.Tensor], members: list[Member]) -> Plan | None:
    """Step, and return what the next step can reuse; None where a backend has nothing to run again."""
    launches = []
    for places in _by_kernel(members):
        params, grads, states = [list(column) for column in zip(*(members[i] for i in places))]
        buffers = [_momentum_buffer(p, state) for p, state in zip(params, states)] if options.momentum else []
        offsets = [state.get("offset") for state in states]
        step = params, grads, buffers, offsets, options
        kernels = _op.trusted_kernels(*step)
        table = _op.step(kernels, *step)
        launches.append(Launch(kernels, table, params[0].device, places))
    if not launches or torch.compiler.is_compiling() or any(launch.table is None for launch in launches):
        return None
    return Plan(options, group, members, launches)  # after the step, which may have made the momentum buffers


def _by_kernel(members: list[Member]) -> Iterable[list[int]]:
    """Places of the members that one backend steps together: of one device, and all float32 (what the kernels take) or
    none."""
    kinds: dict[tuple, list[int]] = {}
    for i, member in enumerate(members):
        p = member.parameter
        kinds.setdefault((p.device, p.dtype == torch.float32), []).append(i)
    return kinds.values()


def _momentum_buffer(p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    if "momentum_buffer" not in state:
        if capturing(p.device):  # each replay would make it zero again
            raise RuntimeError(
                "the first step of OffsetSGD must not be captured in a CUDA graph, since it makes momentum buffers: "
                "take a step before the capture"
            )
        state["momentum_buffer"] = torch.zeros_like(p)
    return state["momentum_buffer"]


def _check_member(index: int, member: Member) -> None:
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
