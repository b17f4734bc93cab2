"""The networks that the rules tune, and the weights that they start from: files, pre-training, adapters."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as lnn
from ..training import BackpropTrainer
from . import models, rules
from .checkpoint import CheckpointError
from .data import Dataset
from .networks import Part

# Of the rules that start from a network that has weights.
TUNING = rules.Defaults(optimizer="sgd", rates={"sgd": 3e-3})


def network(model: str, in_channels: int, num_classes: int) -> nn.Sequential:
    """An `nn.Sequential` of parts that are not cut; a module without parameters joins the next part."""
    parts: list[nn.Module] = []
    waiting: list[nn.Module] = []
    for block in models.usual(model, in_channels, num_classes):
        waiting.append(block)
        if any(True for _ in block.parameters()):
            parts.append(Part(*waiting) if len(waiting) > 1 or type(block) is nn.Sequential else block)
            waiting = []
    return nn.Sequential(*parts, *waiting)


def start(settings: Any, dataset: Dataset, given: Mapping[str, Tensor] | None = None) -> nn.Sequential:
    """The network of `settings` (`settings.Settings`) from the weights `given` (None: random ones), with its adapters,
    on its device."""
    model = network(settings.model, dataset.channels, dataset.classes)
    if given is not None:
        load(model, given)
    if settings.adapter:
        model = _adapted(model, settings.adapter)
    if settings.frozen_statistics:
        freeze_statistics(model)
    return model.to(settings.device)


def check_start(settings: Any, dataset: Dataset) -> None:
    """What is wrong with the given weights or adapter, said before anything is written."""
    if settings.weights or settings.adapter:
        model = network(settings.model, dataset.channels, dataset.classes)
        if settings.weights:
            load(model, read(settings.weights))
        if settings.adapter:
            _adapted(model, settings.adapter)


def head(model: nn.Module) -> str:
    """Qualified name of the classifier: the last linear layer."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _adapted(model: nn.Sequential, kind: str) -> nn.Sequential:
    try:
        return lnn.adapt(model, kind, train_head=[head(model)], verbose=False)
    except ValueError as error:
        raise CheckpointError(f"--adapter {kind} does not fit --model: {error}") from None


# -- files ---------------------------------------------------------------------------------------------------------


def read(path: Any) -> dict[str, Tensor]:
    """State dict of a file: safetensors, or torch's (tensors alone, nothing is executed)."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    except Exception as error:  # many kinds, all of them: this is no file of weights
        raise CheckpointError(f"--weights {path} cannot be read ({str(error).splitlines()[0]})") from None


_NAMES = (  # torchvision's and timm's -> ours
    (r"conv1\.", "0.0."),
    (r"bn1\.", "0.1."),
    (r"fc\.", "HEAD."),
    (r"(class_token|cls_token)$", "0.cls_token"),
    (r"(encoder\.pos_embedding|pos_embed)$", "0.pos_embed"),
    (r"(conv_proj|patch_embed\.proj)\.", "0.proj."),
    (r"(encoder\.ln|norm)\.", "NORM."),
    (r"(heads\.head|head)\.", "HEAD."),
    (r"(encoder\.layers\.encoder_layer_|blocks\.)(\d+)\.", lambda m: f"{int(m[2]) + 1}."),
)
_INNER = (
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("self_attention.in_proj_", "qkv."),
    ("self_attention.out_proj.", "proj."),
    ("attn.", ""),
    ("mlp.linear_1.", "fc1."),
    ("mlp.linear_2.", "fc2."),
    ("mlp.0.", "fc1."),
    ("mlp.3.", "fc2."),
    ("mlp.", ""),
)


def translated(state: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """A state dict under our names."""
    found = (re.match(r"layer(\d+)\.(\d+)\.", name) for name in state)
    stages = sorted({(int(match[1]), int(match[2])) for match in found if match})
    last = int(head.split(".")[0])
    result = {}
    for name, tensor in state.items():
        name = re.sub(r"layer(\d+)\.(\d+)\.", lambda m: f"{1 + stages.index((int(m[1]), int(m[2])))}.", name)
        for pattern, ours in _NAMES:
            if re.match(pattern, name):
                name = re.sub("^" + pattern, ours, name)
                break
        for theirs, ours in _INNER:
            name = name.replace("." + theirs, "." + ours)
        result[name.replace("NORM", str(last - 1)).replace("HEAD", head)] = tensor
    return result


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `model`, all but the classifier: our own state dict, or torchvision's or timm's of the same
    ResNet or vision transformer."""
    last = head(model)
    wanted = {
        name: t
        for name, t in model.state_dict().items()
        if not name.startswith(last + ".") and not name.endswith("num_batches_tracked")
    }
    if not wanted.keys() <= state.keys():
        state = translated(state, last)
    for name, mine in wanted.items():
        found = state.get(name)
        if found is None or found.shape != mine.shape:
            raise CheckpointError(
                f"--weights: expected a tensor {name} of shape {tuple(mine.shape)}, got "
                f"{'none' if found is None else tuple(found.shape)}: the file is of another network"
            )
        with torch.no_grad():
            mine.copy_(found)


# -- batch normalisation -------------------------------------------------------------------------------------------


class _FrozenStatistics:
    def train(self, mode=True):
        return super().train(False)


_FROZEN = {
    kind: type(f"Frozen{kind.__name__}", (_FrozenStatistics, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d)
}


def freeze_statistics(model):
    """Batch normalisation uses its running statistics from now on, in training too; its affine part still learns."""
    for module in model.modules():
        if type(module) in _FROZEN:
            module.__class__ = _FROZEN[type(module)]
            module.eval()


# -- pre-training --------------------------------------------------------------------------------------------------


def pretrain(settings: Any, dataset: Dataset, report: Callable[[str], None] = lambda text: None) -> dict[str, Tensor]:
    """State dict of the network after `settings.pretrain` epochs of back-propagation on half of the classes."""
    torch.manual_seed(settings.seed)
    model = network(settings.model, dataset.channels, dataset.classes).to(settings.device)
    images, labels = dataset.train
    chosen = (labels < dataset.classes // 2).nonzero().flatten()
    epochs, size = settings.pretrain, settings.batch_size
    steps = epochs * (len(chosen) // size)
    if not steps:
        raise CheckpointError(
            f"--pretrain: half of the classes have {len(chosen)} images, fewer than a batch of {size}"
        )
    trainer = BackpropTrainer(
        [model],
        lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.01),
        scheduler_factory=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 4e-3, total_steps=steps),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(epochs):
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        correct = 0
        for i in range(len(chosen) // size):
            x, target = dataset.training_batch(order[i * size : (i + 1) * size], generator)
            x, target = x.to(settings.device), target.to(settings.device)
            trainer.step(x, target)
            trainer.scheduler_step()
            correct += (trainer.output.argmax(1) == target).sum()
        report(
            f"pre-training on {dataset.classes // 2} classes, epoch {epoch + 1}/{epochs}: training accuracy "
            f"{100 * correct.item() / (len(chosen) // size * size):.2f} %"
        )
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
