"""Drop-in modules."""
from .alignment import alignment, weight_ratio
from .classifier import ClassifierBlock
from .convert import convert, feedback_state, load_feedback_state, redraw_after
from .direct import DirectFeedback
from .feedback import FeedbackAlignmentConv2d, FeedbackAlignmentLinear, SignSymmetricConv2d, SignSymmetricLinear
from .lls import LLSConvBlock, LLSHead, LLSLinearBlock

__all__ = ["ClassifierBlock", "DirectFeedback", "FeedbackAlignmentConv2d", "FeedbackAlignmentLinear", "LLSConvBlock",
           "LLSHead", "LLSLinearBlock", "SignSymmetricConv2d", "SignSymmetricLinear", "alignment", "convert",
           "feedback_state", "load_feedback_state", "redraw_after", "weight_ratio"]
