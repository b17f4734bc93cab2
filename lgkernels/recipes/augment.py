"""Augmentation on whole batches, with a generator that the caller seeds. Draws happen on the CPU."""

import math

import torch
import torch.nn.functional as F


def random_crop(images, size, padding, generator):
    """(B, C, H, W) -> (B, C, size, size): its own offset for each image, after zero padding on every side."""
    padded = F.pad(images, (padding,) * 4) if padding else images
    batch, _, height, width = padded.shape
    if height < size or width < size:
        raise ValueError(f"images must be at least {size} x {size} after padding, got {height} x {width}")
    top = torch.randint(0, height - size + 1, (batch, 1), generator=generator)
    left = torch.randint(0, width - size + 1, (batch, 1), generator=generator)
    rows, columns = (start + torch.arange(size) for start in (top, left))
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def center_crop(images, size):
    top, left = ((n - size) // 2 for n in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def random_flip(images, generator):
    """Mirrors each image left to right with probability 1/2."""
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def random_erase(images, probability, generator, scale=(0.02, 0.33), ratio=(0.3, 3.3)):
    """Zeroes one rectangle of each image with `probability`: area in `scale` of the image, aspect in `ratio` (log).

    A rectangle that does not fit is drawn again, ten times at most, as torchvision does.
    """
    batch, _, height, width = images.shape
    tries = 10
    area = height * width * torch.empty(batch, tries).uniform_(*scale, generator=generator)
    aspect = torch.empty(batch, tries).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = (t.gather(1, first) for t in (h, w))
    top = (torch.rand(batch, 1, generator=generator) * (height - h + 1)).floor()
    left = (torch.rand(batch, 1, generator=generator) * (width - w + 1)).floor()
    chosen = (torch.rand(batch, 1, generator=generator) < probability) & fits.any(1, keepdim=True)
    row, column = torch.arange(height), torch.arange(width)
    inside = (
        ((row >= top) & (row < top + h)).unsqueeze(2)
        & ((column >= left) & (column < left + w)).unsqueeze(1)
        & chosen.unsqueeze(2)
    )
    return images.masked_fill(inside.unsqueeze(1), 0)
