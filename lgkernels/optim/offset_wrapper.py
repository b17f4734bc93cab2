"""BP-modified local losses with any torch optimizer: a wrapper that adds the offsets to the gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core import constructors
from ..core.whole import require_whole
from .offset import COEFFICIENTS, check_group
from .offset_refresh import Group, Offsets

__all__ = ["OffsetOptimizer"]


class OffsetOptimizer(Offsets, torch.optim.Optimizer):
    """Any torch optimizer on ``local_scale * grad + offset_scale * offset``; the rest as :class:`OffsetSGD`.

    ``step`` writes the modified gradient to ``p.grad`` and calls the optimizer's. The coefficients stand in
    its ``param_groups``, where each group may have its own. Learning-rate schedules take it as any optimizer. Other
    public attributes are the optimizer's: ``train()`` and ``eval()`` of a schedule-free one, say.

    Args:
        optimizer (torch.optim.Optimizer): e.g. Adam, whose second moments then contain the offset. LBFGS: without line
            search, which would compare losses that lack the offset's share.
        local_scale, offset_scale, bp_coef, local_coef: as :class:`OffsetSGD`.

    Example:
        >>> import torch
        >>> from lgkernels.optim import OffsetOptimizer
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = OffsetOptimizer(torch.optim.Adam([w], lr=0.1))
        >>> optimizer.refresh(lambda x: (w * x).mean(), None, torch.full((16,), 5.0))
        >>> len(optimizer.offsets())
        1
    """

    optimizer: torch.optim.Optimizer
    _table: dict[torch.Tensor, torch.Tensor]
    offset_changes = 0  # by which a recorded step knows that it is an old one

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        local_scale: float = 1.0,
        offset_scale: float = 1.0,
        bp_coef: float = 1.0,
        local_coef: float | None = None,
    ) -> None:
        constructors.optimizer("optimizer", optimizer)
        coefficients = dict(local_scale=local_scale, offset_scale=offset_scale, bp_coef=bp_coef, local_coef=local_coef)
        check_group(coefficients)
        for i, group in enumerate(optimizer.param_groups):
            check_group({name: group[name] for name in COEFFICIENTS if name in group}, f"param_groups[{i}]: ")
            require_whole("optimizer", group["params"], "OffsetOptimizer")
        # Not __init__: groups, state and defaults are the inner optimizer's. This makes the hooks.
        super().__setstate__({"optimizer": optimizer, "_table": {}})
        optimizer.defaults.update(coefficients)  # of groups that are added later
        for group in optimizer.param_groups:
            for name, value in coefficients.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "_table": self._table}

    def __getattr__(self, name: str) -> Any:
        """What only the optimizer has: the modes of a schedule-free one (``train()``, ``eval()``), say."""
        if name.startswith("_") or "optimizer" not in vars(self):  # private ones would promise GradScaler too much
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's."""
        return self.optimizer.defaults

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's."""
        return self.optimizer.state

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, on the optimizer."""
        if isinstance(param_group, dict):  # else torch's says so
            check_group(
                {name: param_group[name] for name in COEFFICIENTS if name in param_group},
                f"param_groups[{len(self.param_groups)}]: ",
            )
        self.optimizer.add_param_group(param_group)
        require_whole("params", self.param_groups[-1]["params"], "OffsetOptimizer")

    def _offset(self, p: torch.Tensor) -> torch.Tensor | None:
        return self._table.get(p)

    def _set_offset(self, p: torch.Tensor, offset: torch.Tensor | None) -> None:
        self.offset_changes += 1
        if offset is None:
            self._table.pop(p, None)
        else:
            self._table[p] = offset

    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """Modify the gradients, then step. `closure` re-evaluates the loss as often as the optimizer asks for it.
        `max_norm`: bound on the norm of the modified gradients of all groups."""
        if closure is None:
            self._modify(max_norm)
            return self.optimizer.step()

        def modified() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._modify(max_norm)
            return loss

        return self.optimizer.step(modified)

    @torch.no_grad()
    def _modify(self, max_norm: float | None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["local_scale"] != 1:
                torch._foreach_mul_([p.grad for p in params], group["local_scale"])
            tilted = [(p.grad, self._table[p]) for p in params if p in self._table]
            if tilted and group["offset_scale"]:
                torch._foreach_add_(*map(list, zip(*tilted)), alpha=group["offset_scale"])
        if max_norm is not None:
            max_norm = constructors.bound_on_norm("max_norm", max_norm)
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the offsets in the order of the parameters (None where there is none)."""
        offsets = [self._offset(p) for group in self.param_groups for p in group["params"]]
        return {"optimizer": self.optimizer.state_dict(), "offsets": offsets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        constructors.instance("state", state, dict, "a dict, that of state_dict()")
        if missing := [name for name in ("optimizer", "offsets") if name not in state]:
            raise ValueError(f"state must hold {', '.join(map(repr, missing))}, got a dict without")
        params = [p for group in self.param_groups for p in group["params"]]
        if len(state["offsets"]) != len(params):
            raise ValueError(f"state must hold {len(params)} offsets, one per parameter, got {len(state['offsets'])}")
        self.optimizer.load_state_dict(state["optimizer"])
        for p, offset in zip(params, state["offsets"]):
            self._set_offset(p, None if offset is None else offset.to(p.device, p.dtype).clone())
