"""What clients hold open after they were let in, and its end: with the server, or with the token it was opened with.

A request asks for its token once, at its beginning. What stays open would outlive every revocation, so whose it is is
asked again from time to time: once for each token, whatever it holds open, by one task for all.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from noid.core.model.times import now
from noid.core.model.users import Caller, Credentials
from noid.core.people.users import Users
from noid.errors import NoidError, Unauthenticated
from noid.server.hardening import RESTARTING, End, Stay
from noid.server.visit import current_caller, visit

logger = logging.getLogger(__name__)

RECHECK_SECS = 60.0

CLOSE_POLICY_VIOLATION = 1008
TOKEN_ENDED = End(
    error=Unauthenticated("the token this was opened with was revoked or has expired. Open it again with a valid one."),
    code=CLOSE_POLICY_VIOLATION,
    reason="the token is no longer valid",
)


@dataclass(slots=True, kw_only=True)
class _Held:
    """What is open with one token."""

    caller: Caller
    stays: set[Stay] = field(default_factory=set)


class OpenStreams:
    """Everything that is open at one server. Setting *stopping* ends all of it; `watch` has to run."""

    def __init__(self, users: Users, stopping: trio.Event) -> None:
        self._users = users
        self._stopping = stopping
        self._held: dict[Credentials | None, _Held] = {}

    @property
    def stopping(self) -> trio.Event:
        """Set when the server goes down."""
        return self._stopping

    @contextlib.contextmanager
    def stay(self) -> Iterator[Stay]:
        """Hold something open for the current request, which is told when it has to end."""
        caller, shown = current_caller(), visit().shown
        stay = Stay(_deadline(caller), TOKEN_ENDED)
        if self._stopping.is_set():
            stay.end(RESTARTING)
        held = self._held.setdefault(shown, _Held(caller=caller))
        held.stays.add(stay)
        try:
            yield stay
        finally:
            held.stays.remove(stay)
            if not held.stays and self._held.get(shown) is held:
                del self._held[shown]

    async def watch(self) -> None:
        """End what has to end, until the server stops."""
        while not self._stopping.is_set():
            with trio.move_on_after(RECHECK_SECS):
                await self._stopping.wait()
            for shown, held in list(self._held.items()):
                if self._stopping.is_set():
                    break
                if shown is not None and not self._is_valid(shown, held.caller):
                    _end(held, TOKEN_ENDED)
                await trio.lowlevel.checkpoint()  # there may be thousands of tokens
        for held in self._held.values():
            _end(held, RESTARTING)

    def _is_valid(self, shown: Credentials, caller: Caller) -> bool:
        try:
            allowed = self._users.authenticate(shown)
        except Unauthenticated:
            logger.info("what user %s held open with token %r ends with it", caller.user.name, caller.token)
            return False
        except NoidError as error:  # nobody knows, so nothing changes
            logger.warning("whether tokens are still valid cannot be asked now: %s", error)
            return True
        return caller.scopes <= allowed.scopes


def _end(held: _Held, why: End) -> None:
    for stay in held.stays:
        stay.end(why)


def _deadline(caller: Caller) -> float:
    """Return when *caller*'s token ends, on trio's clock."""
    if caller.expires_at is None:
        return math.inf
    return trio.current_time() + (caller.expires_at - now()).total_seconds()
