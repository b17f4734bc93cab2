"""Arguments that the family's op accepts: see integration/test_door.py."""

from tests.support.problems import randn


def _of_each_parameter(seed):
    return [randn(4, seed=seed), randn(2, 3, seed=seed)]


DOORS = {"offset_sgd_": (*(_of_each_parameter(i) for i in range(4)), 0.1, 0.9, 0.0, 1.0, 1.0, 1.0)}
