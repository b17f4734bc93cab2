"""All variables of the environment that switch the package, checked at once: a command says what is wrong before it
works."""

import os

from . import dispatch, environment, native, trust


def check() -> None:
    """Raises ValueError, with the variable's name, for the first value that there is not."""
    given = environment.value("LGKERNELS_IMPL", "auto")
    if given not in dispatch.IMPLEMENTATIONS:
        raise ValueError(f"LGKERNELS_IMPL must be one of {', '.join(dispatch.IMPLEMENTATIONS)}, got {given!r}")
    trust.policy()
    for name in ("LGKERNELS_CHECK", "LGKERNELS_GRAPHS"):
        environment.is_on(name)
    if os.environ.get("LGKERNELS_CPU"):
        native.native()  # loaded now, as the processor's own level is asked for
