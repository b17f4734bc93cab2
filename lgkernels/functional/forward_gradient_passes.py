"""The passes of one call of `forward_gradient`: dual numbers through any module, noise at its layers' outputs."""

import contextlib
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from ..core import checks, environment
from ..random import RandomFeedback
from .forward_gradient_layers import is_layer, local_gradients
from .forward_gradient_watch import Watch, no_forward_mode, tensors


class _Noise:
    """Tensors of one draw, the same in the same order whenever it is made anew. A draw has two regions of its own, for
    parameters and for outputs: of the formula's rows, or with a seed each."""

    def __init__(self, noise: RandomFeedback | None, seeds: list[int], region: int) -> None:
        self.noise, self.seed = noise, seeds[region]
        self.row, self.end = (2**32 // len(seeds) * i for i in (region, region + 1))
        self.generators: dict[torch.device, torch.Generator] = {}

    def like(self, tensor: Tensor) -> Tensor:
        if self.noise is None:
            if tensor.device not in self.generators:
                self.generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self.seed)
            generator = self.generators[tensor.device]
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).normal_(generator=generator)
        shape = tensor.shape if tensor.dim() > 1 else (1, tensor.numel())  # a row yields several values a counter
        offset, self.row = (self.row, 0), self.row + shape[0]
        if self.row > self.end:
            raise ValueError(
                "draws must be fewer: noise has 2**32 rows for the samples of all layers and draws, got more"
            )
        return self.noise.materialize(shape, tensor.device, tensor.dtype, offset=offset).view(tensor.shape)


class _Calls(nn.Module):
    """`function` with the modules that it calls, for `functional_call`."""

    function: Any

    def __init__(self, function: Callable, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.__dict__["function"] = function  # no child of its own: it may be one of the parts

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


# What earlier calls found: parameters used outside of their layer. One too many costs variance, and no bias.
_OUTSIDE: "WeakKeyDictionary[nn.Module, dict[tuple, set[str]]]" = WeakKeyDictionary()


def estimate(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients; the arguments are those of `Estimate`."""
    if "torch._dynamo" in sys.modules:  # a compiled function goes on eagerly from here on: nothing is to be compiled
        return torch.compiler.disable(lambda: Estimate(*arguments)())()
    return Estimate(*arguments)()


class Estimate:
    """One call. A pass adds the noise of a draw, and makes the layers' gradients of the draw before, whose directional
    derivative is known by then."""

    def __init__(
        self,
        function: Callable,
        inputs: tuple,
        modules: dict[str, nn.Module],
        activities: bool,
        draws: int,
        noise: RandomFeedback | None,
        separate: bool | None,
    ) -> None:
        self.inputs, self.activities, self.draws, self.noise = inputs, activities, draws, noise
        self.separate = separate
        self.variance = 1.0 if noise is None else noise.scale**2
        self.calls = _Calls(function, list(modules.values()))
        self.modules = {m: prefix + name for prefix, part in modules.items() for name, m in part.named_modules()}
        self.parameters: dict[str, nn.Parameter] = {}
        self.paths: dict[str, str] = {}
        self.names: dict[int, str] = {}
        for i, (prefix, part) in enumerate(modules.items()):
            for name, parameter in part.named_parameters():
                if parameter.requires_grad and id(parameter) not in self.names:
                    self.names[id(parameter)] = prefix + name
                    self.parameters[prefix + name], self.paths[prefix + name] = parameter, f"parts.{i}.{name}"
        if not self.parameters:
            raise ValueError("modules must have parameters that require a gradient, got none")
        for name, parameter in self.parameters.items():
            if is_lazy(parameter):
                raise TypeError(f"modules must be initialized, got a lazy {name}: call function(*inputs) once")
            checks.floating(f"modules' parameter {name}", parameter)
        while isinstance(function, functools.partial):
            function = function.func
        key = (getattr(function, "__code__", type(function)), *self.parameters)
        self.outside = _OUTSIDE.setdefault(next(iter(modules.values())), {}).setdefault(key, set())
        owners = Counter(id(p) for module in self.modules for p in module._parameters.values())
        self.padding = {  # rows without a gradient
            self.names[id(m.weight)]: m.padding_idx
            for m in self.modules
            if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.padding_idx is not None
            if id(m.weight) in self.names and owners[id(m.weight)] == 1
        }
        self.layers: dict[Any, dict[str, str]] = {}  # to its parameters' names here by those in the layer
        self.running: set[str] = set()  # the names of the parameters of the layer that runs
        self.outputs: list[tuple[str, torch.Size]] = []  # of the layers, in the order of the first pass

    def __call__(self) -> tuple[Tensor, dict[str, Tensor]]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            if "torch._dynamo" in sys.modules:  # a compiled module calls no hooks that came later
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                return self._estimate()
            except (NotImplementedError, RuntimeError) as error:
                explained = no_forward_mode(error, self.modules)
                if explained is None:
                    raise
                raise explained from error

    def _estimate(self) -> tuple[Tensor, dict[str, Tensor]]:
        regions = 2 * self.draws  # for each draw that of the parameters and that of the outputs
        seeds = [0] * regions if self.noise is not None else torch.randint(2**62, (regions,), device="cpu").tolist()
        self.noise_of = functools.partial(_Noise, self.noise, seeds)
        self._remember()
        self.sums = {name: torch.zeros(p.shape, dtype=_wide(p), device=p.device) for name, p in self.parameters.items()}
        losses, slopes = self._first()
        for index in range(1, self.draws + 1):
            slopes = slopes.to(_wide(slopes)) / (self.draws * self.variance)
            for name, v in self.perturbed.items():
                self.sums[name] += slopes.mean().to(v.device) * v
            if index == self.draws and not self.layers:
                break
            if index == 1:
                of_samples = losses.dim() == 1 and (
                    self._are_separate(losses) if self.separate is None else self.separate
                )
            before = self.noise_of(2 * index - 1), slopes / slopes.numel() if of_samples else slopes.mean()
            again, slopes = self._pass(index if index < self.draws else None, before)
            self._compare(losses, again)
        return losses.mean(), {name: total.to(self.parameters[name].dtype) for name, total in self.sums.items()}

    # -- what is perturbed --------------------------------------------------------------------------------------------

    def _first(self) -> tuple[Tensor, Tensor]:
        """The first pass. Again, where a parameter turns out to be used outside of its layer: then it is perturbed
        itself."""
        while True:
            self._split()
            of_layers = {n for names in self.layers.values() for n in names.values()}
            names = {key: name for key, name in self.names.items() if name in of_layers}
            self.outputs, watch = [], Watch(names, self.running)
            result = self._pass(0, watch=watch)
            if not watch.outside:
                return result
            self.outside |= watch.outside

    def _split(self) -> None:
        """Layers whose outputs are perturbed; the parameters of all others are perturbed themselves."""
        self.layers = {
            module: {own: self.names[id(p)] for own, p in module._parameters.items() if id(p) in self.names}
            for module in self.modules
            if self.activities and is_layer(module)
        }
        self.layers = {layer: names for layer, names in self.layers.items() if names}
        self.weights = set(self.parameters) - {n for names in self.layers.values() for n in names.values()}
        self.weights |= self.outside
        while shared := [layer for layer, names in self.layers.items() if self.weights & set(names.values())]:
            for layer in shared:
                self.weights |= set(self.layers.pop(layer).values())

    def _are_separate(self, losses: Tensor) -> bool:
        """Whether the n-th row of every layer's output that has a row for each loss moves the n-th loss alone: some
        rows' noise leaves the other losses' derivatives 0, tried until each row was once noisy without each other.
        It depends on all that `function` computes, so nothing of it is kept for the next call."""
        count = len(losses)
        if count < 2 or not any(shape[:1] == (count,) for _, shape in self.outputs):
            return True
        for chosen in _subsets(count).to(losses.device):
            _, slopes = self._pass(0, rows=chosen)
            if slopes[~chosen].any().item():  # nan is not 0 either
                return False
        return True

    # -- a pass -------------------------------------------------------------------------------------------------------

    def _pass(
        self,
        draw: int | None,
        before: tuple[_Noise, Tensor] | None = None,
        rows: Tensor | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The losses and their directional derivatives. `before`: noise and slopes of the draw whose gradients are
        made on the way; `rows`: those that alone are perturbed; `watch`: of a first pass."""
        self._restore()
        self.perturbed = {}
        self.running.clear()
        self.expected = None if watch is not None else iter(self.outputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(forward_ad.dual_level())
            if draw is not None and rows is None:
                self.perturbed = self._weight_noise(self.noise_of(2 * draw))
            duals = {
                self.paths[name]: forward_ad.make_dual(self.parameters[name].detach(), v)
                for name, v in self.perturbed.items()
            }
            noise = None if draw is None else self.noise_of(2 * draw + 1)
            if rows is not None:
                noise = _Noise(None, [0], 0)  # normal: signs may cancel each other
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(self._enter).remove)
                hook = functools.partial(self._leave, noise, before, rows)
                stack.callback(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            if watch is not None:
                stack.enter_context(watch)
                for module in self.modules:
                    if module._parameters and not isinstance(module, torch.jit.ScriptModule):
                        stack.callback(module.register_forward_pre_hook(self._refuse_hidden).remove)
            result = functional_call(self.calls, duals, self.inputs)
            _check_losses(result)
            losses, slopes = forward_ad.unpack_dual(result)
        if self.expected is not None and next(self.expected, None) is not None:
            raise _different("fewer calls of layers")
        if watch is not None and slopes is None and not watch.outside:
            raise ValueError(
                "function must return losses that depend on modules' parameters by way of torch, got some that do not "
                "(what .item(), NumPy or detach() gave has no derivative)"
            )
        return losses, torch.zeros_like(losses) if slopes is None else slopes

    def _weight_noise(self, noise: _Noise) -> dict[str, Tensor]:
        perturbed = {name: noise.like(p) for name, p in self.parameters.items() if name in self.weights}
        for name, row in self.padding.items():
            if name in perturbed and name not in self.outside:
                perturbed[name][row] = 0
        return perturbed

    def _refuse_hidden(self, module: nn.Module, _: Any) -> None:
        """Inside of an autograd.Function's forward tangents are lost in silence."""
        if not torch._C._is_fwd_grad_enabled():
            name = self.modules[module] or type(module).__name__
            raise NotImplementedError(
                f"forward_gradient can't differentiate {name!r} in an autograd.Function, where forward mode is off. "
                "What to do: checkpoint with use_reentrant=False, or call it outside"
            )

    def _enter(self, layer: nn.Module, _: Any) -> None:
        self.running.update(self.layers[layer].values())

    def _leave(
        self,
        noise: _Noise | None,
        before: tuple[_Noise, Tensor] | None,
        rows: Tensor | None,
        layer: nn.Module,
        args: tuple,
        kwargs: dict,
        output: Tensor,
    ) -> Tensor:
        """Gradients of the draw before, and noise of this one: the hook at a layer's output."""
        self.running.clear()
        made = self.modules[layer], output.shape
        if self.expected is None:
            self.outputs.append(made)
        elif made != next(self.expected, None):
            raise _different(f"an output {tuple(output.shape)} of layer {made[0]!r} in another place")
        z, tangent = forward_ad.unpack_dual(output)
        if before is not None:
            u = before[0].like(z)
            x = forward_ad.unpack_dual(args[0] if args else kwargs["input"]).primal
            error = u.to(_wide(z)) * _for_rows(before[1], z)
            names = self.layers[layer]
            for own, gradient in local_gradients(layer, x, error, names).items():
                self.sums[names[own]] += gradient
        if noise is None:
            return output
        u = noise.like(z)
        if rows is not None:
            u = u * _for_rows(rows, z) if z.shape[:1] == rows.shape else torch.zeros_like(u)
        return forward_ad.make_dual(z, u if tangent is None else tangent + u)

    # -- passes are alike ---------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """What a pass leaves changed."""
        self.generators: list[tuple[Callable, Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
        for device in {t.device for t in tensors((self.inputs, self.parameters))}:
            if device.type not in ("cpu", "meta"):
                of_device = torch.get_device_module(device)
                set_state = functools.partial(of_device.set_rng_state, device=device)
                self.generators.append((set_state, of_device.get_rng_state(device)))
        self.buffers = [  # without those that nobody could write to; versions do not tell: batch_norm moves none
            (module, name, buffer, buffer.clone())
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference() and 0 not in buffer.stride()
        ]

    def _restore(self) -> None:
        for set_state, state in self.generators:
            set_state(state)
        for module, name, buffer, values in self.buffers:
            module._buffers[name] = buffer.copy_(values)

    def _compare(self, losses: Tensor, again: Tensor) -> None:
        """Where looking at values costs no synchronisation, or when LGKERNELS_CHECK=1."""
        if losses.shape != again.shape:
            raise _different(f"losses {tuple(again.shape)} after {tuple(losses.shape)}")
        if losses.device.type == "cpu" or environment.is_on("LGKERNELS_CHECK"):
            tolerance = torch.finfo(losses.dtype).eps ** 0.5  # kernels may round in other ways without a tangent
            if not torch.allclose(losses, again, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise _different("other losses")


def _subsets(count: int) -> Tensor:
    """(k, count) of bool, k the smallest: sample n belongs to the subsets of the n-th k-bit number that has k // 2
    ones. No two samples' numbers are one, and so each is in a subset without each other (Sperner)."""
    k = next(k for k in itertools.count(1) if math.comb(k, k // 2) >= count)
    bits = torch.arange(2**k, device="cpu") >> torch.arange(k, device="cpu").unsqueeze(1) & 1 == 1
    return bits[:, bits.sum(0) == k // 2][:, :count]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _for_rows(values: Tensor, z: Tensor) -> Tensor:
    """A value for each row of z; their sum for all of it, where it has other rows."""
    values = values.to(z.device)
    return values.view(-1, *[1] * (z.dim() - 1)) if z.shape[:1] == values.shape else values.sum()


def _check_losses(result: Any) -> None:
    expected = "return a loss (), or the losses (B,) of independent samples"
    way = "pass a function that calls the module and returns its loss, and modules="
    if not isinstance(result, Tensor) or result.dtype not in checks.FLOATING:
        what = checks.dtype_of(result) if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"function must {expected}, got {what}: {way}")
    if result.dim() > 1:
        raise ValueError(f"function must {expected}, got shape {checks.shape_of(result)}: {way}")


def _different(what: str) -> ValueError:
    return ValueError(
        "function must do the same each time that it is called (with random numbers of torch's global generators, or "
        f"none), got {what}"
    )
