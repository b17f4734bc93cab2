"""The contestants of each case: lgkernels' backends, the authors' formulas in eager torch, a lean hand-written torch
version, `torch.compile` of it, back-propagation for whole steps, and the floor that none can beat.

A builder `op(case, device, compiled)` returns a `Problem`. A provider is called with the number of the input copy
and returns its results by name; the harness compares those of copy 0 with `truth` before it times anything.
"""

import contextlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from lgkernels.recipes.models import build
from lgkernels.training import BackpropTrainer, BlockwiseTrainer

TEMPERATURE, SLOPE = 0.5, 0.01
_weight_gradient = torch.ops.aten.convolution_backward.default
_CACHE_BYTES = 256 * 2**20  # rotated input copies exceed the last-level cache of any GPU


@dataclass
class Problem:
    providers: dict
    baseline: str
    truth: dict = field(default_factory=dict)
    tolerance: float = 1e-4  # of the relative error in norm
    copies: int = 1
    bytes: int = 0  # that the op has to move, at least
    flops: int = 0


def backends(op, device, dtype):
    """Backends of `op` that can run here."""
    return [b for b in dispatch.BACKENDS if dispatch.unavailable(op, b, device, dtype) is None]


def builder(op):
    """The function that makes a case's `Problem`."""
    from . import feedback_providers, local_providers

    for family in (feedback_providers, local_providers):
        if op in family.OPS:
            return getattr(family, op)
    return globals()[op]


def names(case, device, compiled):
    """Providers of a case, in the order of its tables (known without building anything)."""
    from . import feedback_providers, local_providers

    for family in (feedback_providers, local_providers):
        if case.op in family.OPS:
            return family.names(case, device, compiled)
    cpu, family = device.type == "cpu", "lls_loss" if case.op == "lls_loss" else "lls_block"
    ours = backends(family, device, case.torch_dtype)
    if case.op == "vgg8_step":
        ours = [b for b in ours if b != "reference"] or ours
        return [f"lgkernels {b}" for b in ours] + [
            "eager LLS, basis cached",
            "bp",
            "bp, LeakyReLU in place",
            "bp, accumulation in 2",
            "bp, checkpointing",
        ]
    ours = [f"lgkernels {b}" for b in ours]
    if case.op in ("norm_act_pool", "grad_preactivation_"):
        return ours + ["torch.compile"] * compiled + ["floor"]
    eager = ["eager, basis cached"] + ["eager, official"] * cpu + ["lean torch"] + ["lean torch.compile"] * compiled
    if case.op == "lls_loss":
        return ours + eager + ["floor"]
    other = (
        []
        if case.channels_last
        else ["lgkernels cpu, channels_last"] * ("lgkernels cpu" in ours) + ["floor, channels_last"]
    )
    return ours + eager + ["bp layer", "floor"] + other


def _copies(device, size):
    return 1 if device.type == "cpu" else min(16, max(2, math.ceil(_CACHE_BYTES / size)))


def _random(shape, case, device, copies, requires_grad=False):
    layout = torch.channels_last if case.channels_last and len(shape) == 4 else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator).to(device, case.torch_dtype).contiguous(memory_format=layout)
    return [first.clone().requires_grad_(requires_grad) for _ in range(copies)]


def _target(case, device):
    return torch.randint(case.classes, (case.batch,), generator=torch.Generator().manual_seed(1)).to(device)


def _autocast(case, device):
    if case.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, case.torch_dtype, cache_enabled=False)


def _tolerance(case):
    """Of a check before timing, not the tests': one value at the activation's kink, where rounding decides the slope,
    moves a weight gradient by up to 1 %."""
    return 2e-3 if case.dtype == "float32" else 5e-2


# -- the authors' formulas ---------------------------------------------------------------------------------------


def official_basis(rows, dim, device):
    frequency = torch.linspace(50, 512, rows, device=device)
    return torch.sign(torch.sin(frequency.unsqueeze(1) * torch.arange(dim, device=device).unsqueeze(0)))


def official_loss(activation, target, phi, pool, modulation=None):
    x = activation.float()
    if x.dim() == 4:
        x = F.adaptive_avg_pool2d(x, pool).flatten(1)
    logits = F.linear(F.normalize(x, dim=1), phi)
    logits = logits if modulation is None else logits @ modulation
    return F.cross_entropy(logits / TEMPERATURE, target)


# -- what an expert writes in plain torch: closed-form gradients, few passes, in place where that is allowed ---------


def lean_head(x, target, phi, modulation=None):
    """(loss, grad_x, grad_modulation) of latents x (B, d)."""
    inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
    s = (x @ phi.t()) * inverse
    log_p = F.log_softmax((s if modulation is None else s @ modulation) / TEMPERATURE, 1)
    loss = F.nll_loss(log_p, target)
    g = log_p.exp()
    g.scatter_add_(1, target.unsqueeze(1), g.new_full((x.shape[0], 1), -1.0))
    g = g / (TEMPERATURE * x.shape[0])
    grad_modulation = None if modulation is None else s.t() @ g
    g = g if modulation is None else g @ modulation.t()
    rho = (g * s).sum(1, keepdim=True)
    return loss, torch.addcmul(g @ phi, x, rho * inverse, value=-1) * inverse, grad_modulation


def _tiles(activation, pool):
    batch, channels, height, width = activation.shape
    return activation.view(batch, channels, pool, height // pool, pool, width // pool)


def _per_bin(grad_latents, activation, pool):
    batch, channels, height, width = activation.shape
    grad = (grad_latents / (height * width // pool**2)).to(activation.dtype)
    return grad.view(batch, channels, pool, 1, pool, 1)


class LeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, target, phi, pool, modulation):
        x = activation if activation.dim() == 2 else F.adaptive_avg_pool2d(activation, pool).flatten(1).float()
        loss, grad, grad_modulation = lean_head(x, target, phi, modulation)
        ctx.save_for_backward(grad, grad_modulation)
        ctx.pool, ctx.like = pool, activation.detach()
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, grad_modulation = ctx.saved_tensors
        grad = grad * grad_loss
        if ctx.like.dim() == 4:
            out = torch.empty_like(ctx.like)
            _tiles(out, ctx.pool).copy_(_per_bin(grad, ctx.like, ctx.pool))
            grad = out
        return grad, None, None, None, None if grad_modulation is None else grad_modulation * grad_loss


def lean_block(x, target, weight, bias, gamma, beta, phi, pool, max_pool):
    """(out, loss, grad_weight, grad_gamma, grad_beta)."""
    weight = weight.to(x.dtype)
    z = F.conv2d(x, weight, None, 1, 1)
    a, mean, rstd = torch.native_batch_norm(z, gamma, beta, None, None, True, 0.1, 1e-5)
    a = F.leaky_relu_(a, SLOPE)
    latents = F.adaptive_avg_pool2d(a, pool).flatten(1).float()
    loss, grad, _ = lean_head(latents, target, phi)
    grad = _per_bin(grad, a, pool)
    grad = torch.where(_tiles(a, pool) > 0, grad, grad * SLOPE).reshape(a.shape)
    dz, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
        grad, z, gamma, None, None, mean, rstd, True, 1e-5, [True, True, True]
    )
    grad_weight = _weight_gradient(dz, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])[
        1
    ]
    return F.max_pool2d(a, 2) if max_pool else a, loss, grad_weight, grad_gamma, grad_beta


# -- lls_loss, forward and backward ------------------------------------------------------------------------------


def lls_loss(case, device, compiled):
    shape = (case.batch, case.channels) + ((case.size, case.size) if case.size else ())
    dim = case.channels * case.pool**2 if case.size else case.pool
    size = math.prod(shape) * torch.finfo(case.torch_dtype).bits // 8
    copies = _copies(device, size)
    activations = _random(shape, case, device, copies, requires_grad=True)
    target, modulation = _target(case, device), None
    if case.modulation == "matrix":
        modulation = 0.1 * torch.randn(case.classes, case.classes, generator=torch.Generator().manual_seed(2))
        modulation = modulation.to(device).requires_grad_()
    phi = LF.lls_basis(case.classes, dim, device=device)

    def gradients(loss, activation, modulation=modulation):
        inputs = [activation] if modulation is None else [activation, modulation]
        return dict(zip(("loss", "grad", "grad_modulation"), (loss.detach(), *torch.autograd.grad(loss, inputs))))

    def ours(impl):
        return lambda i: gradients(
            LF.lls_loss(
                activations[i],
                target,
                modulation,
                num_classes=case.classes,
                pool_size=case.pool,
                temperature=TEMPERATURE,
                impl=impl,
            ),
            activations[i],
        )

    def lean(i, apply=LeanLoss.apply):
        return gradients(apply(activations[i], target, phi, case.pool, modulation), activations[i])

    providers = {f"lgkernels {impl}": ours(impl) for impl in backends("lls_loss", device, case.torch_dtype)}
    providers["eager, basis cached"] = lambda i: gradients(
        official_loss(activations[i], target, phi, case.pool, modulation), activations[i]
    )
    if device.type == "cpu":  # other devices' linspace and sine give other signs, so other gradients
        providers["eager, official"] = lambda i: gradients(
            official_loss(activations[i], target, official_basis(case.classes, dim, device), case.pool, modulation),
            activations[i],
        )
    providers["lean torch"] = lean
    if compiled:
        function = torch.compile(lambda a, m: LeanLoss.apply(a, target, phi, case.pool, m), dynamic=False)
        providers["lean torch.compile"] = lambda i: gradients(function(activations[i], modulation), activations[i])
    if case.size:  # it has to read the activation and to write a gradient of its size
        providers["floor"] = lambda i: {"": torch.empty_like(activations[i]).copy_(activations[i].detach())}
    else:
        g = torch.randn(case.batch, case.classes, device=device, dtype=case.torch_dtype)
        floor_phi = phi.to(case.torch_dtype)
        providers["floor"] = lambda i: {"": (activations[i].detach() @ floor_phi.t(), g @ floor_phi)}
    wide = activations[0].detach().double().requires_grad_()
    wide_modulation = None if modulation is None else modulation.detach().double().requires_grad_()
    truth = gradients(
        LF.lls_loss(
            wide, target, wide_modulation, num_classes=case.classes, pool_size=case.pool, temperature=TEMPERATURE
        ),
        wide,
        wide_modulation,
    )
    return Problem(
        providers,
        "floor",
        truth,
        _tolerance(case),
        copies,
        bytes=2 * size if case.size else 0,
        flops=0 if case.size else 4 * case.batch * dim * case.classes,
    )


# -- the fused block, forward, local loss and all gradients --------------------------------------------------------


def _block_module(case, device, impl="auto"):
    torch.manual_seed(3)
    block = lnn.LLSConvBlock(
        case.channels,
        case.out_channels,
        3,
        padding=1,
        num_classes=case.classes,
        pool_size=case.pool,
        temperature=TEMPERATURE,
        max_pool=case.max_pool,
        impl=impl,
    )
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
        block.norm.bias.uniform_(-0.5, 0.5)
    return block.to(device, memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)


def _gradients(block, loss, out):
    weights = (block.layer.weight, block.norm.weight, block.norm.bias)
    results = {"out": out.detach(), "loss": loss.detach()}
    return {**results, **{name: w.grad for name, w in zip(("grad_weight", "grad_gamma", "grad_beta"), weights)}}


def lls_block(case, device, compiled):
    shape = (case.batch, case.channels, case.size, case.size)
    copies = _copies(device, math.prod(shape) * torch.finfo(case.torch_dtype).bits // 8)
    xs, target = _random(shape, case, device, copies), _target(case, device)
    phi = LF.lls_basis(case.classes, case.out_channels * case.pool**2, device=device)

    def ours(impl, inputs=xs):
        block = _block_module(case, device, impl)

        def run(i):
            block.zero_grad(set_to_none=True)
            with _autocast(case, device):
                out, loss = block(inputs[i], target)
            loss.backward()
            return _gradients(block, loss, out)

        return run

    def eager(basis):
        block = _block_module(case, device)

        def run(i):
            block.zero_grad(set_to_none=True)
            with _autocast(case, device):
                a = F.leaky_relu(block.norm(block.layer(xs[i])), SLOPE)
            loss = official_loss(a, target, basis(), case.pool)
            loss.backward()
            return _gradients(block, loss, F.max_pool2d(a.detach(), 2) if case.max_pool else a)

        return run

    def bp_layer():
        block, x = _block_module(case, device), xs[0].clone().requires_grad_()
        grad = torch.randn_like(block(x).detach()).to(case.torch_dtype)

        def run(i):
            block.zero_grad(set_to_none=True)
            with _autocast(case, device):
                out = block(x)
            out.backward(grad)
            x.grad = None

        return run

    def floor(inputs):
        layout = torch.contiguous_format if inputs[0].is_contiguous() else torch.channels_last
        weight = _block_module(case, device).layer.weight.detach().to(case.torch_dtype).contiguous(memory_format=layout)

        def run(i):
            z = F.conv2d(inputs[i], weight, None, 1, 1)
            _weight_gradient(z, inputs[i], weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])

        return run

    plain = _block_module(case, device)
    arguments = [p.detach() for p in (plain.layer.weight, plain.layer.bias, plain.norm.weight, plain.norm.bias)]
    names = "out", "loss", "grad_weight", "grad_gamma", "grad_beta"
    providers = {f"lgkernels {impl}": ours(impl) for impl in backends("lls_block", device, case.torch_dtype)}
    providers["eager, basis cached"] = eager(lambda: phi)
    if device.type == "cpu":
        providers["eager, official"] = eager(
            lambda: official_basis(case.classes, case.out_channels * case.pool**2, device)
        )
    providers["lean torch"] = lambda i: dict(
        zip(names, lean_block(xs[i], target, *arguments, phi, case.pool, case.max_pool))
    )
    if compiled:
        function = torch.compile(lean_block, dynamic=False)
        providers["lean torch.compile"] = lambda i: dict(
            zip(names, function(xs[i], target, *arguments, phi, case.pool, case.max_pool))
        )
    providers["bp layer"], providers["floor"] = bp_layer(), floor(xs)
    if not case.channels_last:
        last = [x.contiguous(memory_format=torch.channels_last) for x in xs]
        providers["floor, channels_last"] = floor(last)
        if "lgkernels cpu" in providers:
            providers["lgkernels cpu, channels_last"] = ours("cpu", last)
    wide = _block_module(case, device, "reference").to(case.torch_dtype).double()
    out, loss = wide(xs[0].double(), target)
    loss.backward()
    return Problem(
        providers,
        "floor",
        _gradients(wide, loss, out),
        _tolerance(case),
        copies,
        flops=4 * case.batch * case.size**2 * case.channels * case.out_channels * 9,
    )


# -- its two passes over memory ------------------------------------------------------------------------------------


def _pass_inputs(case, device):
    shape = (case.batch, case.channels, case.size, case.size)
    size = math.prod(shape) * torch.finfo(case.torch_dtype).bits // 8
    zs = _random(shape, case, device, _copies(device, size))
    reference = dispatch.backend("lls_block", "reference", device, torch.float64)
    mean, rstd = reference.batch_stats(zs[0], None, None, None, 0.1, 1e-5)
    generator = torch.Generator().manual_seed(4)
    gamma, beta = (torch.rand(case.channels, generator=generator).to(device) + offset for offset in (0.5, -0.5))
    latents = torch.randn(case.batch, case.channels * case.pool**2, generator=generator).to(device) / case.batch
    return zs, size, (mean, rstd, gamma, beta), latents, reference


def _copy_floor(device, size):
    source = [torch.ones(size // 8, device=device) for _ in range(2 * _copies(device, size))]
    return lambda i: {"": source[2 * i].copy_(source[2 * i + 1])}


def _doubles(tensors):
    return [t.double() for t in tensors]


def norm_act_pool(case, device, compiled):
    zs, size, channel, _, reference = _pass_inputs(case, device)
    names, arguments = ("out", "latents", "s1", "s2"), (SLOPE, case.pool, case.max_pool, True)

    def run(function):
        return lambda i: dict(zip(names, function(zs[i], *channel, *arguments)))

    providers = {
        f"lgkernels {impl}": run(dispatch.backend("lls_block", impl, device, case.torch_dtype).norm_act_pool)
        for impl in backends("lls_block", device, case.torch_dtype)
    }
    if compiled:
        providers["torch.compile"] = run(torch.compile(reference.norm_act_pool, dynamic=False))
    moved = size + size // (4 if case.max_pool else 1) + 12 * case.batch * case.channels * case.pool**2
    providers["floor"] = _copy_floor(device, moved)
    truth = dict(zip(names, reference.norm_act_pool(zs[0].double(), *_doubles(channel), *arguments)))
    return Problem(providers, "floor", truth, _tolerance(case), len(zs), bytes=moved)


def grad_preactivation_(case, device, compiled):
    zs, size, channel, grad_latents, reference = _pass_inputs(case, device)
    *_, s1, s2 = reference.norm_act_pool(zs[0], *channel, SLOPE, case.pool, False, True)
    area = torch.full((case.pool**2,), (case.size // case.pool) ** 2, device=device, dtype=torch.float32)
    norm_gradients = reference.norm_grads(grad_latents, s1, s2, case.channels, area)[:2]
    arguments = (SLOPE, grad_latents, *norm_gradients, case.pool, 1.0)

    def run(function):
        mine = [z.clone() for z in zs]  # overwritten: the first call is the one that is compared
        return lambda i: {"z": function(mine[i], *channel, *arguments)}

    providers = {
        f"lgkernels {impl}": run(dispatch.backend("lls_block", impl, device, case.torch_dtype).grad_preactivation_)
        for impl in backends("lls_block", device, case.torch_dtype)
    }
    if compiled:
        providers["torch.compile"] = run(torch.compile(reference.grad_preactivation_, dynamic=False))
    moved = 2 * size + 4 * grad_latents.numel()
    providers["floor"] = _copy_floor(device, moved)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
    truth = {"z": reference.grad_preactivation_(zs[0].double(), *_doubles(channel), *wide)}
    return Problem(providers, "floor", truth, _tolerance(case), len(zs), bytes=moved)


# -- a whole training step of VGG8 ---------------------------------------------------------------------------------


class _Eager(nn.Module):
    """A fused block's parameters under the authors' layer: basis cached, no `.item()`."""

    def __init__(self, block):
        super().__init__()
        self.block, weight = block, block.layer.weight
        dim = weight.shape[0] * block.pool_size**2 if weight.dim() == 4 else block.pool_size
        self.phi = LF.lls_basis(block.num_classes, dim, device=weight.device)

    def forward(self, x, target):
        a = F.leaky_relu(self.block.norm(self.block.layer(x.detach())), SLOPE)
        out = F.max_pool2d(a.detach(), 2) if self.block.max_pool else a.detach()
        return out, official_loss(a, target, self.phi, self.block.pool_size)


class _InPlace(nn.Module):
    """A block for back-propagation that keeps one activation fewer."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        a = F.leaky_relu_(self.block.norm(self.block.layer(x)), SLOPE)
        return F.max_pool2d(a, 2) if self.block.max_pool else a


class _Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)  # no dropout here


def vgg8_step(case, device, compiled):
    x, target = _random((case.batch, case.channels, case.size, case.size), case, device, 1)[0], _target(case, device)

    def blocks(rule, impl="auto", wrap=None):
        torch.manual_seed(5)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        layers = build("vgg8", rule, in_channels=case.channels, num_classes=case.classes, impl=impl)
        layers = [layer.to(device, memory_format=layout) for layer in layers]
        return [wrap(layer) if wrap and hasattr(layer, "pool_size") else layer for layer in layers]

    def optimizer(parameters):  # without state, and at rate 0: any step can be compared with the first
        return torch.optim.SGD(parameters, lr=0.0)

    def local(layers, batch=x):
        trainer = BlockwiseTrainer(layers, optimizer)

        def run(i):
            with _autocast(case, device):
                return {"losses": trainer.step(batch, target)}

        return run

    def bp(parts=1, wrap=None):
        trainer = BackpropTrainer(blocks("bp", wrap=wrap), optimizer, accumulation_steps=parts)
        batches = list(zip(x.chunk(parts), target.chunk(parts)))

        def run(i):
            with _autocast(case, device):
                for part, labels in batches:
                    trainer.step(part, labels)

        return run

    ours = [b for b in backends("lls_block", device, case.torch_dtype) if b != "reference"] or ["reference"]
    providers = {f"lgkernels {impl}": local(blocks("lls", impl)) for impl in ours}
    providers["eager LLS, basis cached"] = local(blocks("lls", wrap=_Eager))
    providers["bp"] = bp()
    providers["bp, LeakyReLU in place"] = bp(wrap=_InPlace)
    providers["bp, accumulation in 2"] = bp(2)
    providers["bp, checkpointing"] = bp(wrap=_Checkpointed)
    wide = local([layer.double() for layer in blocks("lls", "reference")], x.double())
    truth = wide(0) if case.dtype == "float32" else {}
    return Problem(providers, "bp", truth, _tolerance(case))
