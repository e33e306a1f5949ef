"""The output of processes as logs of their VM, named by the process: see `noid.core.guests.vmlogs`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from noid.core.guests.filewatch import Changes
from noid.core.guests.logs import LogExtent, LogPiece
from noid.core.guests.session import Session
from noid.core.guests.sessions import Sessions
from noid.core.guests.vmlogs import LogInfo
from noid.core.model.processes import Gap
from noid.core.model.vms import Vm
from noid.errors import InvalidRequest, NotFound


class SessionLog:
    """One process' output, both streams together. Fulfils `logs.Log`; its readers never hold it back."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def extent(self) -> LogExtent:
        """See `Log.extent`."""
        log = self._session.log
        gaps = (Gap(start=0, end=log.start),) if log.start else ()
        return LogExtent(end=log.end, gaps=gaps, growing=self._session.state == "running")

    async def read(self, offset: int, limit: int) -> LogPiece | Gap | None:
        """See `Log.read`."""
        events = await self._session.log.read(offset, limit)
        if not events:
            return None
        if isinstance(events[0], Gap):
            return events[0]
        return LogPiece(offset=offset, data=events[0].data[:limit], stream=events[0].stream)

    @contextlib.contextmanager
    def changes(self) -> Iterator[Changes]:
        """See `Log.changes`."""
        yield self._session.changes


class ProcessLogs:
    """Fulfils `noid.core.guests.vmlogs.LogSource` with the processes of *sessions*."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def infos(self, vm: Vm) -> list[LogInfo]:
        """See `LogSource.infos`."""
        found = await (await self._sessions.of(vm)).all()
        return [LogInfo(name=session.name, extent=await SessionLog(session).extent()) for session in found]

    async def find(self, vm: Vm, name: str) -> SessionLog | None:
        """See `LogSource.find`."""
        try:
            return SessionLog(await (await self._sessions.of(vm)).get(name))
        except (InvalidRequest, NotFound):
            return None
