"""Things that go wrong on demand: a script of failures that the simulators follow.

::

    faults.arm("capture", fail(NoSpace("the disk is full")))   # the first capture from now on raises
    faults.arm("restore", die, nth=2, after=True)              # the second restored VMM is killed at once
    faults.arm("wake", hang)                                   # `await faults.reached("wake")` returns then
    faults.arm("launch", kill_agent)                           # kill -9 of this very process

Names of calls: `CALLS`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

import trio

CALLS = frozenset(
    {"launch", "restore", "adopt", "prepare_pause", "pause", "capture", "capture.finish", "resume", "pivot_disk",
     "disk_path", "channel", "kill", "connect", "connect_port", "start", "attach", "processes",
     "release", "wake", "ping", "power_off", "reboot", "press_power_button"}
)  # fmt: skip

Action = Callable[[int | None], Awaitable[None]]
"""What happens: awaited with the pid of the VMM, where there is one already."""


class Crash(BaseException):
    """Stands for the end of the agent at this point, where a test wants to see the traceback of a ``kill -9``.

    Not an `Exception`, so that no handler mistakes it for a failure. Shielded clean-up still runs, which a real kill
    would not allow: `kill_agent` is the honest one, for agents that have a process of their own.
    """


def fail(error: BaseException) -> Action:
    """Raise *error*."""

    async def action(_: int | None) -> None:
        raise error

    return action


async def hang(_: int | None) -> None:
    """Never answer."""
    await trio.sleep_forever()


async def die(pid: int | None) -> None:
    """Kill the VMM; the call goes on and finds out."""
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


async def crash(_: int | None) -> NoReturn:
    """Raise `Crash`."""
    raise Crash


async def kill_agent(_: int | None) -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Armed:
    call: str
    action: Action
    nth: int
    after: bool


class Faults:
    """The script. Without arms, nothing goes wrong; `calls` counts what was called, and `struck` what went wrong."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.struck: list[str] = []
        self._armed: list[_Armed] = []
        self._arrivals: dict[str, trio.Event] = {}

    def arm(self, call: str, action: Action, *, nth: int = 1, after: bool = False) -> None:
        """Let *action* happen once, before (or *after*) the *nth* call from now on.

        Raises:
            ValueError: there is no such call.
        """
        if call not in CALLS:
            raise ValueError(f"there is no call {call!r}; calls are {', '.join(sorted(CALLS))}")
        self._armed.append(_Armed(call=call, action=action, nth=self.calls[call] + nth, after=after))

    def disarm(self) -> None:
        """Forget what has not happened yet."""
        self._armed.clear()

    async def reached(self, call: str) -> None:
        """Return as soon as a fault at *call* has struck: the moment to cancel something that hangs there."""
        await self._arrivals.setdefault(call, trio.Event()).wait()

    async def before(self, call: str, pid: int | None = None) -> None:
        """Called by a simulator as *call* begins."""
        self.calls[call] += 1
        await self._strike(call, pid, after=False)

    async def after(self, call: str, pid: int | None = None) -> None:
        """Called by a simulator once *call* has had its effect, before it returns."""
        await self._strike(call, pid, after=True)

    async def _strike(self, call: str, pid: int | None, *, after: bool) -> None:
        now = [a for a in self._armed if (a.call, a.nth, a.after) == (call, self.calls[call], after)]
        for armed in now:
            self._armed.remove(armed)
            self.struck.append(f"{'after' if after else 'before'} {call}")
            self._arrivals.setdefault(call, trio.Event()).set()
            await armed.action(pid)
