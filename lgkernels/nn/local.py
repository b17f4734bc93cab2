"""Blocks with a local loss: `forward(x, target)` -> `(out.detach(), loss)`, as `training.BlockwiseTrainer` takes them."""
import torch
from torch import nn

from .. import functional as LF
from ..core import checks
from ..ops.local_loss import autograd as _local


class _LocalHead(nn.Module):
    """Wraps `block`: in training with a target, the detached output and the loss; else the output with its graph."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, target=None):
        if target is None or not self.training:
            return self.block(x)
        out = self.block(x.detach())
        return out.detach(), self.loss(out, target)

    def loss(self, out, target):
        raise NotImplementedError


def _pooled(out):
    return out.mean((2, 3)) if out.dim() == 4 else out.mean(1) if out.dim() == 3 else out


class LocalClassifier(_LocalHead):
    """A block trained by a linear classifier of its pooled output: :func:`lgkernels.functional.local_cross_entropy`.

    Args:
        block (nn.Module): gives (B, C, H, W), (B, T, C) or (B, C).
        channels (int): C. num_classes (int). bias (bool): of the classifier.
        label_smoothing (float): in [0, 1].

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.LocalClassifier(torch.nn.Conv2d(3, 8, 3), 8, 5)
        >>> out, loss = block(torch.ones(2, 3, 6, 6), torch.tensor([0, 4]))
        >>> out.requires_grad, loss.requires_grad
        (False, True)
    """

    def __init__(self, block, channels, num_classes, *, bias=True, label_smoothing=0.0):
        super().__init__(block)
        self.head = nn.Linear(channels, num_classes, bias)
        self.label_smoothing = label_smoothing

    def loss(self, out, target):
        return LF.local_cross_entropy(out, self.head.weight, self.head.bias, target,
                                      label_smoothing=self.label_smoothing)


class ForwardForwardLayer(nn.Module):
    """Forward-Forward: normalise each sample, apply the layer, compare its goodness with a threshold.

    ``forward(x, is_positive)`` returns ``(out.detach(), loss)``; without ``is_positive``, or in evaluation, the output.

    Args:
        layer (nn.Module): activation included, e.g. ``nn.Sequential(nn.Linear(784, 500), nn.ReLU())``.
        threshold (float), goodness (str): of :func:`lgkernels.functional.goodness_loss`.
        normalize (str): of the input: ``"l2"``: by its norm + eps (mpezeshki, eps 1e-4); ``"rms"``: by its root mean
            square + eps (loweX, eps 1e-8); ``"none"``.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.ForwardForwardLayer(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
        >>> out, loss = layer(torch.ones(2, 4), torch.tensor([True, False]))
        >>> out.shape
        torch.Size([2, 8])
    """

    def __init__(self, layer, *, threshold=2.0, goodness="mean", normalize="l2", eps=None):
        super().__init__()
        checks.choice("goodness", goodness, ("mean", "sum"))
        checks.choice("normalize", normalize, ("l2", "rms", "none"))
        self.layer, self.threshold, self.goodness, self.normalize = layer, threshold, goodness, normalize
        self.eps = (1e-4 if normalize == "l2" else 1e-8) if eps is None else eps

    def normalized(self, x):
        if self.normalize == "none":
            return x
        norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
        if self.normalize == "rms":
            norm = norm / x.shape[1:].numel() ** 0.5
        return x / (norm + self.eps)

    def forward(self, x, is_positive=None):
        if is_positive is None or not self.training:
            return self.layer(self.normalized(x))
        h = self.layer(self.normalized(x.detach()))
        return h.detach(), LF.goodness_loss(h, is_positive, threshold=self.threshold, goodness=self.goodness)

    def goodness_of(self, x):
        """(B,) goodness of each sample: the argument of the prediction by largest goodness."""
        h = self.layer(self.normalized(x))
        squares = _local.reference.wide(h).square().flatten(1)
        return squares.mean(1) if self.goodness == "mean" else squares.sum(1)


class PredSimHead(_LocalHead):
    """Nokland and Eidnes' predsim: :func:`lgkernels.functional.prediction_similarity_loss`.

    Args:
        block (nn.Module): gives (B, C, H, W) or (B, N).
        shape (tuple): of the block's output for one sample: (C, H, W) or (N,).
        num_classes (int), beta (float), use_std (bool): of the loss.
        sim_head (str): ``"layer"``: the authors' 3x3 convolution C -> C (or linear N -> N), which can cost more than the
            block; ``"identity"``.
        decoder_dim (int): the decoder's average pool doubles its window, rows and columns in turn, until at most so
            many features are left.

    The decoder starts at 0, as the authors'.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.PredSimHead(torch.nn.Conv2d(3, 8, 3), (8, 4, 4), 5, decoder_dim=32)
        >>> out, loss = block(torch.randn(4, 3, 6, 6), torch.tensor([0, 4, 1, 0]))
        >>> block.decoder
        Linear(in_features=32, out_features=5, bias=True)
    """

    def __init__(self, block, shape, num_classes, *, beta=0.99, use_std=True, sim_head="layer", decoder_dim=4096):
        super().__init__(block)
        checks.choice("sim_head", sim_head, ("layer", "identity"))
        self.num_classes, self.beta, self.use_std = num_classes, beta, use_std
        self.pool = [1, 1]
        features = shape[0]
        if len(shape) == 3:
            size = lambda: [-(-n // k) for n, k in zip(shape[1:], self.pool)]  # noqa: E731
            turn = 0
            while features * size()[0] * size()[1] > decoder_dim and size() != [1, 1]:
                self.pool[turn % 2] *= 2
                turn += 1
            features *= size()[0] * size()[1]
        # sizes that the window does not divide are padded, as the authors do
        self.padding = [k // 2 if n % k else 0 for n, k in zip(shape[1:], self.pool)]
        self.sim = None
        if sim_head == "layer":
            self.sim = (nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False) if len(shape) == 3 else
                        nn.Linear(shape[0], shape[0], bias=False))
        self.decoder = nn.Linear(features, num_classes)
        nn.init.zeros_(self.decoder.weight)

    def loss(self, out, target):
        pool = dict(pool_kernel=tuple(self.pool), pool_padding=tuple(self.padding)) if out.dim() == 4 else {}
        return LF.prediction_similarity_loss(
            out, target, None if self.sim is None else self.sim.weight, self.decoder.weight, self.decoder.bias,
            num_classes=self.num_classes, beta=self.beta, use_std=self.use_std, **pool)


class ContrastiveHead(_LocalHead):
    """A block trained by a contrastive loss of its pooled and projected output (LoCo, GIM in SimCLR, InfoPro).

    Args:
        block (nn.Module): gives (B, C, H, W), (B, T, C) or (B, C).
        channels (int): C. hidden (int), dim (int): sizes of the projection's two layers; hidden 0: one layer.
        loss (str): ``"nt_xent"``: rows i and i + B/2 are two views of a sample, the target is not used; ``"supcon"``:
            rows of the same class are positives.
        temperature (float).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> block = lnn.ContrastiveHead(torch.nn.Conv2d(3, 8, 3), 8, dim=4, loss="supcon")
        >>> out, loss = block(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))
        >>> out.shape, loss.shape
        (torch.Size([4, 8, 4, 4]), torch.Size([]))
    """

    def __init__(self, block, channels, *, hidden=0, dim=128, loss="nt_xent", temperature=0.1):
        super().__init__(block)
        checks.choice("loss", loss, ("nt_xent", "supcon"))
        checks.positive("temperature", temperature)
        self.projection = nn.Linear(channels, dim) if not hidden else nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.kind, self.temperature = loss, temperature

    def loss(self, out, target):
        z = self.projection(_pooled(out))
        if self.kind == "nt_xent":
            return LF.nt_xent_loss(z, temperature=self.temperature)
        return LF.supcon_loss(z, target, temperature=self.temperature)
