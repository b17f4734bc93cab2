"""The cases of tests/ops/test_lls.py on a CUDA device."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.ops.test_lls import test_layouts  # noqa: F401
