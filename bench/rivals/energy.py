"""The step of `energy-based-learning` (Scellier et al., NeurIPS 2023), where a clone of it lies on PYTHONPATH."""

import importlib

import torch

_NAMES = (
    "model.hopfield.network",
    "model.function.cost",
    "model.function.network",
    "model.hopfield.minimizer",
    "training.sgd",
)


def energy_based_learning():
    """What its modules define, by name; None where it is not there."""
    found = {}
    try:
        for name in _NAMES:
            found |= vars(importlib.import_module(name))
    except ImportError:
        return None
    return found if "ConvHopfieldEnergy32" in found else None


def conv32_step(library, net, channels, x, target, steps, nudge_steps, beta):
    """A training step of its 32x32 net by centred nudges, from the weights of `net`, a HopfieldNet of such channels."""
    own = {key: w.detach().clone() for key, w in net.named_weights().items()}
    energy = library["ConvHopfieldEnergy32"](x.shape[1], net.num_classes, *channels)
    edges = [f"{a}-{b}" for a, b in zip(("in", *net.layers), net.layers)]
    values = [own[f"{edge}/bias"] for edge in edges] + [own[f"{edge}/kernel"] for edge in edges]
    for parameter, value in zip(energy.params(), values):
        parameter.state = value.view(parameter.shape)
    energy.set_device("cpu")
    layers, network = energy.layers(), library["Network"](energy)
    cost = library["SquaredError"](layers[-1])
    nudged = library["AugmentedFunction"](energy, cost)

    def minimizer(function, many):
        return library["FixedPointMinimizer"](function, network.free_layers(), many, net.schedule)

    free = minimizer(energy, steps)
    estimator = library["EquilibriumProp"](
        energy.params(), layers, nudged, cost, minimizer(nudged, nudge_steps), "centered", beta
    )
    optimizer = torch.optim.SGD([p.state for p in energy.params()], lr=0.0)
    names = [f"{edge}/bias" for edge in edges] + [f"{edge}/kernel" for edge in edges]

    def run():
        network.set_input(x, reset=True)
        free.compute_equilibrium()
        cost.set_target(target)
        gradients = estimator.compute_gradient()
        for parameter, gradient in zip(energy.params(), gradients):
            parameter.state.grad = gradient
        optimizer.step()
        return {name: g.reshape(own[name].shape) for name, g in zip(names, gradients)}

    return run
