"""What the local losses take besides tensors."""

from typing import NamedTuple


class ContrastiveOptions(NamedTuple):
    """Of a contrastive loss: the first `anchors` rows are anchors; `factor` multiplies the loss; `exclude`: the mean is
    over the anchors that have positives."""

    anchors: int
    temperature: float
    factor: float
    normalize: bool
    exclude: bool
