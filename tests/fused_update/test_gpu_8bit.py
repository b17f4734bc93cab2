"""The cases of tests/fused_update/test_8bit.py on a CUDA device."""

import pytest

from tests.fused_update.test_8bit import *  # noqa: F403
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401

pytestmark = pytest.mark.op("fused_update_")
