"""Which call an operation is carried out for: what the caller may learn of it early, and what is written with it.

A call is a context variable, as a request's id is: it reaches the operation through every verb of the agent without
being an argument of each. An operation's own task and what that starts have none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import trio

from noid.core.store import Tx


class Call:
    """A request that may start one operation.

    Attributes:
        opening: What the transaction that opens the operation's page holds as well, given the operation's id.
        operation: The id of its operation, once that is in the journal.
        begun: Set then.
    """

    def __init__(
        self, opening: Callable[[Tx, str], None] | None = None, on_begin: Callable[[], None] | None = None
    ) -> None:
        self.opening = opening
        self._on_begin = on_begin
        self.operation: str | None = None
        self.begun = trio.Event()

    def begin(self, operation: str) -> None:
        """Let whoever asked know that *operation* is in the journal."""
        self.operation = operation
        self.begun.set()
        if self._on_begin is not None:
            self._on_begin()


CURRENT: ContextVar[Call | None] = ContextVar("noid.call", default=None)
