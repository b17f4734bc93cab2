"""Energy nets on CPUs: convolutions with a pool by the kernels of pooled_cpu.py, all else in plain torch."""

from . import energy_torch as lean
from . import pooled_cpu
from .pooled_cpu import Panels

__all__ = ["prepare", "settle"]


def kernel_of(edge, kernel):
    if edge.pool == "none" or edge.stride != 1 or not pooled_cpu.takes(kernel):
        return lean.kernel_of(edge, kernel)
    return pooled_cpu.panels(kernel, edge.padding, edge.pool)


class CpuSteps(lean.Steps):
    @staticmethod
    def up(edge, kernel, s):
        return pooled_cpu.up(kernel, s) if isinstance(kernel, Panels) else lean.up(edge, kernel, s)

    @staticmethod
    def down(edge, kernel, kept, s, high):
        if not isinstance(kernel, Panels):
            return lean.down(edge, kernel, kept, s, high)
        return pooled_cpu.down(kernel, kept, s, high)


def prepare(net, weights, x):
    return lean.prepare(net, weights, x, kernel_of) if len(x) else lean.prepare(net, weights, x)


def settle(net, weights, x, states, target, betas, steps, schedule, ready=None):
    """As energy.settle, without a graph."""
    ready = prepare(net, weights, x) if ready is None else ready
    return lean.settle(net, weights, x, states, target, betas, steps, schedule, ready, CpuSteps)
