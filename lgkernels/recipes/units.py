"""A network cut into units of about equal memory, each but the last with a local loss of its own.

The last one has the cross entropy of the classifier in it. Source: Ren, Li (ICLR 2025); what its text leaves open is an
option of the rules, with the defaults of our reconstruction (see `optim.offset`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional as LF
from .. import nn as lnn
from ..training import partition, split_blocks
from . import augment

# (unit, the next unit, empty where that is the last, batch, number of classes, whether it is the first unit)
# -> (block with a local loss, its output for the batch)
Wrap = Callable[[nn.Sequential, nn.Sequential, Tensor, int, bool], tuple[nn.Module, Tensor]]


def local_blocks(wrap: Wrap, model: nn.Module, x: Tensor, num_classes: int, units: int = 4) -> list[nn.Module]:
    """The blocks of `BlockwiseTrainer` for `model`, cut into `units`; `x`: an example batch, which goes through it."""
    count = min(units, len(partition.chain(model)))
    blocks, training = split_blocks(model, count, input=x), model.training
    result: list[nn.Module] = []
    model.eval()
    for i, unit in enumerate(blocks[:-1]):
        ahead = blocks[i + 1] if i + 2 < count else nn.Sequential()
        with torch.no_grad():
            block, x = wrap(unit, ahead, x, num_classes, not i)
        result.append(block.to(x.device))
    model.train(training)
    return [*result, LastUnit(blocks[-1])]


def forward_forward(
    unit: nn.Sequential, ahead: nn.Sequential, x: Tensor, num_classes: int, first: bool
) -> tuple[nn.Module, Tensor]:
    """Forward-Forward's unit, calibrated with the batch."""
    block = ForwardForwardUnit(unit, num_classes, first).to(x.device)
    return block, block.calibrate(x)


def predsim(
    unit: nn.Sequential, ahead: nn.Sequential, x: Tensor, num_classes: int, first: bool
) -> tuple[nn.Module, Tensor]:
    """Prediction and similarity of the unit's output."""
    x = unit(x)
    shape = tuple(x.shape[1:] if x.dim() == 4 else x.shape[-1:])
    return lnn.PredSimHead(unit, shape, num_classes, sim_head="identity", decoder_dim=1024), x


def contrastive(
    unit: nn.Sequential, ahead: nn.Sequential, x: Tensor, num_classes: int, first: bool, *, loss: str, overlap: int = 0
) -> tuple[nn.Module, Tensor]:
    """GIM's unit; with an `overlap`, LoCo's."""
    x, ahead = unit(x), ahead[:overlap]
    y = ahead(x)
    return ContrastiveUnit(unit, ahead, y.shape[1] if y.dim() == 4 else y.shape[-1], first, loss=loss), x


class ForwardForwardUnit(nn.Module):
    """A unit trained by the goodness of its output.

    The first unit stacks three versions of the batch: with the right label drawn over its first pixels (positive), with
    a wrong one (negative), and as it is (neutral). All units hand the three on; the classifier, and back-propagation,
    see the neutral one, for which no unit keeps anything.

    A unit's input is divided by its root mean square, sample by sample, so that it does not tell the goodness of the
    unit before; and multiplied by that of the network at the start, so that a pretrained unit finds the scale that it
    knows. The threshold is the mean goodness at the start. `calibrate` sets both; without, they are 1 and 2.
    """

    def __init__(self, unit, num_classes, first):
        super().__init__()
        self.unit, self.num_classes, self.first = unit, num_classes, first
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("threshold", torch.tensor(2.0))

    @torch.no_grad()
    def calibrate(self, x):
        """Take scale and threshold from the batch x; returns the output."""
        self.scale.fill_(_rms(x).mean())
        out = self.unit(self._normalized(x))
        self.threshold.fill_(out.float().square().mean())
        return out

    def _normalized(self, x):
        return x if self.first else x * (self.scale / (_rms(x) + 1e-8))

    def _stacked(self, x, target):
        wrong = torch.randint(1, self.num_classes, target.shape, device=target.device)
        negative = (target + wrong) % self.num_classes
        overlay = [LF.overlay_label(x, label, num_classes=self.num_classes) for label in (target, negative)]
        return torch.cat([*overlay, x])

    def forward(self, x, target=None):
        if target is None or not self.training:
            return self.unit(self._normalized(x))
        x, labelled = x.detach(), 2 * len(target)
        x = self._normalized(self._stacked(x, target) if self.first else x)
        with torch.no_grad():
            neutral = self.unit(x[labelled:])
        h = self.unit(x[:labelled])
        positive = torch.arange(labelled, device=x.device) < len(target)
        # goodness relative to the threshold: its scale at the start is the network's, not ours
        loss = LF.goodness_loss(h * (2 / self.threshold).sqrt().to(h.dtype), positive)
        return torch.cat([h.detach(), neutral]), loss


def _rms(x):
    return x.float().square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt().to(x.dtype)


def second_view(x):
    """A random crop, mirrored or not, of another brightness and contrast: SimCLR's views, short of colour and blur."""
    pad = max(1, x.shape[-1] // 8)
    out = augment.random_flip(augment.random_crop(x, x.shape[-1], pad, None), None)
    jitter = lambda: 1 + 0.4 * (2 * torch.rand(len(x), 1, 1, 1, device=x.device) - 1)  # noqa: E731
    return out * jitter() + (jitter() - 1)


class ContrastiveUnit(nn.Module):
    """GIM's unit, and LoCo's: its loss is that of its output carried on through the first parts of the next unit.

    With NT-Xent the first unit stacks two views of the batch: an augmented one, and the images as they are, which the
    classifier sees. `ahead` belongs to the next unit too, which trains it further (LoCo).
    """

    def __init__(self, unit, ahead, channels, first, *, loss):
        super().__init__()
        self.unit, self.ahead, self.first = unit, ahead, first
        self.head = lnn.ContrastiveHead(
            nn.Identity(), channels, hidden=2 * channels, dim=128, loss=loss, temperature=0.1
        )

    def forward(self, x, target=None):
        if target is None or not self.training:
            return self.unit(x)
        if self.first and self.head.kind == "nt_xent":
            x = torch.cat([second_view(x), x])
        h = self.unit(x.detach())
        return h.detach(), self.head.loss(self.ahead(h), target)


class LastUnit(lnn.ClassifierBlock):
    """The unit with the classifier; of stacked versions of a batch it takes the last."""

    def forward(self, x, target=None):
        return super().forward(x if target is None or not self.training else x[-len(target) :], target)
