"""A kernel's result must not depend on the order in which threads and blocks run."""

from tests.simt import executor
from tests.support.tolerances import assert_bit_equal


def in_every_order(family, run):
    """`run(backend of the family)` returns a tensor or several; their bits must not depend on the order."""
    simt, kernels = executor.module(), executor.backend(family)
    first = None
    try:
        for order in executor.ORDERS:
            simt.set_order(order)
            result = run(kernels)
            result = result if isinstance(result, tuple) else (result,)
            first = first or result
            for index, (got, expected) in enumerate(zip(result, first)):
                assert_bit_equal(f"output {index} in {order} order", got.reshape(-1), expected.reshape(-1))
    finally:
        simt.set_order("ascending")
    return first
