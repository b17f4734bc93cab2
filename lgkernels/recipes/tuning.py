"""Tuning a network unit by unit: Forward-Forward, LoCo, GIM, predsim, plain or BP-modified, beside back-propagation.

A network (`networks`, or a table of `models`) is cut into units of about equal memory. Every unit but the last has a
local loss of its own; the last one has the cross entropy of the classifier in it. `<rule>-bpm` is the same with
`OffsetSGD` and a refresh of the offsets every period. Source: Ren, Li (ICLR 2025); what its text leaves open is an
option here, with the defaults of our reconstruction (see `optim.offset`).
"""

import re

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from .. import functional as LF
from .. import nn as lnn
from .. import optim
from ..training import BackpropTrainer, BlockwiseTrainer, partition, planner, split_blocks
from . import augment, models
from .checkpoint import CheckpointError
from .networks import Part

LOCAL = ("forward-forward", "loco", "gim", "predsim")
MODIFIED = tuple(f"{rule}-bpm" for rule in LOCAL)
RIVALS = ("bp-accumulate", "bp-checkpoint")
RULES = (*LOCAL, *MODIFIED, *RIVALS)
MICRO_BATCHES = 8  # of bp-accumulate


def is_bp(rule):
    return rule == "bp" or rule in RIVALS


def applies(settings, rule):
    """Whether the rule trains a network built here: always for `RULES`, for bp where it starts from given weights."""
    return rule in RULES or rule == "bp" and any(settings.get(key) for key in ("pretrain", "weights", "adapter"))


# -- networks and weights ------------------------------------------------------------------------------------------


def network(model, in_channels, num_classes):
    """An `nn.Sequential` of parts that are not cut; a module without parameters joins the next part."""
    parts, waiting = [], []
    for block in models.build(model, "bp", in_channels=in_channels, num_classes=num_classes):
        waiting.append(block)
        if any(True for _ in block.parameters()):
            parts.append(Part(*waiting) if len(waiting) > 1 or type(block) is nn.Sequential else block)
            waiting = []
    return nn.Sequential(*parts, *waiting)


def _head(model):
    """Qualified name of the classifier: the last linear layer."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def read_weights(path):
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


def _translated(state, head):
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


def load_weights(model, state):
    """Copy `state` into `model`, all but the classifier: our own state dict, or torchvision's or timm's of the same
    ResNet or vision transformer."""
    head = _head(model)
    wanted = {
        name: t
        for name, t in model.state_dict().items()
        if not name.startswith(head + ".") and not name.endswith("num_batches_tracked")
    }
    if not wanted.keys() <= state.keys():
        state = _translated(state, head)
    for name, mine in wanted.items():
        found = state.get(name)
        if found is None or found.shape != mine.shape:
            raise CheckpointError(
                f"--weights: expected a tensor {name} of shape {tuple(mine.shape)}, got "
                f"{'none' if found is None else tuple(found.shape)}: the file is of another network"
            )
        with torch.no_grad():
            mine.copy_(found)


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


def pretrain(settings, dataset, report=lambda text: None):
    """State dict of the network after `settings["pretrain"]` epochs of back-propagation on half of the classes."""
    torch.manual_seed(settings["seed"])
    model = network(settings["model"], dataset.channels, dataset.classes).to(settings["device"])
    images, labels = dataset.train
    chosen = (labels < dataset.classes // 2).nonzero().flatten()
    epochs, size = settings["pretrain"], settings["batch_size"]
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
    generator = torch.Generator().manual_seed(settings["seed"])
    for epoch in range(epochs):
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        correct = 0
        for i in range(len(chosen) // size):
            x, target = dataset.training_batch(order[i * size : (i + 1) * size], generator)
            x, target = x.to(settings["device"]), target.to(settings["device"])
            trainer.step(x, target)
            trainer.scheduler_step()
            correct += (trainer.output.argmax(1) == target).sum()
        report(
            f"pre-training on {dataset.classes // 2} classes, epoch {epoch + 1}/{epochs}: training accuracy "
            f"{100 * correct.item() / (len(chosen) // size * size):.2f} %"
        )
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


# -- units with their local losses ---------------------------------------------------------------------------------


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


def local_blocks(rule, model, x, num_classes, *, units=4, overlap=1, contrast="nt_xent"):
    """The blocks of `BlockwiseTrainer` for `model`; `x`: an example batch, which Forward-Forward calibrates with."""
    count = min(units, len(partition.chain(model)))
    blocks, training = split_blocks(model, count, input=x), model.training
    result = []
    model.eval()
    for i, unit in enumerate(blocks[:-1]):
        with torch.no_grad():
            if rule == "forward-forward":
                result.append(ForwardForwardUnit(unit, num_classes, not i).to(x.device))
                x = result[-1].calibrate(x)
                continue
            x = unit(x)
            if rule == "predsim":
                shape = x.shape[1:] if x.dim() == 4 else x.shape[-1:]
                block = lnn.PredSimHead(unit, tuple(shape), num_classes, sim_head="identity", decoder_dim=1024)
            else:
                ahead = blocks[i + 1][: overlap if rule == "loco" and i + 2 < count else 0]
                y = ahead(x)
                block = ContrastiveUnit(unit, ahead, y.shape[1] if y.dim() == 4 else y.shape[-1], not i, loss=contrast)
            result.append(block.to(x.device))
    model.train(training)
    return [*result, LastUnit(blocks[-1])]


# -- trainers ------------------------------------------------------------------------------------------------------


class AccumulatingTrainer(BackpropTrainer):
    """Back-propagation that cuts each batch into micro-batches and steps once."""

    def step(self, x, target):
        pairs = list(zip(x.chunk(self.accumulation_steps), target.chunk(self.accumulation_steps)))
        outputs, losses = [], []
        for part in pairs:
            losses.append(super().step(*part))
            outputs.append(self.output)
        self.output = torch.cat(outputs)
        return torch.stack(losses).mean(0)


class Checkpointed(nn.Module):
    """Keeps its input alone, and runs `unit` again in the backward."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        return recompute(self.unit, x, use_reentrant=False) if torch.is_grad_enabled() else self.unit(x)


def _adapted(model, kind):
    head = _head(model)
    try:
        return lnn.adapt(model, kind, train_head=[head])
    except ValueError as error:
        raise CheckpointError(f"--adapter {kind} does not fit --model: {error}") from None


def check_start(settings, dataset):
    """What is wrong with the given weights or adapter, said before anything is written."""
    if settings["weights"] or settings["adapter"]:
        model = network(settings["model"], dataset.channels, dataset.classes)
        if settings["weights"]:
            load_weights(model, read_weights(settings["weights"]))
        if settings["adapter"]:
            _adapted(model, settings["adapter"])


def make_trainer(settings, rule, dataset, weights, factory, **options):
    """The trainer of one of `RULES`, or of bp, on the network of `settings`, from `weights` (None: random ones)."""
    s = settings
    model = network(s["model"], dataset.channels, dataset.classes)
    if weights is not None:
        load_weights(model, weights)
    if s["adapter"]:
        model = _adapted(model, s["adapter"])
    if frozen(s):
        freeze_statistics(model)
    model.to(s["device"])
    if is_bp(rule):
        if rule == "bp-accumulate":
            count = max(n for n in range(1, MICRO_BATCHES + 1) if s["batch_size"] % n == 0)
            return AccumulatingTrainer([model], factory, accumulation_steps=count, **options)
        blocks = [Checkpointed(part) for part in model] if rule == "bp-checkpoint" else [model]
        return BackpropTrainer(blocks, factory, **options)
    spread = torch.linspace(0, len(dataset.train[1]) - 1, s["batch_size"]).long()  # folders are sorted by class
    x = dataset.training_batch(spread, torch.Generator().manual_seed(s["seed"]))[0].to(s["device"])
    blocks = local_blocks(
        rule.removesuffix("-bpm"),
        model,
        x,
        dataset.classes,
        units=s["units"],
        overlap=s["overlap"],
        contrast=s["contrast"].replace("-", "_"),
    )
    trainer = BlockwiseTrainer(blocks, offset_factory(s, factory) if rule in MODIFIED else factory, **options)
    if rule in MODIFIED:
        for group in trainer.optimizers[-1].param_groups:  # its local loss is the global one: nothing to correct
            group.update(local_scale=1.0, offset_scale=0.0)
        trainer.offset_chunk = s["offset_chunk"] or planner.bp_chunk(s["batch_size"], *_bp_and_unit_bytes(blocks, x))
        if "auto" in (s["local_scale"], s["offset_scale"]) and not s["offset_chunk"]:
            trainer.offset_chunk = whole_chunk(s["offset_batch"], trainer.offset_chunk)
    return trainer


def whole_chunk(batch, limit):
    """The largest chunk up to `limit` that cuts `batch` samples into two or more of equal size."""
    return max((n for n in range(1, limit + 1) if batch % n == 0 and batch > n), default=1)


def _bp_and_unit_bytes(blocks, x):
    """What back-propagation through all units keeps, and the largest unit alone; counted without running either."""
    units = [
        *(block.block if isinstance(block, lnn.PredSimHead) else block.unit for block in blocks[:-1]),
        blocks[-1].module,
    ]
    x, units = x.to("meta"), list(partition.to_meta(nn.ModuleList(units)))
    return partition.saved_bytes(units, x)[0], max(partition.unit_bytes(units, x))


def frozen(settings):
    """Whether batch normalisation keeps the statistics of the given weights."""
    if settings["batch_norm"] is not None:
        return settings["batch_norm"] == "frozen"
    return bool(settings["pretrain"] or settings["weights"])


def offset_factory(settings, factory):
    """Callable: parameters -> optimizer with offsets, on the one that `factory` makes."""
    scales = {key: 1.0 if settings[key] == "auto" else float(settings[key]) for key in ("local_scale", "offset_scale")}

    def make(parameters):
        optimizer = factory(parameters)
        if type(optimizer) is torch.optim.SGD:
            defaults = optimizer.defaults
            return optim.OffsetSGD(parameters, defaults["lr"], defaults["momentum"], defaults["weight_decay"], **scales)
        return optim.OffsetOptimizer(optimizer, **scales)

    return make


def formula(settings, bp_seconds, local_seconds, samples):
    """Work of the refreshes relative to that of local training: B' (BP + local) / (period samples x local)."""
    period = (settings["period"] or samples // settings["batch_size"]) * settings["batch_size"]
    return settings["offset_batch"] * (bp_seconds + local_seconds) / (period * local_seconds)
