"""A machine's serial console, shared: everybody reads the one log of it, and whoever types writes into one pipe.

The VMM writes ``serial.log`` whoever reads it: history and news are one thing with one numbering, every byte is in it
once, and a reader costs the guest nothing. Typing needs no connection that somebody could hold, so a console that
nobody uses costs nothing, and who uses one can end at any moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from noid.core.backends import Machine
from noid.core.guests.filewatch import FileWatches
from noid.core.guests.logs import FileLog, LogReader
from noid.core.model.processes import Gap
from noid.core.waiting import plain_nursery
from noid.errors import BackendError, DependencyDown

CONSOLE_LOG = "serial.log"


class Console:
    """See `noid.core.backends.ConsolePort`. One for each machine."""

    def __init__(self, machine: Machine, log: Path, watches: FileWatches) -> None:
        self.log = FileLog(log, watches, lambda: not self.ended)
        """What the guest has printed since this machine began."""
        self.ended = False
        self._machine = machine
        self._turn = trio.Lock()

    async def write(self, data: bytes) -> None:
        """See `ConsolePort.write`."""
        async with self._turn:
            if self.ended:
                raise _gone()
            async with await self._machine.console() as line:
                try:
                    await line.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise _gone() from error

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """See `ConsolePort.listen`."""
        with self.log.changes() as changes:
            extent = await self.log.extent()
            yield Listener(LogReader(self.log, extent.end, changes))

    def end(self) -> None:
        """Say that the machine has ended or is somebody else's now: readers read to the end, writers fail."""
        self.ended = True
        self.log.note()


class Listener:
    """See `noid.core.backends.ConsoleListener`. What waits for it waits in the log."""

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader

    async def receive_some(self) -> bytes:
        """See `ConsoleListener.receive_some`."""
        found = await self._reader.next()
        if isinstance(found, Gap):
            raise BackendError(
                f"the guest prints faster than its console is read: {found.end - found.start} bytes of it are lost. "
                "Nothing else is; let it print less, or to a file."
            )
        return b"" if found is None else found.data


@contextlib.asynccontextmanager
async def open_console(machine: Machine, directory: Path) -> AsyncIterator[Console]:
    """Yield a console of its own for *machine*, whose plan's directory is *directory*."""
    async with plain_nursery() as nursery:
        console = Console(machine, directory / CONSOLE_LOG, FileWatches(nursery))
        try:
            yield console
        finally:
            console.end()
            nursery.cancel_scope.cancel()


def _gone() -> DependencyDown:
    return DependencyDown(
        "the machine of this console has ended, or was replaced by a restore. Look at the VM's state, and attach again "
        "if it runs."
    )
