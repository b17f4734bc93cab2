"""What a dict of weights says about a net: its layers, their order, and the edges between them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...core import checks

READOUT = "readout/Dense_0"


class Network(NamedTuple):
    """names: layers from the input on, the last is `out`. edges: (source, destination) by place, in the order of the
    dict. inputs: layers that the input enters. conv: whether the weights are convolutions."""

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    conv: bool
    readout: bool

    def key(self, edge: tuple[int, int]) -> str:
        """Of the edge's entries in the dict, without `/kernel`."""
        return f"{self.names[edge[0]]}-{self.names[edge[1]]}"

    def pairs(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(up, down) of the layers that are connected both ways."""
        return [(e, e[::-1]) for e in self.edges if e[0] < e[1] and e[::-1] in self.edges]


def _misfit(weights: Any, expected: str, got: str) -> ValueError:
    return ValueError(f"weights must {expected}, got {got} in {type(weights).__name__} of {len(weights)}")


def network(weights: Any) -> Network:
    """Checks names and types of the dict's entries; `check_shapes` the sizes."""
    if not isinstance(weights, Mapping):
        kind = type(weights).__name__
        raise TypeError(f"weights must be a dict of tensors by name, as 'l1-l2/kernel', got {kind}")
    if not weights:
        raise ValueError(f"weights must have an edge from 'in', got an empty {type(weights).__name__}")
    edges, first = [], None
    for key, value in weights.items():
        edge, _, part = key.rpartition("/") if isinstance(key, str) else ("", "", "")
        if part not in ("kernel", "bias") or edge != READOUT and len(edge.split("-")) != 2:
            expected = f"have keys 'a-b/kernel', 'a-b/bias' and '{READOUT}/kernel'"
            raise _misfit(weights, expected, repr(key))
        checks.floating("weights", value)
        if f"{edge}/kernel" not in weights:
            raise _misfit(weights, f"have a kernel for each bias, {edge}/kernel", repr(key))
        if first is not None:
            checks.precision("weights", value, "its first entry", first)
            checks.same_device(weights_first=first, weights=value)
        first = value if first is None else first
        if part == "kernel" and edge != READOUT:
            edges.append(tuple(edge.split("-")))
    return _ordered(weights, edges)


def _ordered(weights: Mapping[str, Tensor], edges: list[tuple[str, ...]]) -> Network:
    names = ["in"]
    for name in names:
        names += [b for a, b in edges if a == name and b not in names and b != "out"]
    names = [*names[1:], "out"]
    unknown = {n for edge in edges for n in edge} - {"in", *names}
    into = {b for _, b in edges}
    if unknown or "out" not in into or any(a == b or b == "in" for a, b in edges):
        wrong = sorted(unknown) or [f"{a}-{b}" for a, b in edges]
        raise _misfit(weights, "lead from 'in' to every layer and to 'out'", ", ".join(wrong))
    place = {name: i for i, name in enumerate(names)}
    conv = weights["-".join(edges[0]) + "/kernel"].dim() == 4
    found = Network(
        tuple(names),
        tuple((place[a], place[b]) for a, b in edges if a != "in"),
        tuple(place[b] for a, b in edges if a == "in"),
        conv,
        f"{READOUT}/kernel" in weights,
    )
    if conv and (found.inputs != (0,) or any(abs(a - b) != 1 for a, b in found.edges)):
        raise _misfit(weights, "connect neighbours alone where they are convolutions", _keys(edges))
    return found


def _keys(edges: list[tuple[str, ...]]) -> str:
    return ", ".join("-".join(edge) for edge in edges)


def widths(net: Network, weights: Mapping[str, Tensor]) -> list[int]:
    """Units, or channels, of each layer; raises where kernels and biases do not fit each other."""
    dims, meaning = (4, "(O, I, 3, 3), a convolution") if net.conv else (2, "(in, out), a dense layer")
    sizes: dict[int, int] = {}

    def settle(layer: int, size: int, key: str) -> None:
        if sizes.setdefault(layer, size) != size:
            raise ValueError(f"weights must fit each other: {key} for {sizes[layer]} of {net.names[layer]}, got {size}")

    keys = [(f"in-{net.names[b]}", -1, b) for b in net.inputs] + [(net.key(e), *e) for e in net.edges]
    for key, a, b in keys:
        kernel, bias = weights[f"{key}/kernel"], weights.get(f"{key}/bias")
        if kernel.dim() != dims or 0 in kernel.shape or net.conv and kernel.shape[2:] != (3, 3):
            raise ValueError(f"weights must have {key}/kernel {meaning}, got shape {checks.shape_of(kernel)}")
        low, high = (a, b) if not net.conv or a < b else (b, a)  # a feedback convolution has the forward one's shape
        ends = kernel.shape[:2] if not net.conv else kernel.shape[1::-1]
        settle(low, ends[0], f"{key}/kernel")
        settle(high, ends[1], f"{key}/kernel")
        if bias is not None:
            if a > b:
                raise ValueError(f"weights must have biases of edges upwards alone, got {key}/bias")
            if tuple(bias.shape) != (sizes[b],):
                raise ValueError(f"weights must have {key}/bias ({sizes[b]},), got shape {checks.shape_of(bias)}")
    if net.readout:
        kernel, bias = weights[f"{READOUT}/kernel"], weights.get(f"{READOUT}/bias")
        last = sizes[len(net.names) - 1]
        if kernel.dim() != 2 or kernel.shape[0] != last or not kernel.shape[1]:
            raise ValueError(f"weights must have {READOUT}/kernel ({last}, C), got shape {checks.shape_of(kernel)}")
        if bias is not None and bias.shape != kernel.shape[1:]:
            expected = f"{READOUT}/bias ({kernel.shape[1]},)"
            raise ValueError(f"weights must have {expected}, got shape {checks.shape_of(bias)}")
    elif f"{READOUT}/bias" in weights:
        raise ValueError(f"weights must have {READOUT}/kernel where there is a bias, got none")
    return [sizes[i] for i in range(-1, len(net.names))]


def state_shapes(net: Network, sizes: list[int], image: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of each layer's state without the batch; `image`: the sizes of the input without batch and channels."""
    if not net.conv:
        return [(n,) for n in sizes[1:]]
    shapes: list[tuple[int, ...]] = []
    height, width = image
    for layer, channels in enumerate(sizes[1:]):
        less = 2 if layer == len(net.names) - 1 else 0
        height, width = (height - less) // 2, (width - less) // 2
        if min(height, width) < 1:
            raise ValueError(f"x must be large enough for {len(net.names)} pools, got {image[0]}x{image[1]} pixels")
        shapes.append((channels, height, width))
    return shapes
