"""Optimizers for rules that carry signs or offsets, and a linear layer's step fused into its weight gradient.

An optimizer is one line here, and its public names are the `__all__` of its file.
"""
# ruff: noqa: F403

from types import ModuleType as _Module

from .fused import *
from .manhattan import *
from .offset import *
from .offset_refresh import *
from .offset_wrapper import *
from .zeroth_order import *
from .zeroth_order_log import *

__all__ = sorted(name for name, value in vars().items() if name[0] != "_" and not isinstance(value, _Module))
