"""The cases of tests/feedback/test_kernels.py on a CUDA device."""

import pytest

from tests.feedback.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401

pytestmark = pytest.mark.op("feedback_product", "feedback_matrix", "feedback_rows", "feedback_pack_signs")
