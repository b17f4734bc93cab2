"""The public functions: check the arguments, then call the family's autograd entry."""
import torch

from .core import checks
from .ops.feedback import arguments as _arguments
from .ops.feedback import autograd as _feedback
from .ops.lls import autograd as _lls
from .ops.lls import basis as _basis

__all__ = ["feedback_conv2d", "feedback_linear", "feedback_projection", "lls_basis", "lls_loss",
           "sign_symmetric_conv2d", "sign_symmetric_linear", "target_projection"]

_WAVEFORMS = ("square", "cosine")


def lls_basis(rows, dim, *, waveform="square", min_freq=50.0, max_freq=512.0, device=None):
    r"""Periodic basis of Local Learning Signals.

    .. math:: \Phi_{kj} = \sin(\mathrm{fl32}(f_k\, j)), \qquad f = \mathrm{linspace}(f_{min}, f_{max}, K)

    in radians, ``j = 0 .. d-1``; ``waveform="square"`` is its sign (column 0, sin 0, stays 0). Built once on the
    CPU in float32 and cached for each device: linspaces and sines of other devices differ.

    Args:
        rows (int): K, number of basis rows (classes, unless the modulation is reduced).
        dim (int): d, size of the latents.
        waveform (str): ``"square"`` or ``"cosine"``. "cosine" is the paper's name; the authors' code computes a
            sine, and so do we.
        min_freq, max_freq (float): first and last frequency.
        device: where the table lies. Default: CPU.

    Returns:
        Tensor: (rows, dim) float32, a copy that you may write to.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Apolinario, Roy, Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural Activity
    Synchronization", WACV 2025, and its code.

    Example:
        >>> import lgkernels.functional as LF
        >>> LF.lls_basis(2, 4)
        tensor([[ 0., -1., -1., -1.],
                [ 0.,  1., -1.,  1.]])
    """
    checks.positive_integer("rows", rows)
    checks.positive_integer("dim", dim)
    checks.choice("waveform", waveform, _WAVEFORMS)
    return _basis.table(rows, dim, waveform, min_freq, max_freq, device).clone()


def lls_loss(activation, target, modulation=None, *, num_classes, pool_size, waveform="square", temperature=0.5,
             label_smoothing=0.0, normalize=True, eps=1e-12, zero_gradient_below_eps=False, basis=None,
             basis_scale=1.0, loss="cross_entropy", ignore_index=-100, reduction="mean", impl="auto"):
    r"""Local loss of LLS, LLS-M and LLS-MxM: the layer's pooled activation against a fixed periodic basis.

    .. math::
        x = \mathrm{pool}(a), \quad s = \frac{x}{\max(\lVert x\rVert_2, \epsilon)} \Phi^T, \quad
        z = s \;|\; s \odot m \;|\; s M, \quad L = \mathrm{CE}(z / T, y)

    Args:
        activation (Tensor): (B, C, H, W), pooled to ``pool_size`` x ``pool_size`` by adaptive average pooling and
            flattened to d = C * pool_size^2 latents, or (B, N), pooled along N to d = pool_size. float32,
            bfloat16, float16; float64 runs in the reference.
        target (Tensor): (B,) class indices, any integer dtype.
        modulation (Tensor, optional): None is LLS; (num_classes,) LLS-M; (K, num_classes) LLS-MxM, K rows of the
            basis (K != num_classes: the reduced set).
        num_classes (int): C.
        pool_size (int): P. It may exceed the activation's size (features repeat), and bins may overlap.
        waveform (str): ``"square"`` or ``"cosine"``; see :func:`lls_basis`.
        temperature (float): T.
        label_smoothing (float): in [0, 1].
        normalize (bool): divide the latents by their L2 norm (False: the TESS variant).
        eps (float): lower bound of that norm. A row below it gets the gradient of the bounded formula, up to
            1/eps large, as torch's ``normalize`` gives.
        zero_gradient_below_eps (bool): give such a row no gradient instead.
        basis (Tensor, optional): (K, d) replaces the periodic basis (the random-basis control). Not trained.
        basis_scale (float): factor on the basis (TESS: 1/d).
        loss (str): ``"cross_entropy"`` or ``"hard_sigmoid_mse"`` (TESS): mean over classes of
            (hard_sigmoid(z/T) - onehot)^2, with a straight-through gradient, hard_sigmoid(v) = clamp(v/4 + 1/2, 0, 1).
        ignore_index (int): rows with this target count nothing.
        reduction (str): ``"mean"`` (over the rows not ignored), ``"sum"``, ``"none"``.
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: the loss, () or (B,) for ``"none"``; float32 (float64 for float64). Its gradients to ``activation``
        and ``modulation`` are exact; there is no second derivative (differentiating twice raises).

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Results are bitwise repeatable. Source: Apolinario, Roy, Roy, WACV 2025 (LLS); TESS (its later head).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> activation = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> loss = LF.lls_loss(activation, torch.tensor([0, 1]), num_classes=2, pool_size=2)
        >>> loss.backward()
        >>> activation.grad.shape
        torch.Size([2, 3, 4, 4])
    """
    checks.floating("activation", activation)
    checks.dims("activation", activation, (2, 4), "(B, C, H, W) or (B, N)")
    checks.integer("target", target)
    checks.shape("target", target, activation.shape[:1], "one class index per row of activation")
    checks.positive_integer("num_classes", num_classes)
    checks.positive_integer("pool_size", pool_size)
    checks.choice("waveform", waveform, _WAVEFORMS)
    checks.choice("loss", loss, ("cross_entropy", "hard_sigmoid_mse"))
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.positive("temperature", temperature)
    checks.positive("eps", eps)
    checks.between("label_smoothing", label_smoothing, 0.0, 1.0)
    if loss != "cross_entropy" and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 with loss={loss!r}, got {label_smoothing}")
    if 0 in activation.shape[1:]:
        raise ValueError(f"activation must have no empty dimension but the batch, got shape {checks.shape_of(activation)}")
    dim = _lls.op.latent_size(activation.shape, pool_size)
    if basis is not None:
        checks.floating("basis", basis)
        checks.dims("basis", basis, (2,), f"(K, {dim})")
        checks.shape("basis", basis, (basis.shape[0], dim), "the size of the pooled latents")
        basis = basis.detach()
    if modulation is not None:
        checks.floating("modulation", modulation)
        checks.dims("modulation", modulation, (1, 2), "(num_classes,) or (K, num_classes)")
        if modulation.shape[-1] != num_classes:
            raise ValueError(f"modulation must be (num_classes,) or (K, num_classes) with num_classes={num_classes}, "
                             f"got shape {checks.shape_of(modulation)}")
    if basis is not None:
        rows = modulation.shape[0] if modulation is not None else num_classes
        if basis.shape[0] != rows:
            raise ValueError(f"basis must have {rows} rows ("
                             f"{'those of modulation' if modulation is not None else 'num_classes'}), got {basis.shape[0]}")
    checks.same_device(activation=activation, target=target, modulation=modulation, basis=basis)
    return _lls.lls_loss(activation, target, modulation, basis, waveform, num_classes, pool_size, float(temperature),
                         float(label_smoothing), normalize, float(eps), zero_gradient_below_eps, float(basis_scale),
                         loss, ignore_index, reduction, impl)


# -- feedback without weight transport ----------------------------------------------------------------------------

def feedback_linear(x, weight, bias=None, *, feedback, impl="auto"):
    r"""Linear layer of feedback alignment (FA): the error goes down through a fixed matrix instead of the weight.

    .. math:: y = x W^T + b, \qquad dX = g F, \quad dW = g^T x, \quad db = \sum g

    Args:
        x (Tensor): (..., K). weight (Tensor): (N, K). bias (Tensor, optional): (N,). float32, bfloat16, float16, and
            float64 in the reference. Under autocast they are cast as torch's own linear casts them.
        feedback: F, a tensor (N, K) of any float dtype, or a :class:`lgkernels.random.RandomFeedback`, which takes no
            memory: its numbers are made where they are used. It gets no gradient.
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (..., N). F is read in the backward alone, and only where x requires a gradient. There is no second
        derivative (differentiating twice raises).

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for
    deep learning", 2016.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2)
        >>> LF.feedback_linear(x, weight, feedback=torch.full((3, 2), 0.5)).sum().backward()
        >>> x.grad
        tensor([[1.5000, 1.5000]])
    """
    _arguments.check_linear(x, weight, bias)
    formula, source = _arguments.alignment(weight, feedback)
    return _feedback.linear(x, weight, bias, formula, **source, impl=impl)


def feedback_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, feedback, impl="auto"):
    r"""Convolution of feedback alignment (FA): dX is the input gradient of the convolution with F instead of W.

    Args:
        x (Tensor): (B, C, H, W) or (C, H, W). weight (Tensor): (O, C / groups, kh, kw). bias (Tensor, optional): (O,).
        stride, padding, dilation, groups: as ``torch.nn.functional.conv2d``, ``padding="same"`` and ``"valid"`` too.
        feedback: F, a tensor like weight, or a :class:`lgkernels.random.RandomFeedback` (rows are outputs, columns
            the flattened rest of the weight).
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, O, H', W'). dW and db are the ordinary gradients. F is made in one pass and freed after the
        library's backward of the convolution; nothing is made where x requires no gradient.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: as :func:`feedback_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> from lgkernels.random import RandomFeedback
        >>> x = torch.ones(1, 3, 8, 8, requires_grad=True)
        >>> y = LF.feedback_conv2d(x, torch.ones(4, 3, 3, 3), padding="same", feedback=RandomFeedback(seed=0))
        >>> y.sum().backward()
        >>> y.shape, x.grad.shape
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 3, 8, 8]))
    """
    x, geometry, batched = _arguments.conv2d(x, weight, bias, stride, padding, dilation, groups)
    formula, source = _arguments.alignment(weight, feedback)
    y = _feedback.conv2d(x, weight, bias, *geometry, formula, **source, impl=impl)
    return y if batched else y.squeeze(0)


def sign_symmetric_linear(x, weight, bias=None, *, scale=1.0, magnitude=None, sign_zero="zero", packed_signs=False,
                          impl="auto"):
    r"""Linear layer with sign-symmetric feedback: the error goes down through the signs of the weight.

    .. math::
        y = x W^T + b, \qquad dX = g F, \quad F = s\,|M| \odot \mathrm{sign}(W), \quad dW = g^T x, \quad db = \sum g

    Args:
        x (Tensor): (..., K). weight (Tensor): (N, K). bias (Tensor, optional): (N,). float32, bfloat16, float16, and
            float64 in the reference. Under autocast they are cast as torch's own linear casts them.
        scale (float): s, or ``"mean_abs"``: mean(abs(weight)), taken anew at each call (ours, in no paper).
        magnitude: M. None is uSF; a tensor like weight or a :class:`lgkernels.random.RandomFeedback` frSF; the latter
            advanced after each optimizer step brSF. It gets no gradient.
        sign_zero (str): sign(0) is ``"zero"`` (such a weight sends no feedback, as in every published code) or
            ``"plus"`` (+1, also of -0.0).
        packed_signs (bool): read the signs from one bit a weight, packed in the forward: the backward does not need
            the weight. Needs ``sign_zero="plus"``.
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (..., N). F is made in the backward alone, from the weight as it is then, and only where x requires a
        gradient. There is no second derivative (differentiating twice raises).

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: Liao, Leibo, Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (uSF, brSF, frSF);
    Xiao, Chen, Liao, Poggio, "Biologically-plausible learning algorithms can scale to large datasets", ICLR 2019
    (the scale).

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight = torch.ones(1, 2, requires_grad=True), torch.tensor([[0.3, -2.0], [4.0, 0.0]])
        >>> LF.sign_symmetric_linear(x, weight, scale=0.5).sum().backward()
        >>> x.grad
        tensor([[ 1.0000, -0.5000]])
    """
    _arguments.check_linear(x, weight, bias)
    formula, source = _arguments.sign_symmetric(weight, scale, magnitude, sign_zero, packed_signs)
    return _feedback.linear(x, weight, bias, formula, **source, impl=impl)


def sign_symmetric_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, scale=1.0,
                          magnitude=None, sign_zero="zero", packed_signs=False, impl="auto"):
    r"""Convolution with sign-symmetric feedback: dX is the input gradient of the convolution with F instead of W.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as :func:`feedback_conv2d`.
        scale, magnitude, sign_zero, packed_signs: F = scale * abs(magnitude) * sign(weight), as
            :func:`sign_symmetric_linear`.
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, O, H', W'). dW and db are the ordinary gradients.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: as :func:`sign_symmetric_linear`.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> x, weight = torch.ones(1, 1, 2, 2, requires_grad=True), torch.tensor([[[[-3.0]]], [[[0.5]]], [[[2.0]]]])
        >>> LF.sign_symmetric_conv2d(x, weight, scale=0.25).sum().backward()
        >>> x.grad
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])
    """
    x, geometry, batched = _arguments.conv2d(x, weight, bias, stride, padding, dilation, groups)
    formula, source = _arguments.sign_symmetric(weight, scale, magnitude, sign_zero, packed_signs)
    y = _feedback.conv2d(x, weight, bias, *geometry, formula, **source, impl=impl)
    return y if batched else y.squeeze(0)


def feedback_projection(error, feedback, shape, *, impl="auto"):
    r"""Direct feedback alignment (DFA): the output's error, projected to a layer.

    .. math:: \delta = e B

    Args:
        error (Tensor): e (B, C), as you want it scaled: it is never divided by B. Pass ``error.sign()`` for sDFA.
        feedback: B, a tensor (C, \*shape) or (C, prod(shape)), or a :class:`lgkernels.random.RandomFeedback` (row =
            class, column = neuron), of which nothing is stored.
        shape: sizes of one sample of the layer's activation, (N,) or (channels, height, width).
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, \*shape) in error's dtype, to stand in place of the gradient of that activation. No gradient flows
        through it.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected.

    Source: Nokland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.feedback_projection(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.5]]), (3,))
        tensor([[1., 0., 2.]])
    """
    checks.floating("error", error)
    checks.dims("error", error, (2,), "(B, C)")
    shape, columns, source = _arguments.projection("error", error, feedback, shape, error.shape[1])
    return _feedback.project(error, columns, *source, impl).view(error.shape[0], *shape)


def target_projection(target, feedback, shape, *, impl="auto"):
    r"""Direct random target projection (DRTP): the target, projected to a layer. It needs no output, so no error.

    .. math:: \delta = t B \quad\text{(class indices: row } B_y \text{)}

    Args:
        target (Tensor): (B,) class indices of any integer dtype, or (B, C) floats (one-hot, or any other).
        feedback: B, as :func:`feedback_projection`.
        shape: sizes of one sample of the layer's activation.
        impl (str): ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``.

    Returns:
        Tensor: (B, \*shape), to stand in place of the gradient of that activation; in target's dtype, for indices in
        feedback's (float32 for a RandomFeedback). No gradient flows through it.

    Raises:
        ValueError, TypeError: naming argument, what was got and what was expected. Indices are checked on the CPU, and
        elsewhere with ``LGKERNELS_CHECK=1``.

    Source: Frenkel, Lefebvre, Bol, "Learning without feedback: fixed random learning signals allow for feedforward
    training of deep neural networks", Frontiers in Neuroscience 2021.

    Example:
        >>> import torch, lgkernels.functional as LF
        >>> LF.target_projection(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [0.0, 0.5]]), (2,))
        tensor([[0.0000, 0.5000],
                [1.0000, 2.0000]])
    """
    checks.tensor("target", target)
    if target.is_floating_point() and target.dim() == 2:
        return feedback_projection(target, feedback, shape, impl=impl)
    checks.integer("target", target)
    checks.dims("target", target, (1,), "(B,) class indices or (B, C) floats")
    shape, columns, source = _arguments.projection("target", target, feedback, shape)
    return _feedback.rows(target, columns, *source, impl).view(target.shape[0], *shape)
