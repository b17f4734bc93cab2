"""Drop-in modules."""

from .adapter import LoKrConv2d, LoKrLinear, LoRALinear, adapt, merge, unmerge
from .alignment import alignment, weight_ratio
from .classifier import ClassifierBlock
from .convert import convert, feedback_state, load_feedback_state, redraw_after
from .direct import DirectFeedback
from .feedback import FeedbackAlignmentConv2d, FeedbackAlignmentLinear, SignSymmetricConv2d, SignSymmetricLinear
from .lls import LLSConvBlock, LLSHead, LLSLinearBlock
from .local import ContrastiveHead, ForwardForwardLayer, InfoProUnit, LocalClassifier, PredSimHead, infopro_weights

__all__ = [
    "ClassifierBlock",
    "ContrastiveHead",
    "DirectFeedback",
    "FeedbackAlignmentConv2d",
    "FeedbackAlignmentLinear",
    "ForwardForwardLayer",
    "InfoProUnit",
    "LLSConvBlock",
    "LLSHead",
    "LLSLinearBlock",
    "LoKrConv2d",
    "LoKrLinear",
    "LoRALinear",
    "LocalClassifier",
    "PredSimHead",
    "SignSymmetricConv2d",
    "SignSymmetricLinear",
    "adapt",
    "alignment",
    "convert",
    "feedback_state",
    "infopro_weights",
    "load_feedback_state",
    "merge",
    "redraw_after",
    "unmerge",
    "weight_ratio",
]
