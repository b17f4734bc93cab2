"""Zeroth-order optimization: steps along noise by formula, from values of the loss alone."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from ..core import checks, constructors, names
from ..core.ops import require_no_overlap
from ..core.whole import require_whole
from ..nn.random_state import name_without_wrappers
from ..random import VALUES_PER_CALL
from .zeroth_order_log import ZerothOrderLog, stream_of, update_
from .zeroth_order_passes import Perturbed
from .zeroth_order_repeat import Buffers, Place, Randomness
from .zeroth_order_sight import places, require_places, require_use

__all__ = ["ZerothOrder"]

_ESTIMATORS = ("two-sided", "one-sided", "forward-gradient")
_KEY = "zeroth_order"


class ZerothOrder(torch.optim.Optimizer):
    r"""Tunes any model by values of any loss, also one without a derivative, at the memory of inference.

    .. math::
        g_m = \frac{L(W + \epsilon Z_m) - L(W - \epsilon Z_m)}{2 \epsilon}, \qquad
        W \leftarrow (1 - \eta \lambda)\, W - \frac{\eta}{M} \sum_{m=1}^{M} g_m Z_m

    The noise Z has mean 0 and variance 1 and is a formula of (seed, parameter's name, step, member): it is made where
    it is used and never stored. No weight is perturbed in place: linear layers, convolutions and embeddings run at the
    perturbed weight by functions of their own (:func:`lgkernels.functional.perturbed_linear`), every other function of
    torch takes a perturbed copy of its parameter while it runs. So code that is no function of torch (TorchScript, a
    NumPy array made before, a kernel that gets an address) sees no perturbation, and a view of a parameter that was
    made before the closure ran is refused. Weights may be frozen (``requires_grad=False``) and of half precision:
    products and normalisations compute with the perturbed weight in float32, also under autocast, and what an embedding
    gives is rounded up or down at random, right on the average. A half weight that is stepped is rounded to nearest.

    A forward pass costs little, but the estimate of a gradient of n numbers by one has a variance n times as large:
    where back-propagation fits into the memory it is more accurate and cheaper, with checkpointing too (arXiv
    2506.21833).

    Args:
        model (nn.Module): its parameters are tuned.
        lr (float): :math:`\eta`; also in ``param_groups``, for torch's schedulers.
        eps (float): :math:`\epsilon`.
        estimator (str): ``"two-sided"`` as above; ``"one-sided"``, (L(W + eps Z) - L(W)) / eps with L(W) shared by all
            members; ``"forward-gradient"``, the exact derivative along Z by forward-mode differentiation.
        members (int): M, how many directions a step averages.
        law (str): ``"normal"``, ``"sign"`` (the cheapest), ``"uniform8"`` or ``"uniform"``.
        seed (int): of the noise.
        weight_decay (float): :math:`\lambda`.
        include (str or sequence of str): names of modules or parameters, or shell patterns of them: these alone are
            tuned. None: all that require a gradient; where none does, all.
        ranked (bool): ranks stand for losses, from -1/2 (the best of the step) to 1/2, as in evolution strategies: the
            step does not change with the scale of the losses, nor with outliers. Needs two evaluations or more.
        impl (str): ``"auto"`` or a backend.

    :meth:`step` calls ``closure()`` for each evaluation; it runs the model and returns the loss, a number or a tensor
    of one. Every evaluation of a step sees the same random numbers (dropout) and the same buffers of the model: they
    move with the first one alone, once a step, as in one forward pass. Gradients are off in it: a loss with derivatives
    by the inputs turns them on (``torch.enable_grad``, or a transform of ``torch.func``), and a layer through which
    such a derivative passes holds a perturbed copy of its weight. A loss that is not finite changes no weight.
    A parameter that no evaluation of a step uses (an expert that no token reaches) does not move in that step; where
    several processes run, which could differ in it, it is refused.
    The row of an embedding's ``padding_idx`` is neither perturbed nor stepped, unless another layer has the weight too.
    ``log`` holds what was done to the weights, a few bytes a step (:func:`replay`); buffers are not in it.

    Raises: ValueError, TypeError naming the argument.

    Source: Spall, IEEE Transactions on Automatic Control 37 (1992); Malladi et al., "Fine-tuning language models with
    just forward passes", NeurIPS 2023; Salimans et al., "Evolution strategies as a scalable alternative to
    reinforcement learning", 2017 (ranks); Baydin et al., "Gradients without backpropagation", 2022 (forward-mode).

    Example:
        >>> import torch
        >>> from lgkernels.optim import ZerothOrder
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(64, 4)
        >>> target = x[:, :3].argmax(1)
        >>> optimizer = ZerothOrder(model, lr=0.1, eps=0.1, members=4, law="sign")
        >>> for _ in range(100):  # the error rate itself, which has no derivative
        ...     error = optimizer.step(lambda: (model(x).argmax(1) != target).float().mean())
        >>> bool((model(x).argmax(1) == target).float().mean() > 0.8)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        eps: float = 1e-3,
        estimator: Literal["two-sided", "one-sided", "forward-gradient"] = "two-sided",
        members: int = 1,
        law: Literal["normal", "sign", "uniform8", "uniform"] = "normal",
        seed: int = 0,
        weight_decay: float = 0.0,
        include: str | Sequence[str] | None = None,
        ranked: bool = False,
        impl: str = "auto",
    ) -> None:
        constructors.module("model", model)
        checks.positive("lr", checks.item(lr))
        eps = checks.positive("eps", eps)
        checks.choice("estimator", estimator, _ESTIMATORS)
        members = checks.positive_integer("members", members, 2**31)
        checks.choice("law", law, tuple(VALUES_PER_CALL))
        seed = checks.integer_between("seed", seed, -(2**63), 2**64)
        constructors.not_negative("weight_decay", checks.item(weight_decay))
        checks.boolean("ranked", ranked)
        checks.impl(impl)
        if ranked and (estimator == "forward-gradient" or estimator == "one-sided" and members == 1):
            raise ValueError(f"ranked must be False with one loss a step ({estimator}, {members} members), got True")
        self.model, self.estimator, self.ranked, self.impl = model, estimator, ranked, impl
        tuned = _chosen(model, include)
        self.log = ZerothOrderLog(seed, law, members, list(tuned))
        self.log.kept_rows = _padding_rows(model, tuned)
        self._taken = 0
        self._moving: set[Place] | None = None  # buffers that evaluations write to
        self._sums: Tensor | None = None
        self._parts = 0
        self._places = places(model, list(tuned.values()))
        self._used: set[str] = set()  # by the evaluations of the coming step
        super().__init__(list(tuned.values()), dict(lr=lr, eps=eps, weight_decay=float(weight_decay)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Once, by the constructor: what is tuned is settled there."""
        if self.param_groups:
            raise ValueError("param_group must be given to the constructor, by include=, got one more")
        super().add_param_group(param_group)

    # -- evaluations --------------------------------------------------------------------------------------------------

    def _states(self) -> dict[int, Tensor]:
        """{id of a parameter: the random states (members, 3) of the coming step}"""
        members, found = self.log.members, {}
        params = self.param_groups[0]["params"]
        for device in {p.device for p in params}:
            mine = [(p, name) for p, name in zip(params, self.log.parameters) if p.device == device]
            steps = [self._taken * members + m for m in range(members)]
            states = torch.tensor(
                [[[self.log.seed, stream_of(name), s] for s in steps] for _, name in mine],
                dtype=torch.int64,
                device="cpu",
            )
            found.update({id(p): own for (p, _), own in zip(mine, states.to(device))})
        return found

    def _kept_rows(self) -> list[int | None]:
        """Of each parameter."""
        return [self.log.kept_rows.get(name) for name in self.log.parameters]

    def _named(self) -> dict[str, Tensor]:
        """The parameters that are tuned."""
        return dict(zip(self.log.parameters, self.param_groups[0]["params"]))

    def _run(
        self, closure: Callable[[], Any], states: dict[int, Tensor], used: set[str], member: int, coefficient: float
    ) -> Any:
        """The loss at W + coefficient Z; of forward gradients its derivative along Z too. Adds to `used`."""
        tangents = self.estimator == "forward-gradient"
        kept = {id(p): row for p, row in zip(self.param_groups[0]["params"], self._kept_rows()) if row is not None}
        named = self._named()
        mode = Perturbed(named, states, member, coefficient, self.log.law, self.impl, tangents, kept)
        with torch.no_grad(), forward_ad.dual_level() if tangents else contextlib.nullcontext():
            if coefficient or tangents:
                with mode:
                    loss = closure()
                used |= {name for name, p in named.items() if id(p) in mode.met}
            else:
                loss = closure()
            if not tangents:
                return _one_number(loss)
            if not isinstance(loss, Tensor) or (tangent := forward_ad.unpack_dual(loss).tangent) is None:
                require_use(self.model, named, used | self._used, False)
                raise ValueError(
                    "closure must return a tensor with a derivative along the weights for estimator="
                    "'forward-gradient', got one without: 'two-sided' needs none"
                )
            return torch.stack((_one_number(forward_ad.unpack_dual(loss).primal), _one_number(tangent)))

    @torch.no_grad()
    def accumulate(self, closure: Callable[[], Any]) -> Tensor:
        """Evaluate the coming step on one more part of its batch; :meth:`step` then takes the mean over all parts.
        Returns the loss of this part."""
        constructors.function("closure", closure)
        require_places(self.model, self._named(), self._places)
        states, eps = self._states(), self.param_groups[0]["eps"]
        sides = {"two-sided": (eps, -eps), "one-sided": (eps,), "forward-gradient": (0.0,)}[self.estimator]
        results, used = list[Tensor](), set[str]()
        randomness, buffers = Randomness({s.device for s in states.values()}), Buffers(self.model, self._moving)
        with _eagerly():
            if self.estimator == "one-sided":
                still = self._run(closure, states, used, 0, 0.0)
            for m in range(self.log.members):
                for side in sides:
                    if results or self.estimator == "one-sided":
                        randomness.again()
                        buffers.again()
                    results.append(self._run(closure, states, used, m, side))
        self._used |= used
        self._moving = buffers.end()
        sums = torch.stack([r.cpu().double() for r in results]).view(self.log.members, -1)
        loss = sums.mean()
        if self.estimator == "one-sided":
            loss = still.cpu().double()
            sums = torch.cat((sums, loss.expand(len(sums), 1)), 1)
        elif self.estimator == "forward-gradient":
            loss = sums[:, 0].mean()
        self._sums = sums if self._sums is None else self._sums + sums
        self._parts += 1
        return loss.float()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _estimates(self, sums: Tensor) -> Tensor:
        """The derivative along each member's noise."""
        eps = self.param_groups[0]["eps"]
        if self.estimator == "forward-gradient":
            return sums[:, 1]
        if self.ranked:
            if self.estimator == "one-sided":
                return _ranks(sums[:, :1])[:, 0] / eps
            sums = _ranks(sums)
        return (sums[:, 0] - sums[:, 1]) / (2 * eps if self.estimator == "two-sided" else eps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. `closure()` returns the loss; None where :meth:`accumulate` has been given all parts.

        Returns:
            Tensor: the mean of the losses that were computed; one-sided L(W).
        """
        if closure is None and self._sums is None:
            raise TypeError(
                "closure must be callable where nothing is accumulated, got NoneType: call step(closure). A "
                "GradScaler's step gives none, and there are no gradients to scale: leave it out"
            )
        loss = None if closure is None else self.accumulate(closure)
        assert self._sums is not None
        sums, used = self._sums / self._parts, self._used
        self._sums, self._parts, self._used = None, 0, set()
        require_use(self.model, self._named(), used, not self._taken)
        group, members = self.param_groups[0], self.log.members
        lr = float(checks.item(group["lr"]))
        scalars = np.float32(-lr / members * self._estimates(sums).numpy())
        keep = float(np.float32(1.0 - lr * group["weight_decay"]))
        if np.isfinite(scalars).all():
            states = self._states()
            factors = torch.from_numpy(scalars)
            for (name, p), row in zip(self._named().items(), self._kept_rows()):
                if name not in used:
                    continue
                own = factors.to(p.device, torch.float64 if p.dtype == torch.float64 else torch.float32)
                update_(p, own, states[id(p)], self.log.law, keep, self.impl, row)
            self.log.add(self._taken, keep, tuple(scalars.tolist()), [n for n in self.log.parameters if n not in used])
        self._taken += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's: there are gradients where somebody else has made them."""
        super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which hold the model too: torch's keep no attributes of a class of its own."""
        own = "model", "estimator", "ranked", "impl", "log", "_taken", "_moving", "_sums", "_parts", "_places", "_used"
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the number of steps taken and the log."""
        return {**super().state_dict(), _KEY: {"steps": self._taken, "log": _tensor(self.log.to_bytes())}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. The model's weights are those of that step: its own state_dict's, or :func:`replay`'s."""
        constructors.instance("state_dict", state_dict, dict, "a dict of ZerothOrder.state_dict")
        own = state_dict.get(_KEY)
        if own is None:
            raise ValueError("state_dict must be of ZerothOrder.state_dict, got one without the steps taken")
        log = ZerothOrderLog.from_bytes(own["log"].numpy().tobytes())
        for name in ("parameters", "members", "law", "seed"):
            if getattr(log, name) != getattr(self.log, name):
                raise ValueError(
                    f"state_dict must have this {name}: {getattr(self.log, name)}, got {getattr(log, name)}"
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != _KEY})
        self.log, self._taken = log, own["steps"]


def _chosen(model: nn.Module, include: Any) -> dict[str, nn.Parameter]:
    """{name without wrappers: parameter} of what is tuned."""
    every = {name_without_wrappers(name, model): p for name, p in model.named_parameters()}
    for name, p in every.items():
        if is_lazy(p):
            raise TypeError(f"model must be initialized, got a lazy {name}: call it once")
    if include is None:
        floats = {name: p for name, p in every.items() if p.is_floating_point()}
        found = {name: p for name, p in floats.items() if p.requires_grad} or floats
    else:
        modules = {name_without_wrappers(name, model) for name, _ in model.named_modules()}
        known, picked = sorted(modules | set(every)), set()
        for text in constructors.texts("include", include):
            matched = names.by_pattern(text, known)
            inside = {n for n in every if n in matched or any(n.startswith(m + ".") for m in matched if m)}
            if not inside:
                raise names.unmatched("include", text, known)
            picked |= inside
        found = {name: p for name, p in every.items() if name in picked}
    if not every:
        raise ValueError("model must have parameters, got none")
    if not found:
        raise ValueError(f"include must pick parameters of the model, got {checks.got(include)}")
    for name, p in found.items():
        require_whole("model", [p], "ZerothOrder")
        checks.floating(f"model's parameter {name}", p)
        require_no_overlap(f"model's parameter {name}", p)
    return found


def _padding_rows(model: nn.Module, tuned: dict[str, nn.Parameter]) -> dict[str, int]:
    """{name: padding_idx} of embeddings whose weight nothing else holds: torch gives that row no gradient."""
    rows: dict[int, set[int | None]] = {}
    for module in model.modules():
        padding = module.padding_idx if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
        for p in module._parameters.values():
            rows.setdefault(id(p), set()).add(padding)
    found = {name: rows.get(id(p), {None}) for name, p in tuned.items()}
    return {name: row for name, own in found.items() if len(own) == 1 and (row := next(iter(own))) is not None}


def _tensor(data: bytes) -> Tensor:
    """Bytes as every kind of checkpoint takes them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _one_number(loss: Any) -> Tensor:
    """What a closure returned, as a tensor of no dimension."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.detach().reshape(())
    if isinstance(loss, (int, float, np.number)) and not isinstance(loss, bool):
        return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
    shown = f"a tensor of shape {checks.shape_of(loss)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"closure must return the loss, a number or a tensor of one, got {shown}")


def _ranks(losses: Tensor) -> Tensor:
    """From -1/2, the smallest, to 1/2; equal losses have one rank."""
    flat = losses.flatten()
    below, equal = (flat[:, None] > flat).sum(1).float(), (flat[:, None] == flat).sum(1).float()
    ranks = (below + (equal - 1) / 2) / (len(flat) - 1) - 0.5
    return torch.where(flat.isfinite().all(), ranks, torch.nan).view(losses.shape)


def _eagerly() -> Any:
    """Inside, compiled functions run as they were written: a compiled graph would use parameters out of sight."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
