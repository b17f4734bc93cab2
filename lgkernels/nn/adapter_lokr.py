"""LoKr: a frozen layer and a change of its weight that is a Kronecker product."""

import math
from typing import Any, Literal

import torch
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..functional import adapter as _changes
from .adapter_base import Adapter, factory, linear_sizes, probability

__all__ = ["LoKrConv2d", "LoKrLinear"]

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


class _LoKr(Adapter):
    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        sizes: tuple[int, int],
        *,
        factor: int,
        decompose_both: bool,
        scale_convention: ScaleConvention,
        use_rslora: bool,
        rank_dropout: float,
        module_dropout: float,
        autocast_adapter_dtype: bool,
        window: tuple[int, ...] = (),
    ) -> None:
        """`sizes`: (out, in) of the weight."""
        checks.choice("scale_convention", scale_convention, ("lycoris", "peft"))
        (out1, out2), (in1, in2) = (factorization(size, factor) for size in sizes)
        checks.boolean("decompose_both", decompose_both)
        rank_dropout = probability("rank_dropout", rank_dropout)
        module_dropout = probability("module_dropout", module_dropout)
        checks.boolean("autocast_adapter_dtype", autocast_adapter_dtype)
        super().__init__(base, rank, alpha, use_rslora)  # which freezes the base: all else is checked
        rank = self.rank
        self.rank_dropout, self.module_dropout = rank_dropout, module_dropout
        self.window, area = window, math.prod(window)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory(base, autocast_adapter_dtype)))

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

    def _product(self) -> torch.Tensor:
        w1, w2 = (w[0] @ w[1] if isinstance(w, tuple) else w for w in self.factors())
        w2 = w2.reshape(w2.shape[0], -1, *self.window)
        return torch.kron(w1.reshape(*w1.shape, *[1] * len(self.window)), w2)

    def _drops(self) -> bool:
        return self.rank_dropout > 0 or self.module_dropout > 0

    def _dropped(self, x: torch.Tensor, scale: float) -> torch.Tensor | None:
        if not self._drops():
            return None
        if self.module_dropout and torch.rand((), dtype=torch.float32, device="cpu") < self.module_dropout:
            return x.new_zeros(())
        y = self._change_of_output(x, scale)
        if not self.rank_dropout:
            return y
        rows = self.base.weight.shape[0] if self.window else linear_sizes(self.base)[0]
        kept = torch.rand(rows, device=x.device, dtype=torch.float32) >= self.rank_dropout
        return y * (kept.view(-1, 1, 1) if self.window else kept)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("rank_dropout", 0.0)
        vars(self).setdefault("module_dropout", 0.0)


class LoKrLinear(_LoKr):
    """A frozen `nn.Linear` (or transformers' Conv1D) and a Kronecker-factored change,
    :func:`lgkernels.functional.lokr_linear`.

    The weight (out, in) splits into w1 (out1, in1) and w2 (out2, in2) by :func:`factorization`; w2 = A B of ``rank``,
    or full where the rank reaches half of its larger side; w1 alike with ``decompose_both``, else full. scale =
    alpha / rank, alpha / sqrt(rank) with ``use_rslora``; 1 if both are full, but with ``scale_convention="peft"``. B
    (or a full w2) starts at 0: the layer starts as its base. The factors are float32 beside a half-precision weight,
    unless ``autocast_adapter_dtype=False``. In training ``rank_dropout`` leaves out rows of the change,
    ``module_dropout`` all of it.

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
        use_rslora: bool = False,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(
            base,
            rank,
            alpha,
            linear_sizes(base),
            factor=factor,
            decompose_both=decompose_both,
            scale_convention=scale_convention,
            use_rslora=use_rslora,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def _layer(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        w1, w2 = self.factors()
        return LF.lokr_linear(x, self._matrix(), self.base.bias, w1=w1, w2=w2, scale=scale)

    def _change_of_output(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return _changes.lokr_linear_change(x, *self.factors(), scale)


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
        use_rslora: bool = False,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        autocast_adapter_dtype: bool = True,
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
            (base.out_channels, base.weight.shape[1]),
            factor=factor,
            decompose_both=decompose_both,
            scale_convention=scale_convention,
            use_rslora=use_rslora,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            autocast_adapter_dtype=autocast_adapter_dtype,
            window=tuple(base.kernel_size),
        )

    def _splits(self) -> bool:
        """Whether the product falls apart by groups."""
        w1, _ = self.factors()
        return (w1[0] if isinstance(w1, tuple) else w1).shape[0] % self.base.groups == 0

    def _layer(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        b, (w1, w2) = self.base, self.factors()
        if not self._splits():
            return b._conv_forward(x, self._added(b.weight, self._product() * scale), b.bias)
        return LF.lokr_conv2d(x, b.weight, b.bias, b.stride, b.padding, b.dilation, b.groups, w1=w1, w2=w2, scale=scale)

    def _change_of_output(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        b = self.base
        if not self._splits():
            return b._conv_forward(x, (self._product() * scale).to(b.weight.dtype), None)
        geometry = b.stride, b.padding, b.dilation, b.groups
        return _changes.lokr_conv2d_change(x, geometry, self.window, *self.factors(), scale)
