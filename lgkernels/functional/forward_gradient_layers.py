"""The layers whose outputs `forward_gradient` perturbs: their parameters' gradients from the error at the output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.ops import without_autocast

__all__ = ["is_layer", "local_gradients"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, nn.Embedding)


def is_layer(module: nn.Module) -> bool:
    """Whether `local_gradients` knows the module: a layer of torch's, or a subclass that computes the same."""
    own = next((layer for layer in _LAYERS if isinstance(module, layer)), None)
    if own is None or isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    ):  # attention's, never called
        return False
    if module._parameters.get("weight") is None:  # computed from others: weight or spectral normalisation
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return False
    methods = ("forward", "_conv_forward")
    return all(getattr(type(module), m, None) is getattr(own, m, None) and m not in vars(module) for m in methods)


def local_gradients(layer: Any, x: Tensor, error: Tensor, wanted: dict[str, str]) -> dict[str, Tensor]:
    """Gradients of <layer(x), error> by those parameters ("weight", "bias") that are `wanted`, in error's dtype."""
    with without_autocast(error.device):
        if isinstance(layer, nn.Embedding):
            padding = -1 if layer.padding_idx is None else layer.padding_idx
            return {"weight": torch.ops.aten.embedding_dense_backward(error, x, layer.num_embeddings, padding, False)}
        gradients, x = {}, x.to(error.dtype)
        if isinstance(layer, nn.Linear):
            rows = error.reshape(-1, error.shape[-1])
            if "weight" in wanted:
                gradients["weight"] = rows.t() @ x.reshape(-1, x.shape[-1])
            if "bias" in wanted:
                gradients["bias"] = rows.sum(0)
            return gradients
        spatial = len(layer.kernel_size)
        if x.dim() == spatial + 1:
            x, error = x.unsqueeze(0), error.unsqueeze(0)
        if "weight" in wanted:
            gradients["weight"] = _convolution_weight(layer, x, error, spatial)
        if "bias" in wanted:
            gradients["bias"] = error.sum([0, *range(2, spatial + 2)])
        return gradients


def _convolution_weight(layer: Any, x: Tensor, error: Tensor, spatial: int) -> Tensor:
    stride, padding, dilation, kernel = layer.stride, layer.padding, layer.dilation, layer.kernel_size
    transposed, extra = isinstance(layer, _TRANSPOSED), (0,) * spatial
    if transposed:  # what the output has beyond the smallest that these sizes give
        smallest = [
            (x.shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1
            for i in range(spatial)
        ]
        extra = tuple(error.shape[i + 2] - smallest[i] for i in range(spatial))
    elif isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), (0,) * spatial
    weight = layer.weight.to(error.dtype)  # its values do not matter, its shape does
    sizes = (None, stride, padding, dilation, transposed, extra, layer.groups)
    return torch.ops.aten.convolution_backward(error, x, weight, *sizes, (False, True, False))[1]
