"""Nets with tied weights that settle to the minimum of a Hopfield energy: dense, convolutional, with skips."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core import checks, constructors
from ..core.autograd import refuse_transforms
from ..core.ops import wide
from ..ops.equilibrium import energy_entry as _entry
from ..ops.equilibrium.energy import Edge, EnergyNet, Weights
from ..ops.equilibrium.network import READOUT
from ..ops.equilibrium.options import ENERGY_ACTIVATIONS, LOSSES, POOLS, SCHEDULES, EnergyPhases

__all__ = ["HopfieldNet"]

Device = torch.device | str | int | None
_CONV = {"kernel_size": 3, "stride": 1, "padding": 0, "pool": "none", "gain": None}
_DENSE: dict[str, Any] = {"gain": None}


class HopfieldNet(nn.Module):
    r"""Layers that settle to a minimum of a Hopfield energy; each weight acts upwards and, transposed, downwards.

    .. math:: E(s) = \sum_l c_l \Big( \sum G(s_l) - \langle b_l, s_l \rangle \Big)
        - \sum_{a \to b} c_b \langle s_b, P_{ab}(s_a) \rangle, \qquad G' = \phi^{-1}

    P is a product with a matrix, or a convolution and a 2x2 pool. A step replaces the states by
    :math:`s_l \leftarrow \phi(u_l)`, :math:`u_l = b_l + \sum_a P_{al}(s_a) + \sum_b f_{lb} DP_{lb}(s_l)^T s_b`, where
    :math:`f_{lb} = c_b / c_l` is the edge's `feedback`. Trained by :class:`lgkernels.training.EquilibriumTrainer` with
    nudges of one sign (``variant="positive"`` or ``"negative"``) or of both (``"centered"``).

    Args:
        input_shape (sequence of int): of a sample, (n,) or (C, H, W).
        layers (sequence of int and dict): of each layer, from the input on: an int, the units of a dense layer, or a
            dict. Dense: ``units``; a convolution: ``channels``, ``kernel_size`` (3), ``stride`` (1), ``padding`` (0),
            ``pool`` (``"none"``, ``"avg"``, ``"max"``, ``"softmax"``; 2x2). Both: ``gain``, which replaces the net's,
            and ``skip``: a dict from ``"in"`` or an earlier layer, ``"l1"``, ``"l2"``, ..., to the dict of its edge
            into this layer, with the same keys but for units and channels.
        num_classes (int, optional): of the readout that ``loss="cross_entropy"`` has above the last layer.
        activation (str): ``"clipped_relu"`` clip(u, 0, ceiling), ``"hard_sigmoid"`` clip(u/2, 0, 1) or ``"sigmoid"``
            1/(1+exp(2-4u)). ceiling (float): of the first.
        linear_output (bool): the last layer is not clipped, :math:`s = u`.
        loss (str): ``"mse"``: half the squared error of the last layer, a unit a class; ``"cross_entropy"``.
        feedback (float or dict): what comes down is multiplied with it: of every edge between neighbours, or
            ``"l1-l2"`` -> number (1 where there is none). A skip has the product of the edges that it passes: with
            others there is no energy.
        gain (float): weights are uniform in :math:`\pm gain / \sqrt{fan\_in}`, biases with 0.5 for the gain.
        schedule (str): ``"asynchronous"``: the first, third, ... layer and then the others; ``"synchronous"``.
        steps (int): of the free phase.
        impl (str): ``"auto"``, or a backend: ``"reference"`` is autograd of the energy, ``"torch"`` and
            ``"cpu"`` are closed forms of it.
        device, dtype: of the parameters.

    ``HopfieldNet((3, 32, 32), HopfieldNet.conv32(10))`` is the 32x32 net of Scellier et al.,
    ``HopfieldNet((3, 32, 32), HopfieldNet.resnet13(10), ceiling=6.0)`` a Hopfield-Resnet13.

    Raises: ValueError, TypeError naming the argument.

    Source: Scellier, Ernoult, Kendall, Kumar, "Energy-based learning algorithms for analog computing" (NeurIPS 2023);
    Ernoult et al. (NeurIPS 2019) and Laborieux et al. (Frontiers in Neuroscience 2021), whose nets are synchronous;
    Elayedam & Srinivasan, "Scaling equilibrium propagation to deeper neural network architectures" (2025); Liu & Chen,
    "Toward practical equilibrium propagation" (ICLR 2026), for the feedback.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> _ = torch.manual_seed(0)
        >>> net = lnn.HopfieldNet((1, 8, 8), [dict(channels=4, padding=1, pool="max"), 3], steps=20)
        >>> x = torch.rand(2, 1, 8, 8)
        >>> state = net.settle(x)
        >>> [tuple(s.shape) for s in state.values()], net(x).shape
        ([(2, 4, 4, 4), (2, 3)], torch.Size([2, 3]))
        >>> zero = {layer: torch.zeros_like(s) for layer, s in state.items()}
        >>> bool((net.energy(x, state) < net.energy(x, zero)).all())
        True
    """

    def __init__(
        self,
        input_shape: Iterable[int],
        layers: Iterable[int | Mapping[str, Any]],
        *,
        num_classes: int | None = None,
        activation: Literal["clipped_relu", "hard_sigmoid", "sigmoid"] = "clipped_relu",
        ceiling: float = 1.0,
        linear_output: bool = True,
        loss: Literal["mse", "cross_entropy"] = "mse",
        feedback: float | Mapping[str, float] = 1.0,
        gain: float = 0.5,
        schedule: Literal["synchronous", "asynchronous"] = "asynchronous",
        steps: int = 60,
        impl: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.choice("activation", activation, ENERGY_ACTIVATIONS)
        checks.choice("loss", loss, LOSSES)
        checks.choice("schedule", schedule, SCHEDULES)
        ceiling, gain = checks.positive("ceiling", ceiling), checks.positive("gain", gain)
        checks.boolean("linear_output", linear_output)
        steps = checks.integer_between("steps", steps, 0, 2**31)
        checks.impl(impl)
        if impl in ("triton", "cuda"):
            raise ValueError(
                f"impl must be 'auto', 'reference', 'torch' or 'cpu', got {impl!r}: no kernel of energies there"
            )
        factory = constructors.factory(device, dtype)
        first = tuple(_sizes("input_shape", input_shape))
        if len(first) not in (1, 3):
            raise ValueError(f"input_shape must be (n,) or (C, H, W), got {tuple(first)}")
        plan = _Plan(first, layers)
        units = math.prod(plan.shapes[-1])
        classes = constructors.size("num_classes", units if num_classes is None else num_classes)
        if loss == "mse" and classes != units:
            raise ValueError(f"num_classes must be the last layer's units, {units}, where loss='mse', got {classes}")
        if loss == "mse" and len(plan.shapes[-1]) != 1:
            raise ValueError(f"layers must end with a dense one where loss='mse', got one of {plan.shapes[-1]}")
        scales = plan.scales(feedback)
        super().__init__()
        self.net = EnergyNet(tuple(plan.shapes), tuple(plan.edges), scales, activation, ceiling, linear_output, loss)
        self.activation, self.loss, self.schedule = activation, loss, schedule
        self.steps, self.impl, self.num_classes = steps, impl, classes
        self.layers = plan.names[1:]
        self._gains = {plan.key(e): gain if own is None else own for e, own in zip(plan.edges, plan.gains)}
        self.weights = nn.ParameterDict()
        for edge, shape in zip(plan.edges, plan.kernels):
            self.weights[f"{plan.key(edge)}/kernel"] = nn.Parameter(torch.empty(shape, **factory))
            if edge.source == edge.target - 1:
                size = plan.shapes[edge.target][0]
                self.weights[f"{plan.key(edge)}/bias"] = nn.Parameter(torch.empty(size, **factory))
        if loss == "cross_entropy":
            self.weights[f"{READOUT}/kernel"] = nn.Parameter(torch.empty(units, classes, **factory))
            self.weights[f"{READOUT}/bias"] = nn.Parameter(torch.empty(classes, **factory))
        self.reset_parameters()

    @staticmethod
    def conv32(num_outputs: int, channels: Iterable[int] = (128, 256, 512, 512), pool: str = "max") -> list[Any]:
        """Layers for images of 32x32 pixels: four convolutions of padding 1 with a pool, and the outputs."""
        return [*(dict(channels=n, padding=1, pool=pool) for n in channels), num_outputs]

    @staticmethod
    def resnet13(num_outputs: int, channels: Iterable[int] = (128, 256, 512, 512)) -> list[Any]:
        """Four blocks of two convolutions, the second of stride 2, around each a skip of 1x1 and stride 2."""
        layers: list[Any] = []
        for i, n in enumerate(channels):
            skip = {f"l{2 * i}" if i else "in": dict(kernel_size=1, stride=2)}
            layers += [dict(channels=n, padding=1), dict(channels=n, padding=1, stride=2, skip=skip)]
        return [*layers, num_outputs]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform: see `gain`; those of a readout as of torch.nn.Linear."""
        for key, value in self.weights.items():
            edge = key.rpartition("/")[0]
            kernel = self.weights[f"{edge}/kernel"]
            root = math.sqrt(kernel.shape[1:].numel() if kernel.dim() == 4 else kernel.shape[0])
            reach = 1.0 if edge == READOUT else self._gains[edge] if value is kernel else 0.5
            nn.init.uniform_(value, -reach / root, reach / root)

    # -- what the trainer and the measures use ------------------------------------------------------------------------

    def named_weights(self) -> dict[str, Tensor]:
        """``"in-l1/kernel"``, ``"in-l1/bias"``, ..., ``"readout/Dense_0/kernel"`` -> the parameters."""
        return dict(self.weights.items())

    def tensors(self) -> Weights:
        """The weights as they are computed with: float32, or float64."""
        own = {key: wide(w.detach()) for key, w in self.weights.items()}
        names = ("in", *self.layers)
        kernels = [own[f"{names[e.source]}-{names[e.target]}/kernel"] for e in self.net.edges]
        biases = [own[f"{a}-{b}/bias"] for a, b in zip(names, names[1:])]
        return Weights(kernels, biases, own.get(f"{READOUT}/kernel"), own.get(f"{READOUT}/bias"))

    def by_key(self, kernels: list[Tensor], biases: list[Tensor], readout: list[Tensor]) -> dict[str, Tensor]:
        """Gradients by the keys and in the dtypes of the weights."""
        names = ("in", *self.layers)
        made = {f"{names[e.source]}-{names[e.target]}/kernel": g for e, g in zip(self.net.edges, kernels)}
        made |= {f"{a}-{b}/bias": g for a, b, g in zip(names, names[1:], biases)}
        made |= {f"{READOUT}/{part}": g for part, g in zip(("kernel", "bias"), readout)}
        return {key: made[key].to(value.dtype) for key, value in self.weights.items()}

    def input_of(self, x: Tensor) -> Tensor:
        """x, checked, in the shape and dtype that is computed in."""
        checks.floating("x", x)
        shape = self.net.shapes[0]
        fits = tuple(x.shape[1:]) == shape or len(shape) == 1 and x.dim() > 1 and x.shape[1:].numel() == shape[0]
        if not fits:
            meaning = f"(B, {', '.join(map(str, shape))})"
            raise ValueError(f"x must be {meaning}, got shape {checks.shape_of(x)}")
        weight = next(iter(self.weights.values()))
        checks.same_device(weights=weight, x=x)
        checks.precision("x", x, "weights", weight)
        return wide(x.detach()).reshape(len(x), *shape)

    def _start(self, x: Tensor, state: Any) -> list[Tensor]:
        if state is None:
            return [x.new_zeros(len(x), *shape) for shape in self.net.shapes[1:]]
        constructors.instance("state", state, Mapping, "a dict of tensors by layer")
        if set(state) != set(self.layers):
            raise ValueError(f"state must have the layers {', '.join(self.layers)}, got a dict {list(state)}")
        for layer, shape in zip(self.layers, self.net.shapes[1:]):
            checks.floating("state", state[layer])
            checks.shape("state", state[layer], (len(x), *shape), f"{layer} of {len(x)} samples")
            checks.precision("state", state[layer], "x", x)
            checks.same_device(x=x, state=state[layer])
        return [wide(state[layer].detach()) for layer in self.layers]

    @torch.no_grad()
    def settle_report(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """:meth:`settle`, and the norm of the last step of each sample, (B,)."""
        refuse_transforms("HopfieldNet")
        x = self.input_of(x)
        free = EnergyPhases(self.schedule, self.steps, 0, [])
        states, residual, *_ = _entry.phases(self.net, self.tensors(), x, self._start(x, state), None, free, self.impl)
        return dict(zip(self.layers, states)), residual

    def settle(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The free state: layer -> s, after `steps` steps from zero or from `state`. No graph is recorded."""
        return self.settle_report(x, state)[0]

    @torch.no_grad()
    def energy(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """E of each sample, (B,)."""
        refuse_transforms("HopfieldNet")
        x = self.input_of(x)
        return _entry.energy(self.net, self.tensors(), x, self._start(x, state))

    def readout(self, state: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, C): the readout of the last layer, or its states."""
        out = constructors.entry("state", state, self.layers[-1]).flatten(1)
        if self.loss != "cross_entropy":
            return out
        kernel = self.weights[f"{READOUT}/kernel"]
        return torch.addmm(self.weights[f"{READOUT}/bias"], out.to(kernel.dtype), kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the free state: differentiable in the readout alone."""
        return self.readout(self.settle(x))

    def extra_repr(self) -> str:
        sizes = " ".join("x".join(map(str, shape)) for shape in self.net.shapes)
        return f"{sizes}, activation={self.activation}, loss={self.loss}, steps={self.steps}, schedule={self.schedule}"


class _Plan:
    """What `layers` say: names, shapes, edges, shapes of kernels, gains."""

    def __init__(self, first: tuple[int, ...], layers: Any) -> None:
        self.kind = type(layers).__name__
        items = constructors.several("layers", layers, (int, np.integer, Tensor, Mapping), "ints and dicts")
        self.names, self.shapes = ["in"], [first]
        self.edges: list[Edge] = []
        self.kernels: list[tuple[int, ...]] = []
        self.gains: list[float | None] = []
        self.place = "layers"  # of what is looked at
        for i, item in enumerate(items):
            self.names.append("out" if i == len(items) - 1 else f"l{i + 1}")
            self.place = f"layers[{i}]"
            if isinstance(item, Mapping):
                self._add(i + 1, dict(item))
            else:
                self._add(i + 1, {"units": constructors.size(self.place, item)})

    def key(self, edge: Edge) -> str:
        return f"{self.names[edge.source]}-{self.names[edge.target]}"

    def _refuse(self, must: str, got: Any) -> ValueError:
        return ValueError(f"layers must {must}, got {got} in {self.kind}, at {self.place}")

    def _add(self, layer: int, item: dict[str, Any]) -> None:
        skip = item.pop("skip", {})
        if not isinstance(skip, Mapping):
            raise self._refuse("have a dict for skip", type(skip).__name__)
        sizes = [name for name in ("units", "channels") if name in item]
        if len(sizes) != 1:
            raise self._refuse("have units or channels in each dict", "both" if sizes else sorted(map(str, item)))
        (size,) = sizes
        many = constructors.size(f"{self.place}['{size}']", item.pop(size))
        self._edge(layer - 1, layer, many if size == "channels" else None, many, item)
        place = self.place
        for name, options in skip.items():
            self.place = f"{place}['skip'][{name!r}]"
            if name not in self.names[: layer - 1] or not isinstance(options, Mapping):
                raise self._refuse(f"have skips from {' or '.join(self.names[: layer - 1]) or 'nothing'}", repr(name))
            channels = many if size == "channels" else None
            self._edge(self.names.index(name), layer, channels, many, dict(options))

    def _edge(self, source: int, target: int, channels: int | None, units: int, given: dict[str, Any]) -> None:
        usual = _DENSE if channels is None else _CONV
        if set(given) - set(usual):
            known = ", ".join(usual)
            raise self._refuse(
                f"have dicts with {known} and units or channels", sorted(map(str, set(given) - set(usual)))
            )
        options, before = {**usual, **given}, self.shapes[source]
        own = {name: f"{self.place}['{name}']" for name in options}
        gain = None if options["gain"] is None else checks.positive(own["gain"], options["gain"])
        shape: tuple[int, ...]
        kernel: tuple[int, ...]
        if channels is None:
            edge, shape, kernel = Edge(source, target), (units,), (math.prod(before), units)
        else:
            if len(before) != 3:
                raise self._refuse("have convolutions of images alone", f"one of {before}")
            size, stride = (constructors.size(own[name], options[name]) for name in ("kernel_size", "stride"))
            padding = checks.integer_between(own["padding"], options["padding"], 0, size)
            checks.choice(own["pool"], options["pool"], POOLS)
            edge = Edge(source, target, stride, padding, options["pool"])
            half = 1 if edge.pool == "none" else 2
            pixels = [((n + 2 * padding - size) // stride + 1) // half for n in before[1:]]
            shape, kernel = (channels, *pixels), (channels, before[0], size, size)
            if min(pixels) < 1:
                raise self._refuse("leave a pixel", f"{shape} for {self.names[target]}")
        if target == len(self.shapes):
            self.shapes.append(shape)
        elif self.shapes[target] != shape:
            raise self._refuse(f"have skips of the layer's shape {self.shapes[target]}", shape)
        self.edges.append(edge)
        self.kernels.append(kernel)
        self.gains.append(gain)

    def scales(self, feedback: Any) -> tuple[float, ...]:
        """c of each layer."""
        recurrent = {self.key(e): e for e in self.edges if e.source}
        given = feedback if isinstance(feedback, Mapping) else {}
        plain = 1.0 if isinstance(feedback, Mapping) else checks.positive("feedback", feedback)
        for key, value in given.items():
            if key not in recurrent:
                allowed = ", ".join(recurrent) or "none"
                raise ValueError(f"feedback must name edges between layers ({allowed}), got a dict with {key!r}")
            checks.positive("feedback", value)
        c = [1.0]
        for layer in range(len(self.shapes) - 2, 0, -1):
            key = f"{self.names[layer]}-{self.names[layer + 1]}"
            c.insert(0, c[0] / float(checks.item(given.get(key, plain))))
        for key in set(given) & set(recurrent):
            edge = recurrent[key]
            follows = c[edge.target - 1] / c[edge.source - 1]
            if not math.isclose(follows, float(given[key]), rel_tol=1e-6):
                raise ValueError(
                    f"feedback must be {follows:.6g} for {key}, as of the edges it passes, got {given[key]}"
                )
        return tuple(c)


def _sizes(name: str, value: Any) -> list[int]:
    items = constructors.several(name, value, (int, np.integer, Tensor), "ints")
    return [constructors.size(name, item) for item in items]
