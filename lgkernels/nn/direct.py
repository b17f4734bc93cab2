"""Where the signal of DFA, sDFA and DRTP enters a network."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from .. import functional as LF
from ..core import checks, constructors
from ..ops.feedback.arguments import Scaled
from ..random import VALUES_PER_CALL, Law, RandomFeedback

__all__ = ["DirectFeedback"]

Init = Literal["nokland", "kaiming", "lighton", "lls"] | float

# Bound of the uniform law for N neurons, and its low end: the initialisations of the published codes.
INITS: dict[str, tuple[Callable[[int], float], float | None]] = {
    "nokland": (lambda n: 1 / math.sqrt(n), None),  # U(-1/sqrt(N), 1/sqrt(N))
    "kaiming": (lambda n: math.sqrt(6 / n), None),  # ChFrenkel's: U(-sqrt(6/N), sqrt(6/N))
    "lighton": (lambda n: 1 / math.sqrt(n), None),  # U(-1, 1) / sqrt(N of the widest layer), see max_features
    "lls": (lambda n: 1e-4, 0.0),  # U(0, 1e-4): all positive, as in the code of the LLS authors
}


class DirectFeedback(nn.Module):
    r"""Marks the place where the signal of a direct rule enters, and owns the random matrix that carries it.

    In the forward it is the identity. :class:`lgkernels.training.DirectTrainer` ends a block at it and puts the signal
    in place of the gradient of its input a (N values a sample): :math:`\delta = e B` (DFA),
    :math:`\mathrm{sign}(e) B` (sDFA), :math:`t B` (DRTP), with B (classes, N) random and fixed. B is a formula of 24
    bytes (:class:`lgkernels.random.RandomFeedback`), made where it is used; it is in no ``state_dict``
    (``nn.feedback_state`` has it).

    Args:
        init (str or float): ``"nokland"`` U(+-1/sqrt(N)), ``"kaiming"`` U(+-sqrt(6/N)) (ChFrenkel), ``"lighton"``
            U(+-1)/sqrt(max_features), ``"lls"`` U[0, 1e-4), or a number b: U(+-b).
        law (str): ``"uniform"``; ``"uniform8"``, cheaper, of the same range; ``"normal"``, ``"sign"`` of the same
            variance (not for ``"lls"``).
        seed, stream (int): of the random numbers; one stream for each place, or the same for all, when every B is a
            slice of one shared matrix (LightOn).
        max_features (int, optional): replaces N in `init`: the widest layer's.
        feedback (Tensor, optional): B itself, (C, \*shape) or (C, N), instead of a random one; then stored.
        impl (str): ``"auto"``, ``"reference"``, ``"torch"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Raises: ValueError, TypeError naming the argument.

    Source: Nokland 2016 (DFA); Frenkel, Lefebvre, Bol 2021 (DRTP, sDFA); Launay, Poli, Boniface, Krzakala 2020.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> place = lnn.DirectFeedback(seed=1)
        >>> activation = torch.rand(2, 3, 4, 4)
        >>> torch.equal(place(activation), activation)
        True
        >>> error = torch.tensor([[0.5, -0.5], [0.1, -0.1]])
        >>> delta = place.signal(error, activation)
        >>> torch.allclose(delta.flatten(1), error @ place.matrix(2, (3, 4, 4)).flatten(1))
        True
    """

    feedback: RandomFeedback | torch.Tensor

    def __init__(
        self,
        init: Init = "nokland",
        *,
        law: Law = "uniform",
        seed: int = 0,
        stream: int = 0,
        max_features: int | None = None,
        feedback: torch.Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(init, str):
            checks.choice("init", init, tuple(INITS))
        else:
            checks.positive("init", init, "a name or a number")
            init = float(init)
        checks.choice("law", law, tuple(VALUES_PER_CALL))
        checks.impl(impl)
        if max_features is not None:
            max_features = constructors.size("max_features", max_features)
        self.init, self.law, self.max_features, self.impl = init, law, max_features, impl
        random = RandomFeedback(seed, stream, law)  # checks both, also beside a given matrix
        if feedback is not None:
            checks.floating("feedback", feedback)
            if feedback.dim() < 2:
                raise ValueError(f"feedback must be (C, *shape) or (C, N), got shape {checks.shape_of(feedback)}")
            self.register_buffer("feedback", feedback.detach())
            return
        low = INITS[init][1] if isinstance(init, str) else None
        if low is not None and law not in ("uniform", "uniform8"):
            raise ValueError(f"law must be 'uniform' or 'uniform8' with init={init!r}, got {law!r}")
        random.low = low
        self.feedback = random  # its scale is set by N, at use

    def _feedback(self, shape: Sequence[int]) -> torch.Tensor | Scaled:
        if isinstance(self.feedback, torch.Tensor):
            return self.feedback
        neurons = self.max_features or max(math.prod(shape), 1)
        bound = INITS[self.init][0](neurons) if isinstance(self.init, str) else float(self.init)
        return Scaled(self.feedback, bound / math.sqrt(3) if self.law in ("normal", "sign") else bound)

    def formula(self, shape: Sequence[int]) -> tuple[torch.Tensor, Law, float, float | None] | None:
        """`(state, law, scale, low)` of B for neurons of `shape`; None where B is a tensor or a backend was chosen."""
        feedback = self._feedback(shape)
        if isinstance(feedback, torch.Tensor) or self.impl != "auto":
            return None
        random, scale = feedback
        return random.verified(), random.law, scale, random.low

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def matrix(self, classes: int, shape: Sequence[int]) -> torch.Tensor:
        r"""B (classes, \*shape) as a tensor, for tests and other programs."""
        feedback = self._feedback(shape)
        if isinstance(feedback, torch.Tensor):
            return feedback.view(classes, *shape)
        scaled = copy.copy(feedback.feedback)  # the same state tensor
        scaled.scale = feedback.scale
        return scaled.materialize((classes, *shape))

    @torch.no_grad()
    def signal(self, error: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        r"""error (B, C), or (B, T, C) for tokens, projected to shape and dtype of `activation` (B, [T,] \*shape)."""
        tokens = error.dim() - 1
        if error.shape[:-1] != activation.shape[:tokens]:
            raise ValueError(
                f"activation must have one row for each of the error's {tuple(error.shape[:-1])}, got "
                f"shape {checks.shape_of(activation)}"
            )
        shape = tuple(activation.shape[tokens:])
        delta = LF.feedback_projection(
            error.reshape(-1, error.shape[-1]).to(activation.dtype), self._feedback(shape), shape, impl=self.impl
        )
        return delta.view(activation.shape)

    @torch.no_grad()
    def target_signal(self, target: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """The rows of B for class indices (B,), or target (B, C) @ B, like `activation`."""
        if target.is_floating_point():
            return self.signal(target, activation)
        shape = tuple(activation.shape[target.dim() :])
        delta = LF.target_projection(target.reshape(-1), self._feedback(shape), shape, impl=self.impl)
        return delta.view(activation.shape).to(activation.dtype)

    def extra_repr(self) -> str:
        if isinstance(self.feedback, torch.Tensor):
            return f"feedback={tuple(self.feedback.shape)}"
        features = "" if self.max_features is None else f", max_features={self.max_features}"
        return f"init={self.init!r}, law={self.law!r}{features}"
