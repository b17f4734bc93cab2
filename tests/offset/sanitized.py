"""The step on tensors of odd sizes, run under a checker by support/sanitized.py."""

from lgkernels.ops.offset.options import StepOptions
from tests.support.problems import randn


def run(kernels, device):
    lists = [[randn(n, seed=i).to(device) for n in (8193, 7, 16, *[5] * 75)] for i in range(4)]
    lists[3][:2] = lists[3][0].bfloat16(), None
    kernels.step_(*lists, StepOptions(0.1, 0.9, 0.01, 1.0, 0.5))
    return lists[0] + lists[2]
