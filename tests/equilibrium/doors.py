"""Arguments that the family's ops accept: see integration/test_door.py."""

from tests.support.problems import randn

_NET = [randn(4, 3), randn(3, 4)], [], randn(3, 5), randn(5), [0, 1, 1, 0], 2
_OPTIONS = "sigmoid", "cross_entropy", "synchronous", 2, None
_STATE, _DRIVE, _TARGET = [randn(6, 4), randn(6, 3)], [randn(2, 4), randn(2, 3)], randn(2, 5)

DOORS = {
    "equilibrium_settle": (_STATE, _DRIVE, *_NET, _TARGET, [0.1, 0.0], [0.0, 0.1], 1, *_OPTIONS),
    "equilibrium_error": (_DRIVE, _DRIVE, *_NET, _TARGET, 0.1, 3, *_OPTIONS),
    "equilibrium_homeostasis": (_NET[0], [randn(7, 4), randn(7, 3)], [0, 1, 1, 0], [4, 3], "paper"),
}
