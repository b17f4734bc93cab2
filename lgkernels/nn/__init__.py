"""Drop-in modules."""
from .classifier import ClassifierBlock
from .lls import LLSConvBlock, LLSHead, LLSLinearBlock

from .adapter import LoKrConv2d, LoKrLinear, LoRALinear, adapt, merge, unmerge  # isort: skip

__all__ = ["ClassifierBlock", "LLSConvBlock", "LLSHead", "LLSLinearBlock"]
__all__ += ["LoKrConv2d", "LoKrLinear", "LoRALinear", "adapt", "merge", "unmerge"]
