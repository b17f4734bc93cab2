"""The forward-gradient estimator for any torch module; what one call of it does is in forward_gradient_passes.py."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..core import checks
from ..random import RandomFeedback
from .forward_gradient_passes import estimate

__all__ = ["forward_gradient"]


def forward_gradient(
    function: Callable,
    *inputs: Any,
    perturb: Literal["activities", "weights"] = "activities",
    draws: int = 1,
    noise: RandomFeedback | None = None,
    modules: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] | None = None,
    separate: bool | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The loss of any torch module, and an unbiased estimate of its gradients, by forward-mode derivatives alone.

    With :math:`\ell_n` the loss of sample n, :math:`L` their mean over B samples, and noise of independent elements
    with mean 0 and variance 1:

    .. math::
        \text{weights:} \quad \hat g = \langle \nabla_w L, v \rangle \, v
        \qquad\qquad
        \text{activities:} \quad \hat e_n = \tfrac1B \big\langle \nabla_z \ell_n, u \big\rangle \, u_n, \quad
        \hat g = \sum_n \hat e_n \, \frac{\partial z_n}{\partial w}

    :math:`v` is shaped like the parameters. :math:`u` is added to the tangent of the output z of every linear,
    convolution (transposed too) and embedding layer, each time that it is called, and :math:`\langle\cdot\rangle`, the
    directional derivative, comes from one pass with dual numbers. The layer's own parameters then get their gradient
    from its input and the estimate of the error at its output. All other parameters (norms' scale and shift, free
    tensors, recurrent cells, attention's projections, parametrized weights, weights that are used outside of their
    layer too) are perturbed as weights in the same pass.

    Nothing is kept for a backward pass: one layer's activations exist at a time, whatever the depth, beside gradients
    and noise of the parameters' size. Perturbed activities take draws + 1 passes (their noise is made again, not kept),
    and up to k more in each call where B > 1 losses are returned; perturbed weights take draws. The variance grows with
    the number of elements that are perturbed, and falls with `draws` and, where activities are perturbed, with the
    batch.

    - **Losses of samples**: where `function` returns B losses, each sample's error comes from its own loss; from a mean
      that is returned, or where samples mix (batch normalisation in training, say), from the loss of the whole
      batch, with more variance. Whether they mix is tried out in each call, by k
      passes in which some samples alone are perturbed, or fewer once they are seen to: the smallest k with
      :math:`\binom{k}{\lfloor k/2 \rfloor} \ge B`, which is 4 for 4 samples, 7 for 32, 10 for 128, 12 for 512. Each
      sample is once perturbed without each other, so none goes unseen. A mean that is returned costs no such pass,
      and neither do losses of which `separate` says whether they mix.
      A layer whose output has not the samples as its first dimension gets the loss of the whole batch as well.
    - **Random layers**: all passes see the same numbers of torch's global generators (dropout's masks); those of
      generators of your own must be the same at each call of `function`. Buffers (running statistics) move as in one
      forward pass.
    - **Stop a gradient** with ``.detach()``: ``torch.no_grad()`` inside of `function` does not stop a tangent.
    - Attention runs with torch's math kernel, since its others have no forward-mode derivative; compiled modules run
      eagerly. Kernels that are called past torch's dispatcher (bindings of your own) drop tangents unseen: give them an
      autograd.Function with a jvp.

    Args:
        function (callable): a module or function whose result of `inputs` is the loss (), or the losses (B,) of
            independent samples. It is called several times. For a module that returns anything else, pass a function
            that calls it and returns the loss, and the module as `modules`.
        inputs: what `function` is called with.
        perturb (str): ``"activities"`` or ``"weights"``.
        draws (int): independent estimates that are averaged.
        noise (RandomFeedback, optional): law "normal" or "sign", of any scale; a call advances it by one step. None:
            normal, seeded by torch's global generator.
        modules (Module, list or dict of them, optional): what the gradients are of, where `function` is no module.
        separate (bool, optional): whether the n-th of the losses depends on the n-th sample alone. None: tried out.
            True is believed: where samples mix after all, the estimate is biased.

    Returns:
        tuple[Tensor, dict[str, Tensor]]: the mean loss (), and a gradient for each parameter that requires one, by the
        names of ``named_parameters()``; those of a list begin with ``"0."``, ..., of a dict with its keys. For any
        optimizer: ``for name, p in model.named_parameters(): p.grad = gradients.get(name)``.

    Raises: ValueError, TypeError naming the argument. NotImplementedError for an op without forward-mode derivative,
        naming the op, its module and what to do, and under torch.compile, torch.func transforms and forward-mode AD.

    Source: Baydin et al., "Gradients without Backpropagation" (2022); Ren, Kornblith, Liao, Hinton, "Scaling Forward
    Gradient With Local Losses" (ICLR 2023).

    Example:
        >>> import torch
        >>> from lgkernels.random import RandomFeedback
        >>> from lgkernels.functional import forward_gradient
        >>> model, x, y = torch.nn.Linear(2, 1, bias=False), torch.eye(2), torch.tensor([1.0, 3.0])
        >>> noise = RandomFeedback(seed=0, law="sign")
        >>> def losses(x, y):
        ...     return (model(x).squeeze(1) - y) ** 2
        >>> loss, gradients = forward_gradient(losses, x, y, noise=noise, modules=model)
        >>> losses(x, y).mean().backward()
        >>> torch.allclose(gradients["weight"], model.weight.grad)  # one unit: its error is known exactly
        True
    """
    _refuse_transforms()
    if not callable(function):
        raise TypeError(f"function must be a torch.nn.Module or another callable, got {type(function).__name__}")
    checks.choice("perturb", perturb, ("activities", "weights"))
    draws = checks.positive_integer("draws", draws, below=2**20)
    if noise is not None:
        if not isinstance(noise, RandomFeedback):
            raise TypeError(f"noise must be a RandomFeedback or None, got {checks.got(noise)}")
        if noise.law not in ("normal", "sign"):
            raise ValueError(f"noise must be of the law 'normal' or 'sign', whose mean is 0, got {noise.law!r}")
    if separate is not None:
        checks.boolean("separate", separate)
    named = _named(function, inputs, modules)
    result = estimate(function, inputs, named, perturb == "activities", draws, noise, separate)
    if noise is not None:
        noise.advance()
    return result


def _refuse_transforms() -> None:
    where = "under torch.compile" if torch.compiler.is_compiling() else None
    if where is None and torch._C._are_functorch_transforms_active():
        where = "inside of torch.func transforms (grad, vjp, jvp, vmap, ...)"
    if where is None and forward_ad._current_level >= 0:
        where = "inside of another forward-mode derivative (torch has one level of them)"
    if where is not None:
        raise NotImplementedError(
            f"forward_gradient does not run {where}: it runs passes with dual numbers. Call it outside"
        )


def _check_inputs(module: nn.Module, inputs: tuple) -> None:
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # of no Python function
        return
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise TypeError(
            f"inputs must be what {type(module).__name__}.forward takes ({error}), got {len(inputs)}. A module that is "
            "passed alone must return its loss: otherwise pass a function that does, and modules="
        ) from error


def _named(function: Any, inputs: tuple, modules: Any) -> dict[str, nn.Module]:
    """Modules by the prefix of their parameters' names."""
    expected = "a torch.nn.Module, or a list or dict of them"
    if modules is None:
        if not isinstance(function, nn.Module):
            raise TypeError(f"modules must be {expected}, where function is none, got None")
        _check_inputs(function, inputs)
        return {"": function}
    if isinstance(modules, nn.Module):
        return {"": modules}
    if isinstance(modules, Mapping):
        named = dict(modules)
    elif isinstance(modules, (list, tuple)):
        named = {str(i): module for i, module in enumerate(modules)}
    else:
        raise TypeError(f"modules must be {expected}, got {checks.got(modules)}")
    if not named:
        raise ValueError(f"modules must be {expected}, at least one, got {checks.got(modules)}")
    for name, module in named.items():
        if not isinstance(name, str) or not isinstance(module, nn.Module):
            raise TypeError(f"modules must be {expected}, by names, got {checks.got(modules)}")
    return {f"{name}.": module for name, module in named.items()}
