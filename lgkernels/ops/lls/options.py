"""The options of the family lls as values: from the op's door to the kernels' structs."""

from typing import NamedTuple

# The words that options may be.
WAVEFORMS = ("square", "cosine")
LOSSES = ("cross_entropy", "hard_sigmoid_mse")
REDUCTIONS = ("mean", "sum", "none")


class HeadOptions(NamedTuple):
    """Of `lls_loss`, in its words; flat in the ops' schemas."""

    num_classes: int
    temperature: float = 0.5
    label_smoothing: float = 0.0
    normalize: bool = True
    eps: float = 1e-12
    zero_gradient_below_eps: bool = False
    basis_scale: float = 1.0
    loss: str = "cross_entropy"
    ignore_index: int = -100
    reduction: str = "mean"


class BlockOptions(NamedTuple):
    """Of the fused block: its layer's geometry, its norm, its activation and its head."""

    waveform: str
    stride: list[int]
    padding: list[int]
    momentum: float
    norm_eps: float
    negative_slope: float
    max_pool: bool
    num_classes: int
    pool_size: int
    temperature: float
    label_smoothing: float

    @property
    def head(self) -> HeadOptions:
        return HeadOptions(self.num_classes, self.temperature, self.label_smoothing)


class Wanted(NamedTuple):
    """Which gradients of a fused block."""

    compute_grad: bool
    needs_weight: bool
    needs_modulation: bool


class Capabilities(NamedTuple):
    """What a backend can do beyond the functions of `reference.py`: its `CAPABILITIES`."""

    packed_basis: bool = False  # `head` also reads the sign bits of `basis.signs`
    finishes_head: bool = False  # the launch of the norm's gradients takes the head's last sums (`finish`)
    converts_layouts: bool = False  # has to_channels_last and to_contiguous, and takes out_channels_last
    whole_block: bool = False  # has `block`, the results of block.py's `forward`, in place of its pieces
