"""How a long build says what it is doing: ``with stage("downloading the kernel"):``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Stage = Callable[[str], AbstractContextManager[object]]
"""Called with what is about to be done; the context it returns lasts as long as that takes."""


def silent(what: str) -> AbstractContextManager[object]:  # the shape of a Stage
    """Say nothing."""
    return nullcontext()
