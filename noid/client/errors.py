"""What goes wrong between a client and its agent, beyond what the agent itself reports.

::

    NoidError
    ├── ServerError                   the agent answered, and the answer is an error; carries its status and code
    │   └── ServerTooOld              ... it cannot do that, and nothing was done
    ├── CommandFailed                 a command in a guest did not end with 0, and its caller wanted that
    └── DependencyDown
        └── ConnectionFailed          the agent cannot be reached, is no agent, or went away
            └── ConnectionLost        ... before the answer, or the end of a command, came: its fate is unknown
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from noid.errors import DependencyDown, NoidError, Unsupported

if TYPE_CHECKING:
    from noid.client.completed import Completed

WORDS_SHOWN_MAX = 200


class ServerError(NoidError):
    """The agent refused or failed. *status* is HTTP's, 0 inside a stream; *code* is one of `noid.errors`."""

    def __init__(self, text: str, *, status: int, code: str | None = None) -> None:
        super().__init__(f"server error ({status}): {text}" if status else text)
        self.status = status
        self.code = code or "internal"


class ServerTooOld(ServerError):
    """The server cannot do *deed*: its *version* is too old. Nothing was done."""

    def __init__(self, address: str, version: str, deed: str, instead: str = "") -> None:
        words = f"the server at {address} ({version}) cannot {deed} (501). Nothing was done."
        super().__init__(f"{words} {instead or 'That needs noid-server 0.3.0 or newer.'}", status=0)
        self.status, self.code = Unsupported.status, Unsupported.code
        self.deed = deed


class ConnectionFailed(DependencyDown):
    """There is no talking to the agent. What was asked for may or may not have happened if it was sent already."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"connection error: {detail}")


class ConnectionLost(ConnectionFailed):
    """The connection ended before the answer came. What was asked for may have happened; a command may run on."""


class CommandFailed(NoidError):
    """A command ended, and not with 0. *completed* says how, and has what it wrote."""

    def __init__(self, completed: Completed) -> None:
        words = " ".join(completed.argv)
        ended = "timed out" if completed.timed_out else f"ended with exit code {completed.exit_code}"
        last_words = completed.stderr.decode("utf-8", "replace").strip()[-WORDS_SHOWN_MAX:]
        super().__init__(f"{words[:WORDS_SHOWN_MAX]!r} {ended}" + (f": {last_words}" if last_words else "."))
        self.completed = completed
