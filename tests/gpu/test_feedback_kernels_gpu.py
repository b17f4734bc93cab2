"""The cases of tests/ops/test_feedback_kernels.py on a CUDA device."""

import pytest
import torch

import lgkernels.functional  # noqa: F401  registers the ops

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.ops.test_feedback_kernels import *  # noqa: F403
