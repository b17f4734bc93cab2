"""The six memory layouts in which every tensor argument is tried: same values, other strides."""

import torch

LAYOUTS = ("dense", "transposed", "sliced", "expanded", "offset", "channels_last")


def arrange(tensor, layout):
    """`tensor`'s values in `layout`; "expanded" repeats row 0 with stride 0, so its values change."""
    if layout == "dense":
        return tensor.contiguous()
    if layout == "expanded":
        return tensor.narrow(0, 0, 1).contiguous().expand_as(tensor) if tensor.dim() and tensor.shape[0] else tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()
    if layout == "transposed":
        if tensor.dim() < 2:
            return tensor.contiguous()
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":
        # one element past the start: nothing is aligned to more than the element
        flat = tensor.new_zeros(tensor.numel() + 1)
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(tensor.shape)
    if layout == "sliced":
        # every second entry of a larger tensor, whose other entries are nan (or a number no class has)
        if tensor.dim() == 0:
            return tensor
        hole = float("nan") if tensor.is_floating_point() else 2**30
        larger = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), hole)
        larger[..., ::2] = tensor
        return larger[..., ::2]
    raise ValueError(f"layout: got {layout!r}, expected one of {LAYOUTS}")
