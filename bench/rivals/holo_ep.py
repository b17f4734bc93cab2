"""The step of `generalized-holo-ep` (Laborieux & Zenke, ICLR 2024; JAX), where a clone of it lies on PYTHONPATH and JAX
and Flax are installed. Its modules import names that are not there (any more), and that a step does not use."""

import importlib
from typing import Any

import torch

_NAMES = ("utils.funcs", "models.vfs", "models.dyn")
_MISSING = {"jax": ("device_put_replicated",), "utils.funcs": ("dalify", "ff_exc_fb_inh")}


def generalized_holo_ep():
    """What its modules define, by name; None where it is not there."""
    found: dict[str, Any] = {}
    try:
        for module, names in _MISSING.items():
            loaded = importlib.import_module(module)
            for name in names:
                try:
                    getattr(loaded, name)
                except AttributeError:
                    setattr(loaded, name, None)
        for name in _NAMES:
            found |= vars(importlib.import_module(name))
    except ImportError:
        return None
    return found if "DiscreteDynamics" in found else None


def _node(tree, path):
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def dense_step(library, net, x, target, nudge):
    """A training step of `net`, an EquilibriumMLP, by their estimator and SGD with momentum at rate 0, compiled at the
    first call. nudge: beta, points and steps."""
    jax, (beta, points, steps) = library["jax"], nudge
    numpy, tree_map = jax.numpy, jax.tree_util.tree_map
    tree: dict[str, Any] = {}
    paths = {key: key.split("/") for key in net.named_weights()}
    for key, w in net.named_weights().items():
        _node(tree, paths[key][:-1])[paths[key][-1]] = numpy.asarray(w.detach().numpy())
    units = {edge.split("-")[1]: w["kernel"].shape[1] for edge, w in tree.items() if edge != "readout"}
    kinds = {edge: "dense" if "bias" in w else "dense_nobias" for edge, w in tree.items() if edge != "readout"}
    shapes = {layer: (n,) for layer, n in units.items()}
    field = library["mlp_discrete_vf"](shapes, units, kinds, "xent", library["sigmoid"])
    dynamics = library["DiscreteDynamics"](vf=field, seed=0)

    @jax.jit
    def step(params, momentum, x, y):
        free = dynamics.fwd(params, dynamics.batch_nrn(x), x, y, 0.0, net.steps)
        gradients = dynamics.hep_vf(params, free, x, y, steps, beta, points)
        momentum = tree_map(lambda m, g: 0.9 * m + g, momentum, gradients)
        return tree_map(lambda p, m: p - 0.0 * m, params, momentum), momentum, gradients

    one_hot = torch.nn.functional.one_hot(target, net.num_classes).float()
    batch = [numpy.asarray(t.numpy()) for t in (x, one_hot)]
    state = [{"params": tree}, tree_map(numpy.zeros_like, {"params": tree})]

    def run():
        *state[:], gradients = jax.block_until_ready(step(*state, *batch))
        made = jax.device_get(gradients)["params"]
        return {key: torch.from_numpy(_node(made, path[:-1])[path[-1]].copy()) for key, path in paths.items()}

    return run
