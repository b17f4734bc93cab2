"""The cases of tests/lls/test_kernels.py on a CUDA device."""

import pytest

from tests.lls.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401

pytestmark = pytest.mark.op("lls_loss", "lls_block")
