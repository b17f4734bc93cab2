"""The cases of tests/feedback/test_kernels.py on a CUDA device."""

from tests.feedback.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device  # noqa: F401
