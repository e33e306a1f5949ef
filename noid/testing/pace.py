"""How much slower than a usual machine this one is: what every deadline of a test is multiplied by.

``NOID_TEST_SLOWNESS`` says it, as a number of at least 1. Under emulation, where a guest runs guests of its own, it is
set by who starts the tests; nothing measures it, because a machine that is busy now would stretch all that follows.
"""

from __future__ import annotations

import os

VARIABLE = "NOID_TEST_SLOWNESS"


def slowness() -> float:
    """Return the factor.

    Raises:
        ValueError: the variable holds something else than a number of at least 1.
    """
    factor = float(os.environ.get(VARIABLE, "1"))
    if not factor >= 1:
        raise ValueError(f"{VARIABLE} is {factor:g}; it must be at least 1.")
    return factor
