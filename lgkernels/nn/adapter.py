"""Adapters around frozen layers: LoRA and LoKr, factorised."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from .. import functional as LF
from ..core import checks, constructors

__all__ = ["LoKrConv2d", "LoKrLinear", "LoRALinear", "adapt", "merge", "unmerge"]


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


class _Adapter(nn.Module):
    """What the adapters share: the frozen base, `scale`, merging. Beside its factors it has the base's attributes.

    ``scale`` is applied once, in ``forward`` and in ``delta`` (hence ``merge``) alike. ``state_dict`` knows whether the
    base is merged.
    """

    def __init__(self, base: Any, rank: int, alpha: float) -> None:
        super().__init__()
        rank = constructors.size("rank", rank)
        checks.number("alpha", alpha)
        alpha = checks.item(alpha)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self._merged: torch.Tensor | None = None  # the factors, in one vector, whose change the base's weight holds
        for name in base.__constants__:
            setattr(self, name, getattr(base, name))

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the change."""
        return self._merged is not None

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer applies, built in full: who reads a layer's weight (torch's transformer layers in
        evaluation do) computes what the layer does."""
        return self.base.weight if self.merged else self.base.weight + self.delta().to(self.base.weight.dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        return self.base.bias

    def delta(self) -> torch.Tensor:
        """The change of the base's weight, built in full: for merging and inspection."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> "_Adapter":
        """Add ``delta()`` to the base's weight; forward then runs the base alone. Returns self."""
        if not self.merged:
            self.base.weight += self.delta().to(self.base.weight.dtype)
            self._merged = nn.utils.parameters_to_vector(self.parameters(recurse=False))
        return self

    @torch.no_grad()
    def unmerge(self) -> "_Adapter":
        """Take off again what ``merge`` added, whatever the factors are now (the base's weight returns up to rounding).
        Returns self."""
        if self._merged is not None:
            own = list(self.parameters(recurse=False))
            now = [p.clone() for p in own]
            for p, value in zip(own, self._merged.to(own[0]).split([p.numel() for p in own])):
                p.copy_(value.view_as(p))
            self.base.weight -= self.delta().to(self.base.weight.dtype)
            for p, value in zip(own, now):
                p.copy_(value)
            self._merged = None
        return self

    def get_extra_state(self) -> torch.Tensor:
        """For ``state_dict``: the merged factors, empty where there are none."""
        return self.base.weight.new_empty(0) if self._merged is None else self._merged

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Of a ``state_dict``."""
        self._merged = state.clone() if len(state) else None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}" + (", merged" if self.merged else "")


def _factory(base: Any) -> dict[str, Any]:
    return dict(device=base.weight.device, dtype=base.weight.dtype)


class LoRALinear(_Adapter):
    """A frozen `nn.Linear` and a low-rank change, :func:`lgkernels.functional.lora_linear`; scale = alpha / rank.

    ``a`` starts as torch's linear weights, ``b`` at 0: the layer starts as its base.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.LoRALinear(torch.nn.Linear(8, 4), rank=2)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        24
    """

    def __init__(self, base: nn.Linear, rank: int = 1, alpha: float = 4.0) -> None:
        constructors.instance("base", base, nn.Linear, "a torch.nn.Linear")
        super().__init__(base, rank, alpha)
        self.a = nn.Parameter(torch.empty(self.rank, base.in_features, **_factory(base)))
        self.b = nn.Parameter(torch.zeros(base.out_features, self.rank, **_factory(base)))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def delta(self) -> torch.Tensor:
        return self.scale * (self.b @ self.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)
        return LF.lora_linear(x, self.base.weight, self.base.bias, a=self.a, b=self.b, scale=self.scale)


class _LoKr(_Adapter):
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
    ) -> None:
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
        if full1 and full2:
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
    alpha / rank, 1 if both are full. B (or a full w2) starts at 0: the layer starts as its base.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.LoKrLinear(torch.nn.Linear(64, 64))
        >>> [tuple(p.shape) for p in layer.factors()[1]]
        [(8, 1), (1, 8)]
    """

    def __init__(
        self, base: nn.Linear, rank: int = 1, alpha: float = 4.0, *, factor: int = -1, decompose_both: bool = False
    ) -> None:
        constructors.instance("base", base, nn.Linear, "a torch.nn.Linear")
        super().__init__(
            base,
            rank,
            alpha,
            factor=factor,
            decompose_both=decompose_both,
            out=base.out_features,
            width=base.in_features,
            window=(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)
        w1, w2 = self.factors()
        return LF.lokr_linear(x, self.base.weight, self.base.bias, w1=w1, w2=w2, scale=self.scale)


class LoKrConv2d(_LoKr):
    """A frozen `nn.Conv2d` and a Kronecker-factored change; see :class:`LoKrLinear`. w2 holds the kernel window."""

    def __init__(
        self, base: nn.Conv2d, rank: int = 1, alpha: float = 4.0, *, factor: int = -1, decompose_both: bool = False
    ) -> None:
        constructors.instance("base", base, nn.Conv2d, "a torch.nn.Conv2d")
        if base.padding_mode != "zeros" or isinstance(base.padding, str):
            raise ValueError(
                f"base must pad with zeros by a number, got padding_mode={base.padding_mode!r}, "
                f"padding={base.padding!r}"
            )
        if base.groups != 1 and factorization(base.out_channels, factor)[0] % base.groups:
            raise ValueError(
                f"base must have groups that divide {factorization(base.out_channels, factor)[0]} (the rows "
                f"of w1), got {base.groups}"
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
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)
        w1, w2 = self.factors()
        b = self.base
        return LF.lokr_conv2d(
            x, b.weight, b.bias, b.stride, b.padding, b.dilation, b.groups, w1=w1, w2=w2, scale=self.scale
        )


KINDS: dict[str, dict[type[nn.Module], Any]] = {
    "lora": {nn.Linear: LoRALinear},
    "lokr": {nn.Linear: LoKrLinear, nn.Conv2d: LoKrConv2d},
}


def adapt(
    model: nn.Module,
    kind: Literal["lora", "lokr"] = "lora",
    target: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    rank: int = 1,
    alpha: float = 4.0,
    train_norm: bool = False,
    train_head: str | Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """Freeze `model` and put an adapter around each target layer, in place.

    Args:
        model (nn.Module): changed in place.
        kind (str): ``"lora"`` (linear layers) or ``"lokr"`` (linear layers and convolutions).
        target (callable, optional): (qualified name, module) -> whether to adapt it; or texts, one of which the name
            must contain. None: every layer that the kind knows, but those of ``train_head``.
        rank (int), alpha (float): scale is alpha / rank. Defaults: the paper's 1 and 4.
        train_norm (bool): normalisation layers go on learning.
        train_head (iterable of str): names of submodules that are not adapted and learn in full.
        options: of the adapter: ``factor``, ``decompose_both``.

    A layer that stands at several places keeps to be one: it is adapted at all of them, if ``target`` picks any.

    Returns:
        the model. Raises: TypeError, ValueError naming the argument, before the model changes.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = lnn.adapt(model, "lora", train_head=["2"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.a', '0.b', '2.weight', '2.bias']
    """
    constructors.module("model", model)
    checks.choice("kind", kind, tuple(KINDS))
    checks.boolean("train_norm", train_norm)
    given = target
    if target is not None and not callable(target):
        words = constructors.texts("target", target)
        target = lambda name, module: any(word in name for word in words)  # noqa: E731
    head = constructors.texts("train_head", train_head)
    in_head = lambda name: any(name == h or name.startswith(h + ".") for h in head)  # noqa: E731
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in head:
        if name not in modules:
            raise ValueError(
                f"train_head must name submodules of model, got {name!r}; it has "
                f"{', '.join(n for n, _ in model.named_children()) or 'none'}"
            )
    places: dict[nn.Module, list[str]] = {}  # of each layer that could be adapted
    for name, module in modules.items():
        if isinstance(module, _Adapter):
            raise ValueError(
                f"model must not hold adapters yet, got {type(module).__name__} at {name!r}: adapt once, "
                "and pick the layers with target"
            )
        if name and type(module) in KINDS[kind]:
            places.setdefault(module, []).append(name)
    wrap = {
        module: names
        for module, names in places.items()
        if not any(map(in_head, names)) and (target is None or any(target(name, module) for name in names))
    }
    if not wrap:
        raise ValueError(
            f"target must pick at least one of the layers that {kind!r} adapts "
            f"({', '.join(t.__name__ for t in KINDS[kind])}), got none in {type(model).__name__} with "
            f"target={checks.got(given)}"
        )
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        adapters = [
            (names, KINDS[kind][type(module)](module, rank, alpha, **options)) for module, names in wrap.items()
        ]
    except Exception:
        for p in learning:  # those before the one that failed have frozen their layers
            p.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for names, adapter in adapters:
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, adapter)
        for parameter in adapter.parameters(recurse=False):
            parameter.requires_grad_(True)
    for name, module in model.named_modules():
        if in_head(name) or train_norm and "Norm" in type(module).__name__:
            module.requires_grad_(True)
    return model


def merge(model: nn.Module) -> nn.Module:
    """`merge()` of every adapter in `model`. Returns the model."""
    constructors.module("model", model)
    for module in model.modules():
        if isinstance(module, _Adapter):
            module.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """`unmerge()` of every adapter in `model`. Returns the model."""
    constructors.module("model", model)
    for module in model.modules():
        if isinstance(module, _Adapter):
            module.unmerge()
    return model
