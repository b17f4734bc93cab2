"""Optimizers for rules that carry signs, and a linear layer's step fused into its weight gradient."""
from .fused import FusedUpdate, fuse_update
from .manhattan import BatchManhattan

__all__ = ["BatchManhattan", "FusedUpdate", "fuse_update"]
