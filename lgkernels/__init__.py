"""Fused kernels for training neural networks without (full) back-propagation."""
__version__ = "0.1.0"
