"""A process of a VM that needs no client: looked at, waited for, signalled, attached to."""

from __future__ import annotations

from noid.client.answers import ProcessInfo
from noid.client.calls import processes as calls
from noid.client.link import Link
from noid.sdk.running import RunningProcess

WAIT_SECS = 300.0


class Process:
    """A process of the VM *vm*. *info* is what the server said of it last."""

    def __init__(self, link: Link, vm: str, info: ProcessInfo) -> None:
        self.vm = vm
        self.info = info
        self._link = link

    @property
    def id(self) -> str:
        """Its id, 8 hex digits, for as long as it is known; a copy of the VM has a process of that id too."""
        return self.info["id"]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of {self.vm!r}: {self.info['state']}>"

    async def refresh(self) -> ProcessInfo:
        """Ask the server, and return the new `info`."""
        self.info = await self._link.perform(calls.get(self.vm, self.id))
        return self.info

    async def wait(self) -> ProcessInfo:
        """Return the `info` it has when it has ended, or is lost with its machine."""
        while True:
            self.info = await self._link.perform(calls.wait(self.vm, self.id, at_most_secs=WAIT_SECS))
            if self.info["state"] != "running":
                return self.info

    async def signal(self, signal: str | int) -> None:
        """Send *signal*, ``"TERM"`` or 15, to it and what it has started; one that has ended does not mind."""
        await self._link.perform(calls.send_signal(self.vm, self.id, signal))

    async def remove(self) -> None:
        """End it if it runs, and forget it and its output."""
        await self._link.perform(calls.end(self.vm, self.id))

    def attach(self, *, from_start: bool = True, readonly: bool = False) -> RunningProcess:
        """Return what has its output when it is entered: from its start as far as that is kept, or from now on.

        Input can be sent unless it is *readonly*. Leaving it does not end the process.
        """
        command = tuple(self.info["command"])
        return RunningProcess(
            self._link,
            self.vm,
            command,
            lambda line: line.attach(self.id, from_start=from_start, readonly=readonly),
        )
