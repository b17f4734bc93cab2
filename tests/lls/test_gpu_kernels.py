"""The cases of tests/lls/test_kernels.py on a CUDA device."""

from tests.lls.test_kernels import *  # noqa: F403
from tests.support.gpu import backend, on_the_device  # noqa: F401
