"""For how long a stream whose connection was lost tries again: its agent is being started anew, or is gone."""

from __future__ import annotations

import time

from noid.client.errors import ConnectionLost, ServerError

REATTACH_SECS = 10.0
RETRY_SECS = 0.2


class Again:
    """The tries of one stream. A connection counts as one that worked when it lasted for `REATTACH_SECS`."""

    def __init__(self) -> None:
        self._connected_at = time.monotonic()
        self._until: float | None = None

    def begins(self) -> bool:
        """A connection was lost. Return whether that is a new one, not another try."""
        now = time.monotonic()
        if self._until is not None and now - self._connected_at < REATTACH_SECS:
            return False
        self._until = now + REATTACH_SECS
        return True

    @property
    def is_worth_it(self) -> bool:
        """Whether to try once more."""
        return self._until is not None and time.monotonic() < self._until

    def succeeded(self) -> None:
        """There is a connection again."""
        self._connected_at = time.monotonic()

    @staticmethod
    def failed(lost: ConnectionLost, error: ServerError) -> ConnectionLost:
        """Return what to raise when the agent that is there again refuses."""
        detail = str(lost).removeprefix("connection error: ")
        return ConnectionLost(f"{detail} Trying again failed: {error}")
