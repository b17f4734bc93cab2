"""Training by signals that go directly from the output (DFA, sDFA) or the target (DRTP) to every block."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..core import checks, constructors
from ..nn.direct import DirectFeedback, Init
from ..random import Law
from . import fused, sharded, targets
from .trainer import OptimizerFactory, SchedulerFactory, Trainer, bare, trainable

__all__ = ["CONVENTIONS", "DirectTrainer"]

RULES = ("dfa", "sdfa", "drtp", "shallow")
ERRORS = ("probs_minus_onehot", "output_minus_target", "loss_grad")

# Keyword arguments that make the trainer follow a published code. Where the signal enters, before or after a pooling,
# is a matter of where the blocks end: Nokland's pools belong to the blocks, ChFrenkel's and LLS's stand between them.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "nokland": dict(error="output_minus_target", reduce="none", init="nokland"),
    "chfrenkel": dict(error="output_minus_target", reduce="none", init="kaiming"),  # CE: probs_minus_onehot
    "lls": dict(error="probs_minus_onehot", reduce="none", init="lls"),
    "lighton": dict(error="loss_grad", reduce="none", init="lighton", shared_slice=True),
}


class _Segment:
    """Consecutive modules up to the place where a signal enters (the last one: up to the output)."""

    def __init__(self, modules: list[nn.Module], place: DirectFeedback | None) -> None:
        self.modules = modules
        self.place: Any = place  # None for the last segment
        self.signal: Any = None  # of the kernel that ran the end of the block in this forward
        self.parameters = [p for m in modules for p in trainable(m)]

    @property
    def name(self) -> str:
        return f"the block of {', '.join(type(bare(m)).__name__ for m in self.modules)}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach()  # so a transform at the front (a pool) has no backward, and the first layer no dgrad
        modules, end = fused.split(self.modules) if self.parameters and self.place is not None else (self.modules, None)
        with contextlib.nullcontext() if self.parameters else torch.no_grad():
            for module in modules:
                x = module(x)
            x, self.signal = fused.run(x, *end) if end else (x, None)
        return x


class DirectTrainer(Trainer):
    r"""Direct feedback alignment and its relatives: each block gets its own random projection of one error.

    ================  ==========================================  ==============================
    rule              stands for the gradient of a block's output  update
    ================  ==========================================  ==============================
    ``"dfa"``         :math:`e B_l`                                after the forward pass
    ``"sdfa"``        :math:`\mathrm{sign}(e) B_l`                 after the forward pass
    ``"drtp"``        :math:`t B_l`, t one-hot                     during it, one block at a time
    ``"shallow"``     0                                            (the control)
    ================  ==========================================  ==============================

    Inside a block all is ordinary back-propagation; the output block has the true gradient of the loss. Between
    blocks nothing flows: no gradient to a block's input is computed. No feedback matrix is stored. With DRTP one
    block's activations live at a time; with the others all do until the error is known, then one block's gradients.
    On a CPU, in float32, a block's end of Conv2d, BatchNorm2d, ReLU or LeakyReLU, and MaxPool2d(2) or none runs in a
    kernel that keeps the convolution's output alone and turns it into its gradient in place (no hooks on them).

    Args:
        blocks (iterable of nn.Module, or an nn.Sequential): plain modules, applied in order as ``module(x)``. A block
            ends where the signal enters: put :class:`lgkernels.nn.DirectFeedback` there, or none at all, and
            every module with parameters to train but the last is a block. So a pool inside such a module lies before
            the signal, one that stands on its own after it. A residual block is one block: the signal replaces the
            gradient of its output, skip included. Blocks may be wrapped in DistributedDataParallel, or sharded by
            ``fully_shard`` before the trainer is made, one by one.
        optimizer_factory (callable): a block's list of parameters -> its optimizer.
        rule (str): as above.
        loss (callable): (output, target) -> scalar, for the output block. Default: cross entropy.
        error (str): e. ``"probs_minus_onehot"``: softmax(output) - t; ``"output_minus_target"``: output - t, for an
            output block that ends in its activation (sigmoid); ``"loss_grad"``: the gradient of `loss` at the output.
        reduce (str): ``"mean"`` divides the signal by the number of error rows, as the mean loss does its gradient;
            ``"none"`` does not (Nokland, ChFrenkel, LLS). Default: ``"none"`` for ``"loss_grad"``, else ``"mean"``.
        init, law, seed: of the places that are made here, see :class:`lgkernels.nn.DirectFeedback`.
        shared_slice (bool): every B is a slice of one matrix, scaled by the widest block (LightOn), not for ``"drtp"``.
        scheduler_factory, accumulation_steps, clip_grad_norm, grad_scaler, cuda_graph: as :class:`BlockwiseTrainer`.
            `CONVENTIONS` has the settings of the published codes.

    ``step(x, target)`` takes class indices (B,) of any integer dtype (-100: ignored by the default loss, and without
    a signal), or targets (B, C); it returns the output block's loss, as a vector of
    length 1.

    Raises: ValueError, TypeError naming the argument.

    Source: Nokland 2016; Frenkel, Lefebvre, Bol 2021; Launay, Poli, Boniface, Krzakala 2020.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lgkernels.training import DirectTrainer
        >>> _ = torch.manual_seed(0)
        >>> blocks = [nn.Sequential(nn.Linear(8, 32), nn.Tanh()), nn.Sequential(nn.Linear(32, 32), nn.Tanh()),
        ...           nn.Linear(32, 2)]
        >>> trainer = DirectTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 0.01), rule="drtp")
        >>> x = torch.randn(64, 8)
        >>> target = (x[:, 0] * x[:, 1] > 0).long()
        >>> first = trainer.step(x, target)
        >>> for _ in range(40):
        ...     losses = trainer.step(x, target)
        >>> losses.shape, bool(losses < first)
        (torch.Size([1]), True)
    """

    takes_sharded = True

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        optimizer_factory: OptimizerFactory,
        *,
        rule: Literal["dfa", "sdfa", "drtp", "shallow"] = "dfa",
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        error: Literal["probs_minus_onehot", "output_minus_target", "loss_grad"] = "probs_minus_onehot",
        reduce: Literal["mean", "none"] | None = None,
        init: Init = "nokland",
        law: Law = "uniform",
        seed: int = 0,
        shared_slice: bool = False,
        scheduler_factory: SchedulerFactory | None = None,
        accumulation_steps: int = 1,
        clip_grad_norm: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        cuda_graph: bool = False,
    ) -> None:
        checks.choice("rule", rule, RULES)
        checks.choice("error", error, ERRORS)
        if reduce is None:
            reduce = "none" if error == "loss_grad" else "mean"
        checks.choice("reduce", reduce, ("mean", "none"))
        constructors.function("loss", loss)
        checks.boolean("shared_slice", shared_slice)
        DirectFeedback(init, law=law, seed=seed)  # checks them, also where no place is made
        if shared_slice and rule == "drtp":
            raise ValueError(
                "shared_slice must be False with rule='drtp': it updates before later blocks' widths are "
                "known; give each DirectFeedback its max_features and one stream instead"
            )
        self.rule, self.loss, self.error, self.reduce = rule, loss, error, reduce
        self.shared_slice = shared_slice
        blocks = constructors.modules("blocks", blocks)
        if not any(isinstance(block, DirectFeedback) for block in blocks):
            blocks = _with_places(blocks, init=init, law=law, seed=seed, shared_slice=shared_slice)
        self.segments = _segments(blocks)
        self._classes: int | None = None  # of the output, known after the first step
        super().__init__(
            blocks,
            optimizer_factory,
            [s.parameters for s in self.segments],
            scheduler_factory=scheduler_factory,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            grad_scaler=grad_scaler,
            cuda_graph=cuda_graph,
        )

    def _step(self, x: torch.Tensor, target: torch.Tensor, last: bool) -> torch.Tensor:
        if self._classes is not None:
            return self._pass(x, self._checked(target, self._classes), last)
        if not target.is_floating_point():
            target = targets.checked(target, 2**32, self.loss)  # the number of classes is not known yet
        try:
            with targets.buffers_kept(self.blocks):
                return self._pass(x, target, last, first=True)
        except BaseException:
            self.zero_grad()
            raise

    def _checked(self, target: torch.Tensor, classes: int) -> torch.Tensor:
        """As the loss and the rule read it; a loss of the caller's own may take other targets."""
        if self.loss is F.cross_entropy or self.rule in ("dfa", "sdfa") and self.error != "loss_grad":
            return targets.checked(target, classes, self.loss)
        return target if target.is_floating_point() else target.long()

    def _pass(self, x: torch.Tensor, target: torch.Tensor, last: bool, first: bool = False) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            for module in self.blocks:
                stack.enter_context(self._synchronised(module, last))
            waiting: list[tuple[int, torch.Tensor]] = []
            held: list[int] = []
            error = None
            for i, segment in enumerate(self.segments[:-1]):
                x = segment(x)
                if not segment.parameters:
                    continue
                if self.rule == "drtp":  # its first updates wait until the target is known to fit the output
                    self._send(i, x, target, last and not first)
                    x = x.detach()  # nothing of the block outlives its update
                    held += [i] if first and last else []
                else:
                    waiting.append((i, x))
            output = self.segments[-1](x)
            classes = targets.classes(output, self.loss)
            target = self._checked(target, classes) if classes != self._classes else target
            leaf = output.detach().requires_grad_()
            loss = self.loss(leaf, target)
            if waiting and self.rule != "shallow":  # before any update: the error is that of this forward
                error = self._error(leaf, loss, target)
                self._share([x.shape[error.dim() - 1 :] for _, x in waiting] if self.shared_slice else ())
            self._classes = classes
            self._output_step(output, leaf, loss, last)
            self.output = leaf.detach()
            del x, output
            for i in held:
                self._update(self.optimizers[i], self.segments[i].parameters)
            while waiting:  # each block's activations go as its gradients come
                self._send(*waiting.pop(), error, last)
        return loss.detach().reshape(1)

    def _output_step(self, output: torch.Tensor, leaf: torch.Tensor, loss: torch.Tensor, last: bool) -> None:
        parameters = self.segments[-1].parameters
        if not parameters or self._no_graph(output, self.segments[-1].name):
            return
        with torch.autocast(loss.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(self._scaled(loss), leaf)
            sharded.backward(output, gradient, parameters)
        if last:
            self._update(self.optimizers[-1], parameters)

    def _send(self, i: int, output: torch.Tensor, signal: torch.Tensor | None, last: bool) -> None:
        """Gradients of segment `i` from its output's stand-in gradient, and its update."""
        segment = self.segments[i]
        if self._no_graph(output, segment.name):
            return
        with torch.autocast(output.device.type, enabled=False):
            gradient = self._announce(segment, output, signal)
            if gradient is None:
                gradient = self._delta(segment.place, output, signal)
            sharded.backward(output, gradient, segment.parameters)
        segment.signal = None
        del output
        if last:
            self._update(self.optimizers[i], segment.parameters)

    def _announce(self, segment: _Segment, output: torch.Tensor, signal: Any) -> torch.Tensor | None:
        """Where a kernel makes delta of the error itself: hands it that, and returns a gradient that nobody reads."""
        if segment.signal is None or self.rule not in ("dfa", "sdfa") or signal.dim() != 2:
            return None
        formula = segment.place.formula(output.shape[1:])
        if formula is None:
            return None
        segment.signal.error, segment.signal.random = signal.to(output.dtype), formula
        return output.new_zeros(()).expand(output.shape)

    def _delta(self, place: Any, output: torch.Tensor, signal: Any) -> torch.Tensor:
        if self.rule == "shallow":
            return torch.zeros_like(output)
        if self.rule != "drtp":
            return place.signal(signal, output)
        rows = signal.numel() if not signal.is_floating_point() else signal.numel() // signal.shape[-1]
        if signal.is_floating_point():
            return place.signal(self._weighted(signal, rows), output)
        ignored = self._ignored(signal)
        delta = place.target_signal(signal if ignored is None else signal.masked_fill(ignored, 0), output)
        if ignored is not None:
            delta = self._without(ignored, delta)
        return delta if self.reduce == "none" and self.grad_scaler is None else self._weighted(delta, rows)

    @torch.no_grad()
    def _error(self, output: torch.Tensor, loss: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """e, or its sign, as it is to be projected: (B, C) float32, scaled like the loss."""
        ignored = None if target.is_floating_point() else self._ignored(target)
        if self.error == "loss_grad":
            with torch.enable_grad(), torch.autocast(loss.device.type, enabled=False):
                (error,) = torch.autograd.grad(loss, output, retain_graph=True)
        else:
            wide = output if output.dtype == torch.float64 else output.float()
            error = wide.softmax(-1) if self.error == "probs_minus_onehot" else wide.clone()
            if target.is_floating_point():
                error -= target
            else:
                index = (target if ignored is None else target.masked_fill(ignored, 0)).unsqueeze(-1)
                error.scatter_add_(-1, index, error.new_full((), -1.0).expand(index.shape))
        if self.rule == "sdfa":
            error = error.sign()
        if ignored is not None:
            error = self._without(ignored, error)
        return self._weighted(error, error.numel() // max(error.shape[-1], 1))

    def _ignored(self, target: torch.Tensor) -> torch.Tensor | None:
        """Where the default loss ignores a row (ignore_index -100); None with a loss of the caller's own."""
        return target == -100 if self.loss is F.cross_entropy else None

    def _without(self, ignored: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        """No signal for ignored rows; where a mean is due, it is over the others, as that of the loss."""
        kept = ~ignored
        factor = kept.numel() / kept.sum().clamp_min(1) if self.reduce == "mean" else 1.0
        weights = (kept * factor).to(signal.dtype)
        return signal * weights.view(*kept.shape, *(1,) * (signal.dim() - kept.dim()))

    def _weighted(self, signal: torch.Tensor, rows: int) -> torch.Tensor:
        """Division by the rows and by the accumulated batches, where the loss is divided too; a GradScaler's factor."""
        if self.reduce == "mean" and rows:
            signal = signal / (rows * self.accumulation_steps)
        elif self.error == "loss_grad" and self.accumulation_steps > 1 and self.rule == "dfa":
            signal = signal / self.accumulation_steps
        return signal if self.grad_scaler is None else self.grad_scaler.scale(signal)

    def _share(self, shapes: Sequence[torch.Size]) -> None:
        """The widest block's features, once they are known, scale every block's slice."""
        for segment in self.segments[:-1] if shapes else ():
            segment.place.max_features = segment.place.max_features or max(map(math.prod, shapes))


def _with_places(blocks: list[nn.Module], *, init: Init, law: Law, seed: int, shared_slice: bool) -> list[nn.Module]:
    """A DirectFeedback after every block that has parameters to train, but the last."""
    training = [i for i, block in enumerate(blocks) if trainable(block)]
    result = []
    for i, block in enumerate(blocks):
        result.append(block)
        if i in training[:-1]:
            device = trainable(block)[0].device
            stream = 0 if shared_slice else training.index(i)
            result.append(DirectFeedback(init, law=law, seed=seed, stream=stream).to(device))
    return result


def _segments(blocks: list[nn.Module]) -> list[_Segment]:
    segments: list[_Segment] = []
    modules: list[nn.Module] = []
    for block in blocks:
        if isinstance(block, DirectFeedback):
            segments.append(_Segment(modules, block))
            modules = []
        else:
            inner = next((m for m in block.modules() if isinstance(m, DirectFeedback)), None)
            if inner is not None:
                raise ValueError(
                    "blocks must hold their DirectFeedback side by side with the modules, got one inside "
                    f"a {type(block).__name__}: take that one apart"
                )
            modules.append(block)
    return [*segments, _Segment(modules, None)]
