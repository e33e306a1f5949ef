"""Which logs a VM has, and where each is read: its console's, and whatever a `LogSource` adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from noid.core.guests.console import CONSOLE_LOG
from noid.core.guests.logs import FileLog, Log, LogExtent
from noid.core.layout import Layout
from noid.core.model.vms import Vm
from noid.core.vms.supervisor import Supervisor
from noid.errors import NotFound

CONSOLE = "console"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogInfo:
    """A log that can be read: its name in paths, and what there is of it."""

    name: str
    extent: LogExtent


class LogSource(Protocol):
    """Logs of one kind."""

    async def infos(self, vm: Vm) -> list[LogInfo]:
        """Return the logs *vm* has of this kind."""
        ...

    async def find(self, vm: Vm, name: str) -> Log | None:
        """Return *vm*'s log *name*, or None when there is none of this kind."""
        ...


class ConsoleLogs:
    """The serial console of the VM's machine; it begins with the machine, so a clone's begins with the clone."""

    def __init__(self, supervisor: Supervisor, layout: Layout) -> None:
        self._supervisor = supervisor
        self._layout = layout

    async def infos(self, vm: Vm) -> list[LogInfo]:
        """See `LogSource.infos`."""
        try:
            return [LogInfo(name=CONSOLE, extent=await self._log(vm).extent())]
        except NotFound:  # it is being created
            return []

    async def find(self, vm: Vm, name: str) -> Log | None:
        """See `LogSource.find`."""
        return self._log(vm) if name == CONSOLE else None

    def _log(self, vm: Vm) -> FileLog:
        live = self._supervisor.find(vm.id)
        if live is not None and live.instance == vm.instance:
            return live.link.console.log
        return FileLog(self._layout.vm(vm.instance) / CONSOLE_LOG, self._supervisor.watches, lambda: False)


class VmLogs:
    """All logs of all VMs. *sources* are asked in order."""

    def __init__(self, sources: list[LogSource]) -> None:
        self.sources = sources

    async def infos(self, vm: Vm) -> list[LogInfo]:
        """Return the logs *vm* has."""
        return [info for source in self.sources for info in await source.infos(vm)]

    async def open(self, vm: Vm, name: str) -> Log:
        """Return *vm*'s log *name*.

        Raises:
            NotFound: it has none of that name.
        """
        for source in self.sources:
            if (log := await source.find(vm, name)) is not None:
                return log
        raise NotFound(f"VM {vm.name!r} has no log {name!r}")
