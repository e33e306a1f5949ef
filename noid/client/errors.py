"""What goes wrong between a client and its agent, beyond what the agent itself reports.

::

    NoidError
    ├── ServerError                   the agent answered, and the answer is an error; carries its status and code
    └── DependencyDown
        └── ConnectionFailed          the agent cannot be reached, is no agent, or went away
            └── ConnectionLost        ... while a command ran: its fate is unknown
"""

from __future__ import annotations

from noid.errors import DependencyDown, NoidError


class ServerError(NoidError):
    """The agent refused or failed. *status* is HTTP's, 0 inside a stream; *code* is one of `noid.errors`."""

    def __init__(self, text: str, *, status: int, code: str | None = None) -> None:
        super().__init__(f"server error ({status}): {text}" if status else text)
        self.status = status
        self.code = code or "internal"


class ConnectionFailed(DependencyDown):
    """There is no talking to the agent. What was asked for may or may not have happened if it was sent already."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"connection error: {detail}")


class ConnectionLost(ConnectionFailed):
    """The connection ended before the result of a command came. The command may have ended, or run no more."""
