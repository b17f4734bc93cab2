"""Optimizers for rules that carry signs or offsets, and a linear layer's step fused into its weight gradient."""

from .fused import FusedUpdate, fuse_update
from .manhattan import BatchManhattan
from .offset import OffsetSGD
from .offset_refresh import refresh_due, refresh_offsets
from .offset_wrapper import OffsetOptimizer

__all__ = [
    "BatchManhattan",
    "FusedUpdate",
    "OffsetOptimizer",
    "OffsetSGD",
    "fuse_update",
    "refresh_due",
    "refresh_offsets",
]
