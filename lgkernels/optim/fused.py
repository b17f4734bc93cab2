"""Weight gradient and optimizer step of large linear layers in one pass over their weights: dW is never formed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import checks, constructors
from ..nn import FeedbackAlignmentConv2d, FeedbackAlignmentLinear, SignSymmetricConv2d, SignSymmetricLinear
from . import fused_rules, fused_states
from .fused_layer import FusedLayer, FusedWeight, current_backward, hooked

__all__ = ["FusedUpdate", "fuse_update"]

_FusedLayer = FusedLayer  # its name in models that were saved whole
_current_backward = current_backward

# Whose weight gradient is known. Another subclass may compute anything from its weight, as parametrized layers do.
_KNOWN = (
    *(nn.Linear, FeedbackAlignmentLinear, SignSymmetricLinear),
    *(nn.Conv2d, FeedbackAlignmentConv2d, SignSymmetricConv2d),
)


class FusedUpdate:
    """What :func:`fuse_update` did: `layers` (names), and `remove()` to undo it."""

    def __init__(self, fused: list[FusedLayer], optimizer: torch.optim.Optimizer) -> None:
        self._fused = fused
        self._weights: list[FusedWeight] = list(dict.fromkeys(layer.step for layer in fused if layer.step))
        self.layers = [layer.name for layer in fused]
        self._hooks = [optimizer.register_step_pre_hook(self._step)]
        if any(weight.state_bits == 8 for weight in self._weights):
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(fused_states.before_load))
            self._hooks.append(optimizer.register_load_state_dict_post_hook(fused_states.after_load))

    def _step(self, optimizer: torch.optim.Optimizer, arguments: tuple, keywords: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*arguments[1:], *keywords.values())):
            raise RuntimeError(
                "optimizer.step() must have no closure with fuse_update, whose steps come before it: "
                "call it after the backward, or undo it with .remove()"
            )
        fused_rules.check(optimizer)  # load_state_dict brings options of its own
        for weight in self._weights:
            weight.refuse()
        # what a GradScaler leaves for optimizers that unscale by themselves (fused=True)
        found_inf, scale = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is not None and float(found_inf):
            for weight in self._weights:
                weight.skip()
            return
        for weight in self._weights:
            weight.update(1.0 if scale is None else 1.0 / float(scale))

    def remove(self) -> None:
        """Back to plain layers and a plain optimizer; its states go on (those of 8 bits in the weight's dtype), a
        gradient not yet stepped is dropped."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.drop_factors()
            weight.release()
            weight.unwatch()
        for layer in self._fused:
            del layer.module.forward
        self._fused, self._weights, self.layers = [], [], []

    def __repr__(self) -> str:
        return f"FusedUpdate({', '.join(self.layers)})"


def fuse_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    min_weights: int = 2**20,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    running_sum: bool = False,
    state_bits: int = 32,
) -> FusedUpdate:
    r"""Weight gradient and step of large linear layers in one pass, in ``optimizer.step()``: dW is never formed.

    .. math:: g = dy^T x, \quad m \leftarrow \beta_1 m + (1 - \beta_1)\,g, \quad v \leftarrow \beta_2 v + (1 -
        \beta_2)\,g^2, \quad W \leftarrow (1 - \eta\lambda)\,W - \eta\,\hat m / (\sqrt{\hat v} + \epsilon)

    and what else ``torch.optim.AdamW``, ``Adam``, ``SGD`` (momentum, dampening, Nesterov) and `BatchManhattan` do with
    their options. All other parameters, biases included, are stepped by the optimizer as ever. Until the step the
    layer's input x and the gradient dy of its output are kept in place of dW: M (N + K) elements for N K; the step uses
    them up, so a second one without a backward leaves these weights as they are. The states lie in the optimizer's
    ``state`` under their usual keys, in the weight's dtype: its ``state_dict`` is that of the plain optimizer. The
    learning rate is the group's at the step, so schedulers work. A copy of the model has plain layers; a conversion of
    it (``model.to``) between a backward and the step takes the factors along.

    With ``state_bits=8`` the states of the fused weights take 8 bits and 4 bytes for each block of 256 entries of a row
    (blockwise dynamic quantization: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022): 2.03
    bytes a weight for AdamW, 8 in float32. They lie in ``optimizer.state`` as ``exp_avg_codes``, ``exp_avg_absmax`` and
    so on, and a ``state_dict`` takes them along: load it after fuse_update. States in full precision, of a
    ``state_dict`` as well, are rounded to them at the next step; ``remove()`` makes full ones again, which the plain
    optimizer needs. A gradient that the caller has put into a fused weight's ``grad`` is used up by the step, too.

    Several backward passes before a step add up, as do several uses of a weight (a layer called twice, layers that
    share it); what reaches it in another way, a tied embedding's or a penalty's gradient, is added as it is. Each
    backward keeps its own M (N + K) elements; ``running_sum=True`` keeps one sum of N K for all but the last.
    ``torch.autograd.grad`` of a fused weight finds no way to it: it raises, or with ``materialize_grads=True`` gives
    zeros.

    ``torch.nn.utils.clip_grad_value_`` bounds the entries within the pass. ``clip_grad_norm_`` (the 2-norm, of a model
    or of one layer; before clip_grad_value_, not after it) takes the norm from the factors first: min(M^2 (N + K),
    M N K) multiply-adds more, a fiftieth of the step's at M = 8, N = K = 4096. A ``torch.amp.GradScaler`` works, and
    skips the step where a sum of M products could have left float32's range.

    Args:
        model (nn.Module): holds the layers. nn.Linear, nn.Conv2d with a 1x1 kernel, no padding and one group, and
            what `convert` makes of them are fused. Other subclasses and parametrized layers stay as they are.
        optimizer: ``torch.optim.AdamW``, ``Adam`` (without ``amsgrad`` and ``capturable``), ``SGD`` or `BatchManhattan`
            (without ``no_sign_change``), made with their weights.
        min_weights (int): smaller layers stay as they are. Default: 2^20.
        include (sequence of str, optional): names of the layers to fuse, of any size.
        exclude (sequence of str): names of layers to leave out.
        running_sum (bool): several backward passes before a step are added up in a tensor like the weight. Default:
            False, each keeps its factors.
        state_bits (int): 8 for states of 8 bits. Default: 32, states in the weight's dtype.

    Returns:
        FusedUpdate: with ``layers``, the fused names, and ``remove()``.

    Raises: TypeError, ValueError naming the argument, at the step too where ``optimizer`` got other options;
    RuntimeError, before any weight has moved, for states that do not fit, and for what needs the entries of a gradient
    (hooks of the weight, ``zero_grad(set_to_none=False)``, other norms), factors that were
    written to, create_graph=True, DistributedDataParallel, FSDP, a closure. torch.compile breaks its graph at these
    layers, with fullgraph=True it raises.

    Example:
        >>> import torch
        >>> from lgkernels.optim import fuse_update
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> fused = fuse_update(model, optimizer, include=["0"])
        >>> loss = model(torch.randn(2, 8)).square().mean()
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> fused
        FusedUpdate(0)
    """
    if _current_backward is None:
        raise RuntimeError(
            "fuse_update needs torch._C._current_graph_task_id, which this torch "
            f"({torch.__version__}) does not have: use the plain optimizer"
        )
    _check_model(model)
    fused_rules.check(optimizer)
    min_weights = constructors.size("min_weights", min_weights, 0)
    include = None if include is None else constructors.texts("include", include)
    exclude = constructors.texts("exclude", exclude)
    checks.boolean("running_sum", running_sum)
    if checks.positive_integer("state_bits", state_bits) not in (8, 32):
        raise ValueError(f"state_bits must be 32 or 8, got {state_bits}")
    if include == ():
        raise ValueError("include must name at least one linear layer, or be None, got ()")
    linear = {name: m for name, m in model.named_modules() if _is_linear(m)}
    for argument, names in (("include", include or ()), ("exclude", exclude)):
        for name in names:
            if name not in linear:
                raise ValueError(
                    f"{argument} must name linear layers of model ({', '.join(linear) or 'none here'}), got {name!r}"
                )
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    chosen = []
    for name, module in linear.items():
        if name in exclude or (include is not None and name not in include):
            continue
        reason = _why_not(name, module, stepped)
        if reason is not None and include is not None:
            raise ValueError(f"include: {reason}")
        if reason is None and (include is not None or module.weight.numel() >= min_weights):
            _check_layer(name, module)
            chosen.append((name, module))
    if not chosen and include is not None:
        raise ValueError(f"include must name a layer that exclude does not, got {include} and exclude={exclude}")
    if not chosen:
        raise ValueError(
            "model has no linear layer to fuse: none of at least "
            f"min_weights={min_weights} weights that the optimizer steps"
            + (", beside those in exclude" if exclude else "")
        )
    weights: dict[Any, FusedWeight] = {}
    for name, module in chosen:
        if state_bits == 8:
            fused_states.restore(optimizer.state.get(module.weight, {}), module.weight, name)
        weights.setdefault(module.weight, FusedWeight(module.weight, optimizer, running_sum, state_bits))
    return FusedUpdate([FusedLayer(name, module, weights[module.weight]) for name, module in chosen], optimizer)


def _is_linear(module: nn.Module) -> bool:
    """Whether its weight gradient is dy^T x."""
    if isinstance(module, nn.Conv2d):
        plain = module.padding in ((0, 0), "valid") or module.padding == "same"
        return module.kernel_size == (1, 1) and module.groups == 1 and plain
    return isinstance(module, nn.Linear)


def _why_not(name: str, module: Any, stepped: set[Any]) -> str | None:
    """Why a layer cannot be fused."""
    if type(module) not in _KNOWN:  # before its weight is asked for, which may be computed
        plain = "nn.Conv2d" if isinstance(module, nn.Conv2d) else "nn.Linear"
        return (
            f"layer {name!r} must be {plain} itself or what convert makes of it, got the subclass "
            f"{type(module).__name__}, whose weight may have another gradient: leave it out"
        )
    reason = None
    if not module.weight.requires_grad:
        reason = "is frozen (requires_grad=False): leave it out, or unfreeze it first"
    elif module.weight not in stepped:
        reason = "is not among the optimizer's parameters"
    elif not module.weight.is_contiguous():
        reason = "is not contiguous"
    return reason and f"the weight of layer {name!r} {reason}"


def _check_model(model: nn.Module) -> None:
    constructors.module("model", model)
    for module in model.modules():
        sharded = any("FSDP" in base.__name__ for base in type(module).__mro__)
        if sharded or isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model must not be wrapped in {type(module).__name__}: ranks exchange gradients that "
                "fuse_update never stores"
            )


def _check_layer(name: str, module: nn.Module) -> None:
    """Raises where a layer to be fused has hooks for its gradient, or a forward that is not its class's."""
    if hooked(module.weight):  # type: ignore[arg-type]
        raise ValueError(
            f"the weight of layer {name!r} has hooks for its gradient, which is never formed: exclude "
            "the layer, or remove the hooks"
        )
    owner = getattr(vars(module).get("forward"), "__self__", None)
    if isinstance(owner, FusedLayer) and owner.step is None:
        del module.forward  # of a copied model
    if "forward" in vars(module):
        raise ValueError(f"layer {name!r} has a forward of its own (an earlier fuse_update?): remove it first")
