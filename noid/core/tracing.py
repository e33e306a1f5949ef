"""On whose behalf a task works: the id of a request, for every line in the log until the request and its work end.

A task inherits it from the task that starts it. A request's operation `carries on` after its client has left; what only
happens to be started meanwhile, such as the watch over a machine, says the id no longer once the request has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class _Cause:
    """A request, and how many tasks still work for it."""

    __slots__ = ("id", "workers")

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.workers = 0


_cause: ContextVar[_Cause | None] = ContextVar("noid.cause", default=None)


def request_id() -> str | None:
    """Return the id of the request this task works for; None for none, or one that has ended."""
    cause = _cause.get()
    return cause.id if cause is not None and cause.workers else None


@contextlib.contextmanager
def working_for(request_id: str) -> Iterator[None]:
    """Work for the request *request_id*, and so do the tasks that are started meanwhile."""
    token = _cause.set(_Cause(request_id))
    try:
        with carrying_on():
            yield
    finally:
        _cause.reset(token)


@contextlib.contextmanager
def carrying_on() -> Iterator[None]:
    """Go on working for the request, if there is one, also when it ends meanwhile."""
    cause = _cause.get()
    if cause is None:
        yield
        return
    cause.workers += 1
    try:
        yield
    finally:
        cause.workers -= 1
