"""Training loops: local losses block by block, direct feedback, and back-propagation with the same interface.

A trainer is one line here, and its public names are the `__all__` of its file.
"""
# ruff: noqa: F403

from types import ModuleType as _Module

from .auxiliary import *
from .backprop import *
from .blockwise import *
from .direct import *
from .equilibrium import *
from .forward_gradient import *
from .offset import *
from .partition import *

__all__ = sorted(name for name, value in vars().items() if name[0] != "_" and not isinstance(value, _Module))
