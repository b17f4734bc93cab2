"""Family offset for the ahead-of-time gate: offsets of either dtype."""

import torch

from lgkernels.ops.offset import triton as offset
from lgkernels.ops.offset.options import StepOptions

MATRIX_KERNELS = set()
TABLES = {}


def cases():
    params, options = [torch.empty(512, 512)], StepOptions(0.1, 0.9, 0.0, 1.0, 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        offset.step_(params, params, params, [torch.empty(512, 512, dtype=dtype)], options)
