"""The request that is being served: its id, when it began, where it comes from, and who it turned out to be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from noid.core.model.users import Caller, Credentials, User


@dataclass(slots=True, kw_only=True)
class Visit:
    """One request while it is served: its id in log and reply, when it began, and who it turned out to be.

    *reply_headers* are put into the reply whatever it is, also that to an error.
    """

    id: str
    began: float
    address: str
    caller: Caller | None = None
    shown: Credentials | None = field(default=None, repr=False)
    """The token that says so, and from where: for who must know whether it still does, and for no log."""
    reply_headers: dict[str, str] = field(default_factory=dict)
    target: str = ""
    """What it is about, for the audit log: what the path names, unless the handler knows better."""
    acted: bool = False
    """Whether something has been done that would be done again if the call were repeated, whatever it is answered."""
    upgraded: Callable[[], Awaitable[None]] | None = None
    """What is to be done when it becomes a WebSocket, before anything happens on that."""

    @property
    def user(self) -> User | None:
        """Who it turned out to be."""
        return None if self.caller is None else self.caller.user

    @property
    def is_local(self) -> bool:
        """Whether it came through the local socket, without a token."""
        return self.caller is not None and self.caller.token is None


current: ContextVar[Visit] = ContextVar("noid.visit")
"""Set by `noid.server.requestlog` around every request."""


def current_caller() -> Caller:
    """Return who asks, and what that allows. Only behind the guard, which lets nobody else in."""
    caller = visit().caller
    assert caller is not None  # noqa: S101  # see above
    return caller


def current_user() -> User:
    """Return who the current request comes from. Only behind the guard, as `current_caller`."""
    return current_caller().user


def visit() -> Visit:
    """Return the current request's `Visit`."""
    return current.get()
