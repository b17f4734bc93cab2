"""`pytest -p tests.support.native_at`: the native module that lies at LGK_NATIVE stands in for the package's own."""

import importlib.util
import os
import sys

import torch  # noqa: F401  before the module, so that both share one OpenMP pool

import lgkernels

_spec = importlib.util.spec_from_file_location("lgkernels._C", os.environ["LGK_NATIVE"])
assert _spec is not None and _spec.loader is not None
lgkernels._C = sys.modules["lgkernels._C"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lgkernels._C)
