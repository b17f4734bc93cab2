"""Blocks with a local loss: `forward(x, target)` -> `(out.detach(), loss)`, for `training.BlockwiseTrainer`."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..core.annotations import BlockOutput
from ..core.ops import class_indices, wide
from ..functional.local_loss import check_is_positive, goodness_and_squares
from . import model_input

__all__ = ["ClassifierBlock", "ContrastiveHead", "ForwardForwardLayer", "LocalClassifier", "PredSimHead"]


Normalize = Literal["l2", "rms", "none"]


class LocalHead(nn.Module):
    """Wraps `block`: in training with a target, the detached output and the loss; else the output with its graph.

    As the first unit of :func:`lgkernels.training.split_blocks` the block may take a mapping of its model's arguments.
    `aux`: modules between the block's output and the head, which learn with it and are not part of the network.
    """

    auxiliary: nn.Module | None

    def __init__(self, block: nn.Module, aux: nn.Module | None = None) -> None:
        constructors.module("block", block)
        if aux is not None:
            constructors.module("aux", aux)
        super().__init__()
        self.block = block
        self.auxiliary = aux

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        if target is None or not self.training:
            return self.block(x)
        model_input.check(x)
        target = self.checked(target)  # before the block's running statistics move
        out = self.block(model_input.detached(x))
        aux = self._modules.get("auxiliary")  # one that was saved whole may have none
        return out.detach(), self.loss(out if aux is None else aux(out), target)

    def checked(self, target: torch.Tensor) -> torch.Tensor:
        """The target that the head can take."""
        return target

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of the block's output, differentiable in the block and the head."""
        raise NotImplementedError


def pooled(out: torch.Tensor) -> torch.Tensor:
    return out.mean((2, 3)) if out.dim() == 4 else out.mean(1) if out.dim() == 3 else out


def per_token(h: torch.Tensor, target: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N, C) of h (B, T, C) and their targets (N,) of (B, T); with `shift` that of the next token."""
    checks.shape("target", target, h.shape[:2], "one class index per token")
    if shift:
        h, target = h[:, :-1], target[:, 1:]
    return h.flatten(0, 1), target.flatten()


class ClassifierBlock(nn.Module):
    """Wraps the final classifier: ordinary cross entropy on a detached input.

    Args:
        module (nn.Module): maps (B, ...) to logits (B, C), usually an ``nn.Linear``; or to (B, T, C), for one class a
            token, with a target (B, T).
        label_smoothing (float): of the cross entropy. Default: 0.
        shift (bool): for tokens: those at t predict the target at t + 1, so that the target is the text itself.

    ``forward(x, target)`` returns ``(logits.detach(), loss)``; without target, or in evaluation, the logits with
    their ordinary graph.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.ClassifierBlock(torch.nn.Linear(4, 3))
        >>> logits, loss = block(torch.ones(2, 4), torch.tensor([0, 2]))
        >>> logits.shape, loss.requires_grad
        (torch.Size([2, 3]), True)
    """

    shift = False

    def __init__(self, module: nn.Module, *, label_smoothing: float = 0.0, shift: bool = False) -> None:
        constructors.module("module", module)
        checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
        checks.boolean("shift", shift)
        super().__init__()
        self.module, self.shift = module, shift
        self.label_smoothing = checks.item(label_smoothing)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> BlockOutput:
        if target is None or not self.training:
            return self.module(x)
        checks.tensor("x", x)
        checks.integer("target", target)
        logits = self.module(x.detach())
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if wide.dim() == 3 and target.dim() == 2:
            wide, target = per_token(wide, target, self.shift)
            target = class_indices("target", target, wide.shape[1], -100)
            return logits.detach(), F.cross_entropy(wide, target, label_smoothing=self.label_smoothing)
        target = class_indices("target", target, logits.shape[1 if logits.dim() > 1 else 0], -100)
        return logits.detach(), F.cross_entropy(wide, target, label_smoothing=self.label_smoothing)


class LocalClassifier(LocalHead):
    """A block trained by a linear classifier of its pooled output: :func:`lgkernels.functional.local_cross_entropy`.

    Args:
        block (nn.Module): gives (B, C, H, W), (B, T, C) or (B, C).
        channels (int): C. num_classes (int). bias (bool): of the classifier.
        label_smoothing (float): in [0, 1].
        shift (bool): with a target (B, T), one class for each token, which is then not pooled over T (-100: ignored):
            those at t predict the target at t + 1, so that a language model's unit takes the text itself as target.
        aux (nn.Module): between the block and the classifier, copies of the next layers say
            (:func:`lgkernels.training.auxiliary_nets`); they learn with it.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.LocalClassifier(torch.nn.Conv2d(3, 8, 3), 8, 5)
        >>> out, loss = block(torch.ones(2, 3, 6, 6), torch.tensor([0, 4]))
        >>> out.requires_grad, loss.requires_grad
        (False, True)
    """

    shift = False

    def __init__(
        self,
        block: nn.Module,
        channels: int,
        num_classes: int,
        *,
        bias: bool = True,
        label_smoothing: float = 0.0,
        shift: bool = False,
        aux: nn.Module | None = None,
    ) -> None:
        super().__init__(block, aux)
        checks.boolean("shift", shift)
        self.shift = shift
        channels, num_classes = constructors.size("channels", channels), constructors.size("num_classes", num_classes)
        checks.boolean("bias", bias)
        checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
        self.head = nn.Linear(channels, num_classes, bias)
        self.label_smoothing = checks.item(label_smoothing)

    def checked(self, target: torch.Tensor) -> torch.Tensor:
        checks.integer("target", target)
        return class_indices("target", target, self.head.out_features, -100 if target.dim() == 2 else None)

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.dim() != 2:
            return LF.local_cross_entropy(
                out, self.head.weight, self.head.bias, target, label_smoothing=self.label_smoothing
            )
        out, target = per_token(out, target, self.shift)
        kept = target != -100
        losses = LF.local_cross_entropy(
            out,
            self.head.weight,
            self.head.bias,
            target.masked_fill(~kept, 0),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return (losses * kept).sum() / kept.sum()


class ForwardForwardLayer(nn.Module):
    """Forward-Forward: normalise each sample, apply the layer, compare its goodness with a threshold.

    ``forward(x, is_positive)`` returns ``(out.detach(), loss)``; without ``is_positive``, or in evaluation, the output.

    Args:
        layer (nn.Module): activation included, e.g. ``nn.Sequential(nn.Linear(784, 500), nn.ReLU())``.
        threshold (float), goodness (str): of :func:`lgkernels.functional.goodness_loss`.
        normalize (str): of the input: ``"l2"``: by its norm + eps (mpezeshki, eps 1e-4); ``"rms"``: by its root mean
            square + eps (loeweX, eps 1e-8); ``"none"``.
        normalize_output (str): of the output alike, for a next layer with ``normalize="none"``: in training its norm is
            the loss's own reduction.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.ForwardForwardLayer(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
        >>> out, loss = layer(torch.ones(2, 4), torch.tensor([True, False]))
        >>> out.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        threshold: float = 2.0,
        goodness: Literal["mean", "sum"] = "mean",
        normalize: Normalize = "l2",
        normalize_output: Normalize = "none",
        eps: float | None = None,
    ) -> None:
        super().__init__()
        constructors.module("layer", layer)
        checks.number("threshold", threshold)
        if eps is not None:
            constructors.not_negative("eps", eps)
        checks.choice("goodness", goodness, ("mean", "sum"))
        checks.choice("normalize", normalize, ("l2", "rms", "none"))
        checks.choice("normalize_output", normalize_output, ("l2", "rms", "none"))
        self.layer, self.threshold, self.goodness = layer, checks.item(threshold), goodness
        self.normalize, self.normalize_output, self.eps = normalize, normalize_output, checks.item(eps)

    def _divided(self, x: torch.Tensor, kind: Normalize, norm: torch.Tensor | None = None) -> torch.Tensor:
        """x by its norm, of which the sums of squares of the rows may be known."""
        if kind == "none":
            return x
        wider = wide(x)  # a norm or eps that is no float16 must not become inf or 0
        norm = torch.linalg.vector_norm(wider, dim=tuple(range(1, x.dim()))) if norm is None else norm
        norm = norm if kind == "l2" else norm / x.shape[1:].numel() ** 0.5
        eps = (1e-4 if kind == "l2" else 1e-8) if self.eps is None else self.eps
        return (wider / (norm + eps).view(-1, *[1] * (x.dim() - 1))).to(x.dtype)

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's input."""
        return self._divided(x, self.normalize)

    def forward(self, x: torch.Tensor, is_positive: torch.Tensor | None = None) -> BlockOutput:
        if is_positive is None or not self.training:
            return self._divided(self.layer(self.normalized(x)), self.normalize_output)
        checks.tensor("x", x)
        check_is_positive(is_positive, x)
        h = self.layer(self.normalized(x.detach()))
        loss, squares = goodness_and_squares(h, is_positive, self.threshold, self.goodness)
        return self._divided(h.detach(), self.normalize_output, squares.sqrt()), loss

    def goodness_of(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) goodness of each sample: the argument of the prediction by largest goodness."""
        h = self.layer(self.normalized(x))
        squares = wide(h).square().flatten(1)
        return squares.mean(1) if self.goodness == "mean" else squares.sum(1)


class PredSimHead(LocalHead):
    """Nokland and Eidnes' predsim: :func:`lgkernels.functional.prediction_similarity_loss`.

    Args:
        block (nn.Module): gives (B, C, H, W), (B, N), or (B, T, C), averaged over T.
        shape (tuple): of the block's output for one sample: (C, H, W), (N,) or (C,).
        num_classes (int), beta (float), use_std (bool): of the loss.
        sim_head (str): ``"layer"``: the authors' 3x3 convolution C -> C (or linear N -> N), which can cost more than
            the block; ``"identity"``.
        decoder_dim (int): the decoder's average pool doubles its window, rows and columns in turn, until at most so
            many features are left.

    The decoder starts at 0, as the authors'.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.PredSimHead(torch.nn.Conv2d(3, 8, 3), (8, 4, 4), 5, decoder_dim=32)
        >>> out, loss = block(torch.randn(4, 3, 6, 6), torch.tensor([0, 4, 1, 0]))
        >>> block.decoder
        Linear(in_features=32, out_features=5, bias=True)
    """

    def __init__(
        self,
        block: nn.Module,
        shape: Sequence[int],
        num_classes: int,
        *,
        beta: float = 0.99,
        use_std: bool = True,
        sim_head: Literal["layer", "identity"] = "layer",
        decoder_dim: int = 4096,
    ) -> None:
        super().__init__(block)
        expected = "the sizes (C, H, W) or (N,) of an output"
        constructors.instance("shape", shape, (tuple, list), expected)
        shape = checks.sizes("shape", shape, expected)
        if len(shape) not in (1, 3) or 0 in shape:
            raise ValueError(f"shape must be {expected}, each at least 1, got {shape}")
        num_classes = constructors.size("num_classes", num_classes)
        checks.between("beta", beta, 0.0, 1.0)
        checks.boolean("use_std", use_std)
        checks.choice("sim_head", sim_head, ("layer", "identity"))
        decoder_dim = constructors.size("decoder_dim", decoder_dim)
        self.num_classes, self.beta, self.use_std = num_classes, checks.item(beta), use_std
        self.pool = [1, 1]
        features = shape[0]
        if len(shape) == 3:
            size = lambda: [-(-n // k) for n, k in zip(shape[1:], self.pool)]  # noqa: E731
            turn = 0
            while features * size()[0] * size()[1] > decoder_dim and size() != [1, 1]:
                self.pool[turn % 2] *= 2
                turn += 1
            features *= size()[0] * size()[1]
        # sizes that the window does not divide are padded, as the authors do
        self.padding = [k // 2 if n % k else 0 for n, k in zip(shape[1:], self.pool)]
        self.sim = None
        if sim_head == "layer":
            self.sim = (
                nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
                if len(shape) == 3
                else nn.Linear(shape[0], shape[0], bias=False)
            )
        self.decoder = nn.Linear(features, num_classes)
        nn.init.zeros_(self.decoder.weight)

    def checked(self, target: torch.Tensor) -> torch.Tensor:
        checks.integer("target", target)
        return class_indices("target", target, self.num_classes)

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        out = out.mean(1) if out.dim() == 3 else out
        pool: dict[str, Any] = {}
        if out.dim() == 4:
            pool = dict(pool_kernel=tuple(self.pool), pool_padding=tuple(self.padding))
        return LF.prediction_similarity_loss(
            out,
            target,
            None if self.sim is None else self.sim.weight,
            self.decoder.weight,
            self.decoder.bias,
            num_classes=self.num_classes,
            beta=self.beta,
            use_std=self.use_std,
            **pool,
        )


class ContrastiveHead(LocalHead):
    """A block trained by a contrastive loss of its pooled and projected output (LoCo, GIM in SimCLR, InfoPro).

    Args:
        block (nn.Module): gives (B, C, H, W), (B, T, C) or (B, C).
        channels (int): C. hidden (int), dim (int): sizes of the projection's two layers; hidden 0: one layer.
        loss (str): ``"nt_xent"``: rows i and i + B/2 are two views of a sample, the target is not used; ``"supcon"``:
            rows of the same class are positives.
        temperature (float). aux (nn.Module): as :class:`LocalClassifier`.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.ContrastiveHead(torch.nn.Conv2d(3, 8, 3), 8, dim=4, loss="supcon")
        >>> out, loss = block(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))
        >>> out.shape, loss.shape
        (torch.Size([4, 8, 4, 4]), torch.Size([]))
    """

    def __init__(
        self,
        block: nn.Module,
        channels: int,
        *,
        hidden: int = 0,
        dim: int = 128,
        loss: Literal["nt_xent", "supcon"] = "nt_xent",
        temperature: float = 0.1,
        aux: nn.Module | None = None,
    ) -> None:
        super().__init__(block, aux)
        checks.choice("loss", loss, ("nt_xent", "supcon"))
        checks.positive("temperature", temperature)
        channels, dim = constructors.size("channels", channels), constructors.size("dim", dim)
        hidden = constructors.size("hidden", hidden, 0)
        self.projection = (
            nn.Linear(channels, dim)
            if not hidden
            else nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        )
        self.kind, self.temperature = loss, checks.item(temperature)

    def checked(self, target: torch.Tensor) -> torch.Tensor:
        if self.kind == "supcon":
            checks.integer("target", target)
        return target

    def loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        z = self.projection(pooled(out))
        if self.kind == "nt_xent":
            return LF.nt_xent_loss(z, temperature=self.temperature)
        return LF.supcon_loss(z, target, temperature=self.temperature)
