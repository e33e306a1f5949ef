"""The request that is being served: its id, when it began, where it comes from, and who it turned out to be."""

from __future__ import annotations

from dataclasses import dataclass

from quart import g

from noid.core.model import User


@dataclass(slots=True, kw_only=True)
class Visit:
    """One request while it is served: its id in log and reply, when it began, and who it turned out to be."""

    id: str
    began: float
    address: str
    user: User | None = None
    is_local: bool = False


def current_user() -> User:
    """Return who the current request comes from. Only behind the guard, which lets nobody else in."""
    user = visit().user
    assert user is not None  # noqa: S101  # see above
    return user


def visit() -> Visit:
    """Return the current request's `Visit`."""
    found = g.visit
    assert isinstance(found, Visit)  # noqa: S101  # the guard put it there
    return found
