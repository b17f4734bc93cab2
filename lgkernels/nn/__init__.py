"""Drop-in modules."""
from .classifier import ClassifierBlock
from .lls import LLSConvBlock, LLSHead, LLSLinearBlock

from .adapter import LoKrConv2d, LoKrLinear, LoRALinear, adapt, merge, unmerge  # isort: skip
from .local import ContrastiveHead, ForwardForwardLayer, LocalClassifier, PredSimHead  # isort: skip

__all__ = ["ClassifierBlock", "LLSConvBlock", "LLSHead", "LLSLinearBlock"]
__all__ += ["LoKrConv2d", "LoKrLinear", "LoRALinear", "adapt", "merge", "unmerge"]
__all__ += ["ContrastiveHead", "ForwardForwardLayer", "LocalClassifier", "PredSimHead"]
