"""Optimizers."""
from .offset import OffsetOptimizer, OffsetSGD, refresh_due, refresh_offsets

__all__ = ["OffsetOptimizer", "OffsetSGD", "refresh_due", "refresh_offsets"]
