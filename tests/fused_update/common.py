"""Shared by the tests of the family `fused_update`: steps by name."""

import math

from lgkernels.ops.fused_update.options import UpdateRule

STEPS = {
    "sgd": UpdateRule("sgd", 0.1),
    "decay": UpdateRule("sgd", 0.1, weight_decay=0.1),
    "momentum": UpdateRule("sgd", 0.1, 0.9, weight_decay=0.01),
    "dampening": UpdateRule("sgd", 0.1, 0.9, 0.7),
    "nesterov": UpdateRule("sgd", 0.1, 0.9, weight_decay=0.1, nesterov=True),
    "manhattan": UpdateRule("manhattan", 0.01, weight_decay=0.1),
    "manhattan, momentum": UpdateRule("manhattan", 0.01, 0.9, weight_decay=0.1),
    "adam": UpdateRule("adam", 0.02, 0.9, 0.1, 0.1, beta2=0.99, eps=1e-8, root=0.1),
    "adamw": UpdateRule("adam", 0.02, 0.9, 0.1, keep=0.99, beta2=0.999, eps=1e-3, root=math.sqrt(0.001)),
}


def states(name):
    """How many states a step has."""
    rule = STEPS[name]
    return 2 if rule.rule == "adam" else 1 if rule.momentum else 0
