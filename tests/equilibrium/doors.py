"""Arguments that the family's ops accept: see integration/test_door.py."""

from tests.support.problems import randn

_NET = [randn(4, 3), randn(3, 4)], [], randn(3, 5), randn(5), [0, 1, 1, 0], 2
_OPTIONS = "sigmoid", "cross_entropy", "synchronous", 2, None
_STATE, _DRIVE, _TARGET = [randn(6, 4), randn(6, 3)], [randn(2, 4), randn(2, 3)], randn(2, 5)

# images of 5x5 pixels through a pool to 2x2, then a dense layer that the input skips to
_ENERGY = [randn(2, 2, 5, 5), [randn(3, 2, 3, 3), randn(12, 5), randn(50, 5)], [randn(3), randn(5)]]
_FORM = [0, 1, 1, 1, 3, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0], [2.0, 1.0], "clipped_relu", 1.0, True
_READOUT = randn(5, 4), randn(4), randn(2, 4)
_PHASES = "synchronous", 2, 2, [-0.1, 0.1]

DOORS = {
    "equilibrium_energy_phases": (
        [randn(2, 3, 2, 2), randn(2, 5)],
        *_ENERGY,
        *_READOUT,
        *_FORM,
        "cross_entropy",
        *_PHASES,
    ),
    "equilibrium_energy_gradients": ([randn(4, 3, 2, 2), randn(4, 5)], *_ENERGY, *_FORM, "mse", [-0.1, 0.1]),
    "equilibrium_settle": (_STATE, _DRIVE, *_NET, _TARGET, [0.1, 0.0], [0.0, 0.1], 1, *_OPTIONS),
    "equilibrium_error": (_DRIVE, _DRIVE, *_NET, _TARGET, 0.1, 3, *_OPTIONS),
    "equilibrium_homeostasis": (_NET[0], [randn(7, 4), randn(7, 3)], [0, 1, 1, 0], [4, 3], "paper"),
}
