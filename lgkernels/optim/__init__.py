"""Optimizers."""
from .offset import OffsetOptimizer, OffsetSGD, refresh_due

__all__ = ["OffsetOptimizer", "OffsetSGD", "refresh_due"]
