"""Types that many signatures share."""

from typing import Literal

import torch

Device = torch.device | str | int | None
Int2 = int | tuple[int, int]
Waveform = Literal["square", "cosine"]
Scale = Literal["kaiming", "xavier", "inv_sqrt_fan_in", "he_fan_out", "he_fan_in"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
#: What a block returns: (detached output, loss) in training with a target, else the output.
BlockOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
