"""LoRA and LoKr adapters in plain torch, factorised: the weight's change is never built.

LoRA: y = base + s (x a^T) b^T. LoKr: x viewed (n, c, d), y viewed (n, a, b), w1 (a, c) and w2 (b, d) = A B:

    T = x B^T (n, c, r)    U = w1 T (n, a, r)    y = base + s U A^T (n, a, b)
    V = G A (n, a, r)      dA = s G^T U          dw1 = s sum_n V T^T
    dT = s w1^T V          dB = dT^T x           dx = G W + dT B

With a full w2, A is the identity: T = x w2^T, y = base + s w1 T. In a convolution B is a k x k convolution with r
outputs, the same one on each of the c groups of input channels, and w1 and A are 1 x 1. A weight that is None is zero:
the change alone, for a layer that has several, or one with dropout.
"""

import torch
import torch.nn.functional as F


def _product(x, m):
    """x (N, k) m (k, r); of rank 1 a matrix-vector product, which libraries run several times faster (half precision
    keeps to the matrix product: there vector products accumulate in half)."""
    if m.shape[1] == 1 and x.dtype in (torch.float32, torch.float64):
        return torch.mv(x, m.squeeze(1)).unsqueeze(1)
    return x @ m


def _add_product(y, u, m, scale):
    """y (N, k) += scale u (N, r) m (r, k), in place; of rank 1 element by element."""
    return y.addcmul_(u, m, value=scale) if m.shape[0] == 1 else y.addmm_(u, m, alpha=scale)


def _base(x, weight, bias, out):
    return x.new_zeros(len(x), out) if weight is None else F.linear(x, weight, bias)


def _through_base(g, x, weight):
    return torch.zeros_like(x, memory_format=torch.contiguous_format) if weight is None else g @ weight


def lora_linear(x, weight, bias, a, b, scale):
    """`(y (N, out), t (N, r))` for x (N, in)."""
    t = _product(x, a.t())
    return _add_product(_base(x, weight, bias, len(b)), t, b.t(), scale), t


def lora_linear_grads(g, x, weight, a, b, t, scale, needs):
    """Gradients of x, weight, bias, a, b; those not needed are empty."""
    none = g.new_empty(0)
    grad_t = _product(g, b).mul_(scale)
    return (
        _add_product(_through_base(g, x, weight), grad_t, a, 1) if needs[0] else none,
        g.t() @ x if needs[1] else none.clone(),
        g.sum(0) if needs[2] else none.clone(),
        _product(x.t(), grad_t).t().contiguous() if needs[3] else none.clone(),
        _product(g.t(), t).mul_(scale) if needs[4] else none.clone(),
    )


def _mix(w1, t):
    """(n, c, r) -> w1 t (n, a, r)."""
    if t.shape[2] == 1:
        return (t.squeeze(2) @ w1.t()).unsqueeze(2)
    return (t.transpose(1, 2) @ w1.t()).transpose(1, 2).contiguous()


def _pairs(v, t):
    """sum_n v (n, a, r) t (n, c, r)^T: (a, c)."""
    return v.transpose(1, 2).reshape(-1, v.shape[1]).t() @ t.transpose(1, 2).reshape(-1, t.shape[1])


def lokr_linear(x, weight, bias, w1, a, b, scale):
    """`(y (N, out), T, U)` for x (N, in); a None: b is the full w2, and U empty."""
    t = _product(x.reshape(-1, b.shape[1]), b.t()).view(len(x), w1.shape[1], b.shape[0])
    u = _mix(w1, t)
    y = _base(x, weight, bias, len(w1) * len(b if a is None else a))
    if a is None:
        y.view(u.shape).add_(u, alpha=scale)
        return y, t, t.new_empty(0)
    _add_product(y.view(-1, a.shape[0]), u.view(-1, a.shape[1]), a.t(), scale)
    return y, t, u


def lokr_linear_grads(g, x, weight, w1, a, b, t, u, scale, needs):
    """Gradients of x, weight, bias, w1, a, b; those not needed are empty."""
    none, rows = g.new_empty(0), len(g)
    flat = g.reshape(-1, b.shape[0] if a is None else a.shape[0])
    v = (flat if a is None else _product(flat, a)).view(rows, w1.shape[0], b.shape[0])
    grad_t = _mix(w1.t(), v).mul_(scale).view(-1, b.shape[0])
    grad_x = none
    if needs[0]:
        grad_x = _through_base(g, x, weight)
        _add_product(grad_x.view(-1, b.shape[1]), grad_t, b, 1)
    return (
        grad_x,
        g.t() @ x if needs[1] else none.clone(),
        g.sum(0) if needs[2] else none.clone(),
        _pairs(v, t).mul_(scale) if needs[3] else none.clone(),
        _product(flat.t(), u.view(-1, a.shape[1])).mul_(scale) if needs[4] and a is not None else none.clone(),
        _product(x.reshape(-1, b.shape[1]).t(), grad_t).t().contiguous() if needs[5] else none.clone(),
    )


def _grouped(x, channels):
    """(B, groups * channels, H, W) -> (B * groups, channels, H, W)."""
    return x.reshape(-1, channels, *x.shape[2:])


def _mix_groups(w1, t, groups):
    """(B, groups, c, rP) -> (B, groups, a / groups, rP); w1 (a, c), its rows split over the groups."""
    return torch.matmul(w1.view(groups, -1, w1.shape[1]), t)


def lokr_conv2d(x, weight, bias, geometry, w1, a, b, scale):
    """`(y, T (B, groups, c, r P), U (B, groups, a / groups, r P))` of P positions; b (r, d, kh, kw), or with a None the
    full w2, and U empty."""
    stride, padding, dilation, groups = geometry
    t = F.conv2d(_grouped(x, b.shape[1]), b, None, stride, padding, dilation)
    if weight is None:
        y = x.new_zeros(len(x), len(w1) * len(b if a is None else a), *t.shape[2:])
    else:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous()
    area = y.shape[2] * y.shape[3]
    t = t.reshape(len(x), groups, w1.shape[1], b.shape[0] * area)  # no -1 where x may be empty
    u = _mix_groups(w1, t, groups)
    if a is None:
        y.view(u.shape).add_(u, alpha=scale)
        return y, t, t.new_empty(0)
    planes = y.view(-1, a.shape[0], area)
    planes.baddbmm_(a.expand(len(planes), -1, -1), u.view(len(planes), a.shape[1], area), alpha=scale)
    return y, t, u


def lokr_conv2d_grads(g, x, weight, geometry, w1, a, b, t, u, scale, needs):
    """Gradients of x, weight, bias, w1, a, b; those not needed are empty."""
    none, g, area = g.new_empty(0), g.contiguous(), g.shape[2] * g.shape[3]
    stride, padding, dilation, groups = geometry
    if weight is None:
        grad_x = grad_weight = grad_bias = None
    else:
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            g, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(needs[:3])
        )
    if a is None:
        v, grad_a = g, none.clone()
    else:
        planes = g.view(-1, a.shape[0], area)
        v = a.t().expand(len(planes), -1, -1) @ planes
        grad_a = none.clone()
        if needs[4]:
            grad_a = torch.einsum("nbp,nrp->br", planes, u.view(len(planes), a.shape[1], area)).mul_(scale)
    v = v.view(len(g), groups, w1.shape[0] // groups, b.shape[0] * area)
    grad_w1 = none.clone()
    if needs[3]:
        grad_w1 = torch.einsum("ngak,ngck->gac", v, t).reshape(w1.shape).mul_(scale)
    grad_t = torch.matmul(w1.view(groups, -1, w1.shape[1]).transpose(1, 2), v).mul_(scale)
    grad_t = grad_t.view(-1, b.shape[0], *g.shape[2:])
    through_x, grad_b, _ = torch.ops.aten.convolution_backward(
        grad_t,
        _grouped(x, b.shape[1]),
        b,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        1,
        [needs[0], needs[5], False],
    )
    if needs[0]:
        through_x = through_x.reshape(x.shape)
        grad_x = through_x if grad_x is None else grad_x.contiguous().add_(through_x)
    return tuple(none.clone() if t is None else t for t in (grad_x, grad_weight, grad_bias, grad_w1, grad_a, grad_b))
