"""A dense net as the native kernels of both processors take it: StateLayer, StateEdge, StateReadout of options.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.cpu import address


class DenseNet(NamedTuple):
    """Addresses, and the tensors that lie there: they are to be kept until the kernel has run."""

    layers: list[tuple]
    edges: list[tuple]
    readout: tuple
    results: list[Tensor]
    kept: list[Tensor | None]


def _floats(tensor):
    if tensor is None or tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().float().contiguous()


def dense_net(state, drive, net, target):
    starts, drives, weights = ([_floats(v) for v in part] for part in (state, drive, net.weights))
    readout = [_floats(v) for v in (net.readout, net.readout_bias, target)]
    results = [torch.empty_like(v) for v in starts]
    drives += [None] * (len(starts) - len(drives))
    layers = [(v.shape[1], *map(address, (d, v, out))) for v, d, out in zip(starts, drives, results)]
    edges = [(a, b, address(w)) for a, b, w in zip(net.edges[::2], net.edges[1::2], weights)]
    classes = starts[-1].shape[1] if readout[0] is None else readout[0].shape[1]
    kept = [*starts, *drives, *weights, *readout]
    return DenseNet(layers, edges, (classes, *map(address, readout)), results, kept)
