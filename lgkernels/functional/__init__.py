"""The public functions, a module a family."""

from . import adapter, feedback, lls, local_loss
from .adapter import *  # noqa: F403
from .feedback import *  # noqa: F403
from .lls import *  # noqa: F403
from .local_loss import *  # noqa: F403

__all__ = sorted(adapter.__all__ + feedback.__all__ + lls.__all__ + local_loss.__all__)
