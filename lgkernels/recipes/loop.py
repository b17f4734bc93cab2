"""One rule's training run: epochs, evaluation, and a state that continues bit for bit."""

import contextlib
import hashlib
import math
import time

import torch
import torch.nn.functional as F

from ..optim import refresh_due
from ..training import BackpropTrainer, BlockwiseTrainer, DirectTrainer, refresh_trainer
from . import checkpoint, instruments, models, tuning

RECALIBRATION_BATCHES = 50

# The paper's for its optimizer. Of 1e-3, 2e-3 and 5e-3, 5e-3 also served BP best (SmallConv, embedded data set).
LEARNING_RATES = {"adamw-schedule-free": 5e-3, "adamw": 1e-3, "adam": 1e-3, "sgd": 0.05}
TUNING_RATE = 3e-3  # sgd, from given weights


class Interrupted(Exception):
    """The run was stopped between two steps, and its checkpoint written."""


def optimizer_factory(name, lr):
    """Callable: parameters -> optimizer, with the settings of the LLS paper where it has any."""
    if name == "adamw-schedule-free":
        from schedulefree import AdamWScheduleFree

        return lambda parameters: AdamWScheduleFree(parameters, lr=lr, betas=(0.9, 0.999))
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return lambda parameters: {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, lr=lr)


def learning_rate(settings, rule):
    """The given learning rate of `rule`, or the default for it under this optimizer."""
    given = settings["bp_lr"] if tuning.is_bp(rule) else settings["lr"]
    if given is None and tuning.applies(settings, rule):
        given = settings["lr"] or (TUNING_RATE if settings["optimizer"] == "sgd" else None)
    return LEARNING_RATES[settings["optimizer"]] if given is None else given


def seeded(*key):
    """A generator of its own for each use, so that a run can go on from any batch."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def make_trainer(settings, rule, dataset, weights=None):
    """The model of `settings` with freshly initialised weights (or `weights`, a state dict), and its trainer."""
    torch.manual_seed(settings["seed"])
    if tuning.applies(settings, rule):
        factory = optimizer_factory(settings["optimizer"], learning_rate(settings, rule))
        scaler = torch.amp.GradScaler(settings["device"]) if settings["amp"] == "fp16" else None
        return tuning.make_trainer(settings, rule, dataset, weights, factory, grad_scaler=scaler)
    blocks = models.build(
        settings["model"], rule, in_channels=dataset.channels, num_classes=dataset.classes, seed=settings["seed"]
    )
    blocks = [block.to(settings["device"]) for block in blocks]
    device = torch.device(settings["device"])
    scaler = torch.amp.GradScaler(device.type) if settings["amp"] == "fp16" else None
    factory = optimizer_factory(settings["optimizer"], learning_rate(settings, rule))
    return trainer(rule, blocks, factory, seed=settings["seed"], grad_scaler=scaler)


def trainer(rule, blocks, factory, *, seed=0, **options):
    """The trainer of `rule` for the blocks of `models.build`."""
    if rule in models.DIRECT_RULES:
        return DirectTrainer(blocks, factory, rule=rule, seed=seed, **options)
    return (BlockwiseTrainer if rule in models.LOCAL_RULES else BackpropTrainer)(blocks, factory, **options)


def autocast(settings):
    if settings["amp"] == "none":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[settings["amp"]]
    return torch.autocast(torch.device(settings["device"]).type, dtype=dtype)


class Run:
    """Trains `rule`; `state_dict` at any batch and `load_state_dict` later give the same run as without a break."""

    def __init__(self, settings, rule, dataset, path, weights=None):
        self.settings, self.rule, self.dataset, self.path = settings, rule, dataset, path
        self.device = torch.device(settings["device"])
        self.trainer = make_trainer(settings, rule, dataset, weights)
        self.batches = len(dataset.train[1]) // settings["batch_size"]
        self.epoch = self.batch = 0
        self.history = []
        self._reset()

    def _reset(self):
        self.losses = self.correct = None
        self.seconds = self.refresh_seconds = 0.0

    @property
    def finished(self):
        return self.epoch >= self.settings["epochs"]

    def state_dict(self):
        return {
            "rule": self.rule,
            "trainer": self.trainer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "losses": self.losses,
            "correct": self.correct,
            "seconds": self.seconds,
            "refresh_seconds": self.refresh_seconds,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state):
        if state["rule"] != self.rule:
            raise checkpoint.CheckpointError(f"{self.path} belongs to rule {state['rule']!r}, not {self.rule!r}")
        self.trainer.load_state_dict(state["trainer"])
        self.epoch, self.batch, self.history = state["epoch"], state["batch"], state["history"]
        self.losses, self.correct = (t if t is None else t.to(self.device) for t in (state["losses"], state["correct"]))
        self.seconds, self.refresh_seconds = state["seconds"], state.get("refresh_seconds", 0.0)
        torch.set_rng_state(state["rng"])

    def save(self):
        checkpoint.save(self.path, self.state_dict())

    def train(self, progress, stopping):
        """Run to the last epoch; yields each epoch's record. `stopping()` true: save and raise Interrupted."""
        while not self.finished:
            self._epoch(progress, stopping)
            record = self._evaluate()
            self.history.append(record)
            self.epoch, self.batch = self.epoch + 1, 0
            self._reset()
            self.save()
            yield record
            if stopping() and not self.finished:
                raise Interrupted

    def _order(self, purpose="order"):
        return torch.randperm(len(self.dataset.train[1]), generator=seeded(self.settings["seed"], purpose, self.epoch))

    def batch_at(self, order, i, purpose="augment"):
        """Training batch `i` of this epoch on the device."""
        size = self.settings["batch_size"]
        x, target = self.dataset.training_batch(
            order[i * size : (i + 1) * size], seeded(self.settings["seed"], purpose, self.epoch, i)
        )
        return x.to(self.device), target.to(self.device)

    def _epoch(self, progress, stopping):
        order = self._order()
        with progress(self) as bar:
            while self.batch < self.batches:
                start = time.perf_counter()
                if self.rule in tuning.MODIFIED and self._refresh_due():
                    self.refresh(order, self.batch)
                    self.refresh_seconds += time.perf_counter() - start
                x, target = self.batch_at(order, self.batch)
                with autocast(self.settings):
                    losses = self.trainer.step(x, target)
                correct = (self.trainer.output.argmax(1) == target).sum()
                self.losses = losses if self.losses is None else self.losses + losses
                self.correct = correct if self.correct is None else self.correct + correct
                self.batch += 1
                self.seconds += time.perf_counter() - start
                bar.advance(self)
                if stopping():
                    self.save()
                    raise Interrupted

    def _refresh_due(self):
        first = self.settings["first_period"]
        if first is None and self.settings["adapter"]:
            first = min(50, self.batches)  # factors of 0 hide the others from the first refresh
        return refresh_due(self.trainer.steps, self.settings["period"] or self.batches, first)

    def refresh(self, order, start):
        """Refresh the offsets on the epoch's batches from `start` on."""
        count = -(-self.settings["offset_batch"] // self.settings["batch_size"])
        batches = [self.batch_at(order, (start + i) % self.batches) for i in range(count)]
        data = [torch.cat(tensors)[: self.settings["offset_batch"]] for tensors in zip(*batches)]
        # float16 without its scaling would lose small gradients: rare enough a pass for float32
        with contextlib.nullcontext() if self.settings["amp"] == "fp16" else autocast(self.settings):
            refresh_trainer(
                self.trainer,
                data,
                bp_chunk=self.trainer.offset_chunk,
                local_chunk=self.settings["batch_size"],
                estimate_local_scale=self.settings["local_scale"] == "auto",
                estimate_offset_scale=self.settings["offset_scale"] == "auto",
                max_growth=self.settings["offset_growth"],
            )

    def live(self):
        """Training accuracy and loss of the classifier so far in this epoch (waits for the device)."""
        return self.correct.item() / (self.batch * self.settings["batch_size"]), self.losses[-1].item() / self.batch

    @torch.no_grad()
    def _evaluate(self):
        accuracy, _ = self.live()
        record = {
            "rule": self.rule,
            "epoch": self.epoch + 1,
            "train_accuracy": accuracy,
            "losses": [_finite(v) for v in (self.losses / self.batch).tolist()],
            "train_seconds": self.seconds,
        }
        if self.rule in tuning.MODIFIED:
            record["refresh_seconds"] = self.refresh_seconds
        order = self._order("recalibrate")
        self.trainer.eval()
        with autocast(self.settings):
            count = 0 if tuning.frozen(self.settings) else min(RECALIBRATION_BATCHES, self.batches)
            self.trainer.bn_recalibrate(self.batch_at(order, i, "recalibrate") for i in range(count))
            correct, loss, seen = 0, 0.0, 0
            for x, target in self.dataset.test_batches(256):
                logits, target = self.trainer.predict(x.to(self.device)).float(), target.to(self.device)
                correct += (logits.argmax(1) == target).sum()
                loss += F.cross_entropy(logits, target, reduction="sum")
                seen += len(target)
        record.update(test_accuracy=correct.item() / seen, test_loss=_finite(loss.item() / seen))
        self.weights = {
            f"{i}.{name}": tensor.detach().cpu().clone()
            for i, block in enumerate(self.trainer.blocks)
            for name, tensor in block.state_dict().items()
        }
        self.trainer.train()
        if self.rule in models.FEEDBACK_RULES:
            record.update(instruments.of(self.trainer.blocks))
        return record


def _finite(value):
    return value if math.isfinite(value) else None
