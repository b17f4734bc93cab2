"""The cases of tests/lls/test_loss.py on a CUDA device."""

from tests.lls.test_loss import test_layouts  # noqa: F401
from tests.support.gpu import backend, on_the_device  # noqa: F401
