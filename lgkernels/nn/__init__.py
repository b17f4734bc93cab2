"""Drop-in modules. A family is one line here, and its public names are the `__all__` of its file."""
# ruff: noqa: F403

from types import ModuleType as _Module

from .adapter import *
from .alignment import *
from .convert import *
from .direct import *
from .equilibrium import *
from .feedback import *
from .forward_gradient import *
from .hopfield import *
from .lls import *
from .local_loss import *
from .local_loss_infopro import *
from .local_loss_pooled import *
from .local_loss_unlabelled import *
from .random_state import *

__all__ = sorted(name for name, value in vars().items() if name[0] != "_" and not isinstance(value, _Module))
