"""The cases of tests/ops/test_lls.py on a CUDA device."""
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.ops.test_lls import (test_basis_of_the_users, test_dtypes, test_layouts,  # noqa: E402,F401
                                test_layouts_of_the_incoming_gradient, test_loss_and_gradients, test_options,
                                test_reduced_set, test_zero_norm_row)
