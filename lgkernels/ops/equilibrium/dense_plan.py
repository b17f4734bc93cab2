"""How a dense net lies in the buffers of the step kernel: see triton_step.py."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import kept
from ..common.launch import block_count

_FIELDS = 8  # of the table, for each block of columns


class Plan(NamedTuple):
    """columns: where each layer begins in a row; units: of a row without the nudge; width: of a row. first: number of
    the first block of even and of odd layers, and how many there are. panels: (offset, depth, width) of each layer's
    weights in one buffer; places: (layer, first row) of each edge there, and of the nudge last."""

    table: Tensor
    columns: list[int]
    units: int
    width: int
    blocks: list[tuple[int, int]]
    panels: list[tuple[int, int, int]]
    places: list[tuple[int, int]]

    @property
    def weights(self):
        offset, depth, width = self.panels[-1]
        return offset + depth * width


def plan_of(widths: tuple, edges: tuple, nudge: int, block_n: int, block_k: int, device: torch.device) -> Plan:
    """edges: source and destination of each; nudge: columns of the nudge of the last layer, 0: there is none."""
    sizes = widths, edges, nudge, block_n, block_k
    return Plan(_table(device, *sizes), *_layout(*sizes)[1:])


@kept.kept
def _table(*sizes) -> Tensor:
    return torch.tensor(_layout(*sizes)[0], dtype=torch.int32, device="cpu")


@cache
def _layout(widths: tuple, edges: tuple, nudge: int, block_n: int, block_k: int) -> tuple:
    """The fields of the plan; the table as a list."""
    layers = len(widths)
    order = [*range(0, layers, 2), *range(1, layers, 2)]
    padded = [block_count(n, max(block_n, block_k)) * max(block_n, block_k) for n in widths]
    columns, column = [0] * layers, 0
    for layer in order:
        columns[layer], column = column, column + padded[layer]
    pairs = list(zip(edges[::2], edges[1::2]))
    places, depths = [(0, 0)] * len(pairs), [0] * layers
    runs: list[list[tuple]] = [[] for _ in widths]
    for place, (a, b) in enumerate(pairs):
        places[place] = b, depths[b]
        runs[b].append((columns[a] // block_k, padded[a] // block_k, a % 2))
        depths[b] += padded[a]
    if nudge:
        last = layers - 1
        places.append((last, depths[last]))
        runs[last].append((column // block_k, nudge // block_k, last % 2))
        depths[last] += nudge
    panels, start = [], 0
    for layer in range(layers):
        panels.append((start, depths[layer], padded[layer]))
        start += depths[layer] * padded[layer]
    rows, walks = list[tuple](), list[tuple]()
    many = sum(padded) // block_n
    for layer in order:
        at = _FIELDS * many + 3 * len(walks)
        walks += runs[layer]
        for block in range(padded[layer] // block_n):
            rows.append(
                (
                    at,
                    len(runs[layer]),
                    panels[layer][0] // (block_k * block_n),
                    padded[layer] // block_n,
                    columns[layer] // block_n + block,
                    block,
                    layer % 2,
                    int(layer == layers - 1),
                )
            )
    even = sum(padded[::2]) // block_n
    table = [field for row in [*rows, *walks] for field in row]
    return table, columns, column, column + nudge, [(0, even), (even, many - even)], panels, places


def packed_weights(plan: Plan, weights: list[Tensor], last: Tensor | None, units: int) -> Tensor:
    """All weights in one buffer, a panel a layer; last: the readout, which the nudge passes backwards, or None: it
    comes to the last layer's units as it is."""
    buffer = torch.zeros(plan.weights, dtype=torch.float32, device=plan.table.device)

    def panel(place, rows, columns):
        layer, row = place
        offset, depth, width = plan.panels[layer]
        return buffer[offset : offset + depth * width].view(depth, width)[row : row + rows, :columns]

    for place, w in zip(plan.places, weights):
        panel(place, *w.shape).copy_(w)
    if len(plan.places) > len(weights):
        if last is None:
            panel(plan.places[-1], units, units).diagonal().fill_(1.0)
        else:
            panel(plan.places[-1], *last.t().shape).copy_(last.t())
    return buffer


def padded(tensor: Tensor, *shape: int, value: float = 0.0) -> Tensor:
    """A float32 copy in the corner of a larger one."""
    out = torch.full(shape, value, dtype=torch.float32, device=tensor.device)
    out[tuple(slice(n) for n in tensor.shape)].copy_(tensor)
    return out
