"""Networks as lists of parts, for the rules that need no head of their own in each layer.

AlexNet and ResNet-18 are those of the sign-symmetry paper (Xiao, Chen, Liao, Poggio, ICLR 2019); ResNet-50 and ViT-B/16
are torchvision's and timm's, parameter for parameter and in their order, so that files of their weights fit
(`weights.load`); the small ones are for the embedded images.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Part(nn.Sequential):
    """A sequence that `split_blocks` does not cut."""


def alexnet(in_channels, num_classes):
    """AlexNet of the sign-symmetry paper: batch normalisation before every ReLU, no bias before it, no dropout.

    Images of 63 x 63 or more (the paper's: 224).
    """

    def layers(layer, pool=False):
        width = layer.weight.shape[0]
        norm = nn.BatchNorm2d(width) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(width)
        return nn.Sequential(layer, norm, nn.ReLU(), *([nn.MaxPool2d(3, 2)] if pool else []))

    return [
        layers(nn.Conv2d(in_channels, 64, 11, 4, 2, bias=False), pool=True),
        layers(nn.Conv2d(64, 192, 5, padding=2, bias=False), pool=True),
        layers(nn.Conv2d(192, 384, 3, padding=1, bias=False)),
        layers(nn.Conv2d(384, 256, 3, padding=1, bias=False)),
        layers(nn.Conv2d(256, 256, 3, padding=1, bias=False), pool=True),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        layers(nn.Linear(256 * 36, 4096, bias=False)),
        layers(nn.Linear(4096, 4096, bias=False)),
        nn.Linear(4096, num_classes),
    ]


class _Residual(nn.Module):
    def _shortcut(self, inputs, outputs, stride):
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def _joined(self, out, x):
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(_Residual):
    """ResNet's block of two 3x3 convolutions; one block too for the direct rules, skip included."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self._shortcut(inputs, outputs, stride)

    def forward(self, x):
        return self._joined(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))), x)


class Bottleneck(_Residual):
    """ResNet's block of 1x1, 3x3 (which has the stride) and 1x1 convolutions, four times as wide at its end."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        width = outputs // 4
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self._shortcut(inputs, outputs, stride)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self._joined(self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out))))), x)


def _resnet(stem, block, widths, strides, classes):
    """Convolutions drawn from N(0, 2 / (k^2 O))."""
    inputs = (stem[0].out_channels, *widths)
    blocks = [stem, *(block(i, o, stride) for i, o, stride in zip(inputs, widths, strides))]
    for part in blocks:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]


def _imagenet_stem(in_channels):
    return Part(nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def resnet18(in_channels, num_classes):
    """ResNet-18 of the sign-symmetry paper: torchvision's first version."""
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    return _resnet(_imagenet_stem(in_channels), BasicBlock, widths, (1, 1, 2, 1, 2, 1, 2, 1), num_classes)


def resnet50(in_channels, num_classes):
    counts = (3, 4, 6, 3)
    widths = [256 * 2**i for i, n in enumerate(counts) for _ in range(n)]
    strides = [2 if i and j == 0 else 1 for i, n in enumerate(counts) for j in range(n)]
    return _resnet(_imagenet_stem(in_channels), Bottleneck, widths, strides, num_classes)


def small_resnet(in_channels, num_classes):
    """For images of 28 or 32: a stem of stride 2 and four blocks, 16 to 64 channels wide."""
    stem = Part(nn.Conv2d(in_channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return _resnet(stem, BasicBlock, (16, 32, 64, 64), (1, 2, 2, 1), num_classes)


class Embedding(nn.Module):
    """Patches as tokens, a class token before them, learned positions."""

    def __init__(self, in_channels, patch, dim, image):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, dim))
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed


class EncoderBlock(nn.Module):
    """Pre-norm transformer block, timm's."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FirstToken(nn.Module):
    def forward(self, x):
        return x[:, 0]


def vit(in_channels, num_classes, *, image, patch, dim, depth, heads):
    return [
        Embedding(in_channels, patch, dim, image),
        *(EncoderBlock(dim, heads) for _ in range(depth)),
        nn.LayerNorm(dim, 1e-6),
        FirstToken(),
        nn.Linear(dim, num_classes),
    ]


def vit_b_16(in_channels, num_classes):
    """ViT-B/16 for images of 224 x 224."""
    return vit(in_channels, num_classes, image=224, patch=16, dim=768, depth=12, heads=12)


def small_vit(in_channels, num_classes):
    """For images of 28 x 28: patches of 4, four blocks of 64."""
    return vit(in_channels, num_classes, image=28, patch=4, dim=64, depth=4, heads=4)


NETWORKS = {
    "alexnet": alexnet,
    "resnet18": resnet18,
    "resnet-small": small_resnet,
    "resnet50": resnet50,
    "vit-small": small_vit,
    "vit-b-16": vit_b_16,
}
SMALLEST_IMAGE = {"alexnet": 63}
IMAGE = {"vit-b-16": 224, "vit-small": 28}  # the one size that fits
