"""Whether a guest answers: its agent is asked now and then, and what is known is kept for whoever looks.

An idle machine costs one message of a few bytes every `PING_EVERY_SECS` and nothing else. Where others have heard from
the guest meanwhile, not even that.
"""

from __future__ import annotations

import logging
import random
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

import trio

from noid.core.backends import Guest
from noid.core.model.times import now
from noid.errors import NoidError

logger = logging.getLogger(__name__)

PING_EVERY_SECS = 10.0
#: How long a guest may take to answer. Far more than a busy host needs, and than a checkpoint's pause takes.
ANSWER_SECS = 10.0


class Line(Protocol):
    """A connection to a guest agent, which may be open or not: `noid.core.vms.supervisor.GuestLink`."""

    @property
    def heard_at(self) -> float | None:
        """When the guest said something last on the connection that is open, on trio's clock. None: none is open."""
        ...

    @property
    def is_seen(self) -> bool:
        """Whether a question would be seen by the guest's users: typed on its console, for want of an agent."""
        ...

    def guest(self) -> AbstractAsyncContextManager[Guest]:
        """Yield the guest, connected."""
        ...


class Health:
    """What is known of one guest. *name* is what messages in the log call its machine.

    Attributes:
        responding: Whether it answered when it was last heard or asked; None before that.
        unresponsive_since: When it was first asked in vain, while it does not answer.
    """

    def __init__(self, name: str) -> None:
        self.responding: bool | None = None
        self.unresponsive_since: datetime | None = None
        self._name = name
        self._suspended = False

    def suspend(self) -> None:
        """Ask nothing, and know nothing: the guest is about to be paused, and its silence means nothing."""
        self._suspended = True
        self.responding = self.unresponsive_since = None

    def go_on(self) -> None:
        """Look after the guest again: its CPUs run."""
        self._suspended = False

    def heard(self) -> None:
        """Take notice that the guest has just answered somebody."""
        if self._suspended:
            return  # that was before
        if self.responding is False:
            logger.warning("machine %s answers again", self._name)
        self.responding, self.unresponsive_since = True, None

    async def watch(self, line: Line) -> None:
        """Ask the guest now and then, for ever. One that would see the question is not asked, only heard."""
        # Machines that were adopted together are not asked together.
        await trio.sleep(random.uniform(0, PING_EVERY_SECS))  # noqa: S311  # no secret
        while True:
            heard_at = line.heard_at
            idle_secs = PING_EVERY_SECS if heard_at is None else trio.current_time() - heard_at
            if idle_secs < PING_EVERY_SECS:
                self.heard()
            else:
                if not line.is_seen and not self._suspended:
                    await self.ask(line, ANSWER_SECS)
                idle_secs = 0.0
            await trio.sleep(PING_EVERY_SECS - idle_secs)

    async def ask(self, line: Line, secs: float) -> bool:
        """Ask the guest once and return whether it answered within *secs*."""
        asked_at = now()
        problem = f"no answer within {secs:g} s"
        with trio.move_on_after(secs):
            try:
                async with line.guest() as guest:
                    await guest.ping()
            except NoidError as error:
                problem = str(error)
            else:
                self.heard()
                return True
        if self._suspended:  # meanwhile
            return False
        if self.responding is not False:
            logger.warning("machine %s does not answer: %s", self._name, problem)
            self.unresponsive_since = asked_at
        self.responding = False
        return False
