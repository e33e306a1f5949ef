"""Which call an operation is carried out for: what the caller may learn of it early, and what is written with it.

A call is a context variable, as a request's id is: it reaches the operation through every verb of the agent without
being an argument of each. An operation's own task and what that starts have none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import trio

from noid.core.database.store import Tx


class Call:
    """A request that may start one operation.

    Attributes:
        opening: What the transaction that opens the operation's page holds as well, given the operation's id.
        operation: The id of its operation, once that is in the journal.
        begun: Set then.
        is_carried_out: Whether its operation goes on without whoever made it, and is what tells that it is settled.
    """

    def __init__(
        self, opening: Callable[[Tx, str], None] | None = None, on_settled: Callable[[], None] | None = None
    ) -> None:
        """Call *on_settled* when the journal knows its operation, or it is over without that; perhaps more than once.

        That is while it is carried out; before, whoever makes the call knows what has become of it.
        """
        self.opening = opening
        self._on_settled = on_settled
        self.operation: str | None = None
        self.begun = trio.Event()
        self.is_carried_out = False

    def begin(self, operation: str) -> None:
        """Let whoever asked know that *operation* is in the journal."""
        self.operation = operation
        self.begun.set()
        self.settle()

    def settle(self) -> None:
        """Let those who wait for what has become of it look."""
        if self._on_settled is not None:
            self._on_settled()


CURRENT: ContextVar[Call | None] = ContextVar("noid.call", default=None)
