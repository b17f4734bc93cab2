"""Batch Manhattan: steps of the sign of the mini-batch gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..core import checks, constructors
from ..core.whole import is_sharded

__all__ = ["BatchManhattan"]

_NSC_MAGNITUDE = 1e-10


class BatchManhattan(torch.optim.Optimizer):
    r"""SGD on the sign of the gradient, the optimizer that sign-symmetric feedback was introduced with.

    .. math:: g = \mathrm{sign}(\nabla W) + \lambda W, \quad v \leftarrow \mu v + g, \quad W \leftarrow W - \eta v

    sign(0) = 0; weight decay is added after the sign. The gradient is that of the whole mini-batch, so with
    accumulation call ``step`` once after the last part; its scale does not matter.

    Args:
        params (iterable): parameters or parameter groups.
        lr (float): :math:`\eta`.
        momentum (float): :math:`\mu`. Default: 0.
        weight_decay (float): :math:`\lambda`. Default: 0.
        no_sign_change (bool): a weight whose sign the step would flip, or that would become 0, is set to 1e-10 with
            the sign that it had (0 counts as +). Parameters of one dimension (biases, normalisation) are excluded.
            Not for float16, where 1e-10 is 0 and ends the feedback. Default: False.

    Raises: ValueError, TypeError naming the argument.

    Source: Liao, Leibo, Poggio, "How Important is Weight Symmetry in Backpropagation?", AAAI 2016; the code of Xiao
    et al., ICLR 2019.

    Example:
        >>> import torch
        >>> from lgkernels.optim import BatchManhattan
        >>> weight = torch.nn.Parameter(torch.tensor([[0.1, -0.2, 0.3]]))
        >>> optimizer = BatchManhattan([weight], lr=0.15, no_sign_change=True)
        >>> weight.grad = torch.tensor([[7.0, 0.0, -0.01]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 1.0000e-10, -2.0000e-01,  4.5000e-01]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        no_sign_change: bool = False,
    ) -> None:
        params = constructors.parameters("params", params)
        super().__init__(
            params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, no_sign_change=no_sign_change)
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        constructors.instance("param_group", param_group, dict, "a dict")
        group = {**self.defaults, **param_group}
        checks.positive("lr", checks.item(group["lr"]))
        checks.between("momentum", checks.item(group["momentum"]), 0.0, 1.0)
        constructors.not_negative("weight_decay", checks.item(group["weight_decay"]))
        checks.boolean("no_sign_change", group["no_sign_change"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["no_sign_change"]:
            for p in group["params"]:
                if p.dtype == torch.float16 and p.dim() > 1:
                    raise ValueError(
                        "no_sign_change keeps weights of +-1e-10, which float16 rounds to 0: use float32 "
                        f"or bfloat16 weights, got float16 of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over the parameters that have a gradient. `closure`, as torch's, re-evaluates the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Any], group: dict[str, Any]) -> None:
        for p in params:
            if p.grad.is_sparse:
                raise ValueError(f"BatchManhattan takes dense gradients, got a sparse one of shape {tuple(p.shape)}")
        grads = [p.grad for p in params]
        # Sharded ones one by one: a DTensor of torch 2.10 has no _foreach_sign.
        steps: Any = [g.sign() for g in grads] if any(map(is_sharded, grads)) else torch._foreach_sign(grads)
        if group["weight_decay"]:
            torch._foreach_add_(steps, params, alpha=group["weight_decay"])
        if group["momentum"]:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = buffers
        held = [p for p in params if p.dim() > 1] if group["no_sign_change"] else []
        negative = [p < 0 for p in held]
        torch._foreach_add_(params, steps, alpha=-group["lr"])
        for p, was_negative in zip(held, negative):
            smallest = torch.where(was_negative, -_NSC_MAGNITUDE, _NSC_MAGNITUDE).to(p.dtype)
            p.copy_(torch.where(torch.where(was_negative, p < 0, p > 0), p, smallest))
