"""The optional native module `lgkernels._C`, loaded at first use."""
from functools import lru_cache

import torch  # noqa: F401  before _C, so that both share one OpenMP pool


@lru_cache(maxsize=1)
def _load():
    try:
        from lgkernels import _C
    except ImportError as error:
        return None, str(error)
    return _C, None


def native():
    """`lgkernels._C`, or None where the package was built without it."""
    return _load()[0]


def native_error():
    """Why `native()` is None: the import error's text; None where it loaded."""
    return _load()[1]
