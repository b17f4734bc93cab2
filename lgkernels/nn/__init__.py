"""Drop-in modules."""
from .classifier import ClassifierBlock
from .lls import LLSConvBlock, LLSHead, LLSLinearBlock

__all__ = ["ClassifierBlock", "LLSConvBlock", "LLSHead", "LLSLinearBlock"]
