"""What stays open for long and can be told to end: a WebSocket, a stream of events, a log that is followed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from noid.errors import NoidError


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why something that is open has to end: what its client hears, and what a WebSocket is closed with."""

    error: NoidError
    code: int
    reason: str


class Stay:
    """One thing that is open until it ends by itself, is told to, or *deadline* (of trio's clock) has come.

    Costs no task: a thousand of them are idle at once.
    """

    __slots__ = ("_at_deadline", "_deadline", "_scope", "_told")

    def __init__(self, deadline: float = math.inf, at_deadline: End | None = None) -> None:
        self._deadline = deadline
        self._at_deadline = at_deadline
        self._told: End | None = None
        self._scope: trio.CancelScope | None = None

    @property
    def over(self) -> End | None:
        """Why it has to end; None as long as it need not."""
        if self._told is None and trio.current_time() >= self._deadline:
            return self._at_deadline
        return self._told

    def end(self, why: End) -> None:
        """Have it end. The first reason counts."""
        self._told = self._told or why
        if self._scope is not None:
            self._scope.cancel()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Wait in the block, which is left when this has to end: look at `over` behind it. Not to be nested."""
        with trio.CancelScope(deadline=self._deadline) as self._scope:
            if self._told is not None:
                self._scope.cancel()
            try:
                yield
            finally:
                self._scope = None
