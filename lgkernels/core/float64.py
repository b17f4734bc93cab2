"""float64 for devices that have none: Apple's GPUs, and some of Intel's."""

import torch


def lacks(device: torch.device) -> bool:
    """Whether no tensor of float64 can lie on the device."""
    if device.type == "xpu":
        return not torch.xpu.get_device_properties(device).has_fp64
    return device.type == "mps"


def double(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64: on the CPU where its own device has none."""
    return (tensor.cpu() if lacks(tensor.device) else tensor).double()
