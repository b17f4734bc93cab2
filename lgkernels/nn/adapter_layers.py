"""The adapters: a frozen layer and its factorised change, LoRA and LoKr."""

import math
import warnings
import weakref
from typing import Any, Literal

import torch
from torch import nn

from .. import functional as LF
from ..core import checks, constructors

__all__ = ["LoKrConv2d", "LoKrLinear", "LoRALinear", "is_conv1d"]

ScaleConvention = Literal["lycoris", "peft"]
Factor = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # whole, or a pair whose product it is


def factorization(dim: int, factor: int = -1) -> tuple[int, int]:
    """(m, n), m <= n, m * n = dim: the most square split (factor -1), or m (or n) the given divisor; a factor that does
    not divide bounds m. As LyCORIS: 64 = 8 x 8, 768 = 24 x 32, 3072 = 48 x 64."""
    checks.positive_integer("dim", dim)
    checks.integer_between("factor", factor, -(2**63), 2**63)
    if not factor:
        raise ValueError("factor must be a positive int, or -1 for the most square split, got 0")
    if factor > 0 and dim % factor == 0:
        return min(factor, dim // factor), max(factor, dim // factor)
    bound = dim if factor < 0 else factor
    m = max(k for k in range(1, math.isqrt(dim) + 1) if dim % k == 0 and k <= bound)
    return m, dim // m


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.partition(".")[0] == "transformers"


class _Kept:
    """As a weak reference, but strong."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


class Adapter(nn.Module):
    """What the adapters share: the frozen base, `scale`, merging. Beside its factors it has the base's attributes.

    ``scale`` is applied once, in ``forward`` and in ``delta`` (hence ``merge``) alike. ``state_dict`` knows whether the
    base is merged. A weight that has another owner too (an embedding's, beside lm_head's) stays as it is: ``merge``
    gives the base a weight of its own, ``unmerge`` the old one again.
    """

    _original: Any = None  # returns the weight before the merge, where somebody else has it or had it
    _told = False  # that a merged adapter does not learn

    def __init__(self, base: Any, rank: int, alpha: float) -> None:
        super().__init__()
        rank = constructors.size("rank", rank)
        checks.number("alpha", alpha)
        alpha = checks.item(alpha)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self._merged: torch.Tensor | None = None  # the factors, in one vector, whose change the base's weight holds
        self.shared = False  # whether the weight has a second owner, as `adapt` finds
        for name in getattr(base, "__constants__", ()):
            setattr(self, name, getattr(base, name))

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the change."""
        return self._merged is not None

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer applies, built in full: who reads a layer's weight (torch's transformer layers in
        evaluation do) computes what the layer does."""
        return self.base.weight if self.merged else self.base.weight + self._change()

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        return self.base.bias

    def delta(self) -> torch.Tensor:
        """The change of the base's weight, built in full: for merging and inspection."""
        raise NotImplementedError

    def _change(self) -> torch.Tensor:
        """As the base's weight lies."""
        change = self.delta().to(self.base.weight.dtype)
        return change.t() if is_conv1d(self.base) else change

    def _matrix(self) -> torch.Tensor:
        """The base's weight (out, in)."""
        return self.base.weight.t() if is_conv1d(self.base) else self.base.weight

    def _detach_weight(self, value: torch.Tensor) -> None:
        """A weight of the base's own; the old one is kept where somebody else has it, too."""
        weight = self.base.weight
        self._original = _Kept(weight) if self.shared else weakref.ref(weight)
        self.base.weight = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def merge(self) -> "Adapter":
        """Add ``delta()`` to the base's weight; forward then runs the base alone. Returns self."""
        if not self.merged:
            self._detach_weight(self.base.weight + self._change())
            self._merged = nn.utils.parameters_to_vector(self.parameters(recurse=False))
        return self

    @torch.no_grad()
    def unmerge(self) -> "Adapter":
        """Take off again what ``merge`` added, whatever the factors are now (the base's weight returns up to rounding,
        one that another owner has kept, itself). Returns self."""
        if self._merged is not None:
            original = self._original and self._original()
            if original is not None:
                self.base.weight = original
            else:
                self._subtract(self._merged)
            self._merged = self._original = None
        return self

    def _subtract(self, merged: torch.Tensor) -> None:
        own = list(self.parameters(recurse=False))
        now = [p.clone() for p in own]
        for p, value in zip(own, merged.to(own[0]).split([p.numel() for p in own])):
            p.copy_(value.view_as(p))
        self.base.weight -= self._change()
        for p, value in zip(own, now):
            p.copy_(value)

    def get_extra_state(self) -> torch.Tensor:
        """For ``state_dict``: the merged factors, empty where there are none."""
        return self.base.weight.new_empty(0) if self._merged is None else self._merged

    @torch.no_grad()
    def set_extra_state(self, state: torch.Tensor) -> None:
        """Of a ``state_dict``, before the base's weight is read: that goes to no other owner."""
        if len(state) and not self.merged:
            self._detach_weight(self.base.weight.clone())
        elif not len(state) and self.merged:
            self.unmerge()
        self._merged = state.clone() if len(state) else None

    def __getstate__(self) -> dict[str, Any]:
        original = self._original and self._original()
        return {**vars(self), "_original": None if original is None else _Kept(original)}

    def _run_merged(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self._told and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if any(p.requires_grad for p in self.parameters(recurse=False)):
                self._told = True
                warnings.warn(
                    f"this {type(self).__name__} is merged: its factors get no gradient; unmerge() before training",
                    stacklevel=3,
                )
        return self.base(x)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}" + (", merged" if self.merged else "")


def _factory(base: Any) -> dict[str, Any]:
    return dict(device=base.weight.device, dtype=base.weight.dtype)


def _linear_sizes(base: Any) -> tuple[int, int]:
    """(out, in)."""
    if is_conv1d(base):
        return base.weight.shape[1], base.weight.shape[0]
    constructors.instance("base", base, nn.Linear, "a torch.nn.Linear")
    return base.out_features, base.in_features


class LoRALinear(Adapter):
    """A frozen `nn.Linear` (or transformers' Conv1D) and a low-rank change: :func:`lgkernels.functional.lora_linear`
    with scale = alpha / rank.

    ``a`` starts as torch's linear weights, ``b`` at 0: the layer starts as its base.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.LoRALinear(torch.nn.Linear(8, 4), rank=2)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        24
    """

    def __init__(self, base: nn.Linear, rank: int = 1, alpha: float = 4.0) -> None:
        out, width = _linear_sizes(base)
        super().__init__(base, rank, alpha)
        self.a = nn.Parameter(torch.empty(self.rank, width, **_factory(base)))
        self.b = nn.Parameter(torch.zeros(out, self.rank, **_factory(base)))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def delta(self) -> torch.Tensor:
        return self.scale * (self.b @ self.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self._run_merged(x)
        return LF.lora_linear(x, self._matrix(), self.base.bias, a=self.a, b=self.b, scale=self.scale)


class _LoKr(Adapter):
    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        factor: int,
        decompose_both: bool,
        out: int,
        width: int,
        window: tuple[int, ...],
        scale_convention: ScaleConvention,
    ) -> None:
        checks.choice("scale_convention", scale_convention, ("lycoris", "peft"))
        (out1, out2), (in1, in2) = factorization(out, factor), factorization(width, factor)
        checks.boolean("decompose_both", decompose_both)
        super().__init__(base, rank, alpha)  # which freezes the base: all else is checked
        rank = self.rank
        self.window, area = window, math.prod(window)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **_factory(base)))

        full1 = not decompose_both or rank >= max(out1, in1) / 2
        full2 = rank >= max(out2, in2) / 2
        if full1:
            self.w1 = new(out1, in1)
        else:
            self.w1_a, self.w1_b = new(out1, rank), new(rank, in1)
        if full2:
            self.w2 = new(out2, in2, *window)
        else:
            self.w2_a, self.w2_b = new(out2, rank), new(rank, in2 * area)
        if full1 and full2 and scale_convention == "lycoris":
            self.scale = 1.0
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("w2", "w2_b"):  # the one that is 0 at the start
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=5**0.5)

    def factors(self) -> tuple[Factor, Factor]:
        """w1 and w2 as :func:`lgkernels.functional.lokr_linear` takes them."""
        return (
            self.w1 if hasattr(self, "w1") else (self.w1_a, self.w1_b),
            self.w2 if hasattr(self, "w2") else (self.w2_a, self.w2_b),
        )

    def delta(self) -> torch.Tensor:
        w1, w2 = (w[0] @ w[1] if isinstance(w, tuple) else w for w in self.factors())
        w2 = w2.reshape(w2.shape[0], -1, *self.window)
        return self.scale * torch.kron(w1.reshape(*w1.shape, *[1] * len(self.window)), w2)


class LoKrLinear(_LoKr):
    """A frozen `nn.Linear` and a Kronecker-factored change, :func:`lgkernels.functional.lokr_linear`.

    The weight (out, in) splits into w1 (out1, in1) and w2 (out2, in2) by :func:`factorization`; w2 = A B of ``rank``,
    or full where the rank reaches half of its larger side; w1 alike with ``decompose_both``, else full. scale =
    alpha / rank; 1 if both are full, but with ``scale_convention="peft"``. B (or a full w2) starts at 0: the layer
    starts as its base.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.LoKrLinear(torch.nn.Linear(64, 64))
        >>> [tuple(p.shape) for p in layer.factors()[1]]
        [(8, 1), (1, 8)]
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 1,
        alpha: float = 4.0,
        *,
        factor: int = -1,
        decompose_both: bool = False,
        scale_convention: ScaleConvention = "lycoris",
    ) -> None:
        out, width = _linear_sizes(base)
        super().__init__(
            base,
            rank,
            alpha,
            factor=factor,
            decompose_both=decompose_both,
            out=out,
            width=width,
            window=(),
            scale_convention=scale_convention,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self._run_merged(x)
        w1, w2 = self.factors()
        return LF.lokr_linear(x, self._matrix(), self.base.bias, w1=w1, w2=w2, scale=self.scale)


class LoKrConv2d(_LoKr):
    """A frozen `nn.Conv2d` and a Kronecker-factored change; see :class:`LoKrLinear`. w2 holds the kernel window.

    The factors are those of the weight (out, in / groups, kh, kw). Where ``groups`` does not divide the rows of w1,
    their product is built in full at each forward, as PEFT and LyCORIS do.
    """

    def __init__(
        self,
        base: nn.Conv2d,
        rank: int = 1,
        alpha: float = 4.0,
        *,
        factor: int = -1,
        decompose_both: bool = False,
        scale_convention: ScaleConvention = "lycoris",
    ) -> None:
        constructors.instance("base", base, nn.Conv2d, "a torch.nn.Conv2d")
        if base.padding_mode != "zeros" or isinstance(base.padding, str):
            raise ValueError(
                f"base must pad with zeros by a number, got padding_mode={base.padding_mode!r}, "
                f"padding={base.padding!r}"
            )
        super().__init__(
            base,
            rank,
            alpha,
            factor=factor,
            decompose_both=decompose_both,
            out=base.out_channels,
            width=base.weight.shape[1],
            window=tuple(base.kernel_size),
            scale_convention=scale_convention,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self._run_merged(x)
        w1, w2 = self.factors()
        b = self.base
        rows = w1[0].shape[0] if isinstance(w1, tuple) else w1.shape[0]
        if rows % b.groups:  # the product does not fall apart by groups: built in full
            return b._conv_forward(x, self.weight, b.bias)
        return LF.lokr_conv2d(
            x, b.weight, b.bias, b.stride, b.padding, b.dilation, b.groups, w1=w1, w2=w2, scale=self.scale
        )
