"""Logs over HTTP, whole, in part or followed, and over a WebSocket, where gaps are told where they are.

A log is bytes numbered from 0. Those that are no longer kept are a gap: a plain GET leaves it out and says so in a
header, a range begins or ends at it, and who follows over plain HTTP and falls into one is cut off: there is no way
to tell it in the middle of somebody else's bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from quart import Response, request, websocket
from quart.wrappers.response import ResponseBody

from noid.core import wire
from noid.core.agent import Agent
from noid.core.database.listing import Position
from noid.core.guests.logs import PIECE_BYTES, Log, LogExtent, LogReader
from noid.core.guests.vmlogs import CONSOLE, LogInfo
from noid.core.model.names import checked_name
from noid.core.model.processes import Gap
from noid.core.model.users import Scope
from noid.errors import DeadlineExceeded
from noid.server.answers import json_reply
from noid.server.hardening import BrokenOff, Stay
from noid.server.lists import Page
from noid.server.open_streams import OpenStreams
from noid.server.schemas.lists import PAGE
from noid.server.schemas.logs import FOLLOW, INFOS, READ, READ_PART, STREAM
from noid.server.schemas.vocabulary import text
from noid.server.table import WS, Route
from noid.server.visit import current_user
from noid.server.websockets import WebSockets, flag, same_life, whole_number

GAP_HEADER = "Noid-Log-Gap"

_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))", re.ASCII)


class LogRoutes:
    """``/v1/vms/<name>/logs``."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        logs = "/v1/vms/<name>/logs"
        return [
            Route(
                method="GET", path=logs, handler=self.infos, scope=Scope.EXEC,
                query={**PAGE, **FOLLOW}, headers={"Range?": text()}, answers={200: INFOS, 206: READ_PART},
            ),
            Route(
                method="GET", path=f"{logs}/<log>", handler=self.read, scope=Scope.EXEC,
                query=FOLLOW, headers={"Range?": text()}, answers={200: READ, 206: READ_PART}, errors=frozenset({416}),
            ),
            Route(
                method=WS, path=f"{logs}/<log>", handler=self.stream, scope=Scope.EXEC,
                query=STREAM, answers={101: None}, audited=False,
            ),
            Route(
                method="GET", path="/logs/<name>", handler=self.read_console, scope=Scope.EXEC,
                query=FOLLOW, headers={"Range?": text()}, answers={200: READ, 206: READ_PART}, errors=frozenset({416}),
            ),
            Route(
                method=WS, path="/logs/<name>", handler=self.follow_console, scope=Scope.EXEC,
                query=STREAM, answers={101: None},
            ),
        ]  # fmt: skip

    async def infos(self, name: str) -> Response:
        """List the VM's logs; with ``follow`` send that of its console, as ``/v1/vms/<name>/logs/console`` does."""
        if flag(request.args.get("follow")):
            return await self.read(name, CONSOLE)
        vm = self._agent.vm(current_user(), checked_name(name))
        page = Page.asked()
        infos = sorted(await self._agent.logs.infos(vm), key=_position)
        return page.reply(page.cut(infos, _position), log_fields, _position)

    async def read(self, name: str, log: str) -> Response:
        """Send a log: all that is kept of it (200), or the part of it a ``Range`` names (206, 416); or follow it."""
        found = await self._open(name, log)
        extent = await found.extent()
        wanted = _RANGE.fullmatch(request.headers.get("Range", "").replace(" ", ""))
        follows = flag(request.args.get("follow"))
        start, stop = _span(wanted, extent) if wanted else (0, extent.end)
        headers = {"Accept-Ranges": "bytes", "Cache-Control": "no-store"}
        if wanted and not follows:
            start, stop = _kept(start, stop, extent)
            if start >= stop:
                reply = json_reply({"error": "that range of the log is not there", "code": "invalid"}, 416)
                reply.headers["Content-Range"] = f"bytes */{extent.end}"
                return reply
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{extent.end}"
        gaps = [gap for gap in extent.gaps if gap.start < stop and start < gap.end]
        if gaps:
            headers[GAP_HEADER] = ", ".join(f"{gap.start}-{gap.end - 1}" for gap in gaps)
        reply = Response(b"", 206 if wanted else 200, headers, content_type="application/octet-stream")
        reply.response = _Body(found, start, None if follows else stop, gaps, self._websockets.streams)
        if follows:
            del reply.headers["Content-Length"]
        else:
            reply.content_length = stop - start - sum(min(gap.end, stop) - max(gap.start, start) for gap in gaps)
        return reply

    async def read_console(self, name: str) -> Response:
        """Send the log of the VM's console: another spelling of ``/v1/vms/<name>/logs/console``."""
        return await self.read(name, CONSOLE)

    async def follow_console(self, name: str) -> None:
        """Send the log of the VM's console and what is added to it, unless ``follow`` is switched off."""
        await self._stream(name, CONSOLE, follows=flag(websocket.args.get("follow", "")))

    async def stream(self, name: str, log: str) -> None:
        """Send a log from ``offset`` on, counted from its end if negative, and with ``follow`` what is added to it."""
        await self._stream(name, log, follows=flag(websocket.args.get("follow")))

    async def _stream(self, name: str, log: str, *, follows: bool) -> None:
        lineage = same_life(self._agent.vm(current_user(), checked_name(name)))
        found = await self._open(name, log)
        extent = await found.extent()
        offset = whole_number("offset", websocket.args.get("offset"), 0, least=-(1 << 60))
        start = max(0, extent.end + offset) if offset < 0 else min(offset, extent.end)
        await self._websockets.hold(lambda: _stream(found, start, lineage, follows=follows))

    async def _open(self, name: str, log: str) -> Log:
        return await self._agent.logs.open(self._agent.vm(current_user(), checked_name(name)), log)


def log_fields(info: LogInfo) -> dict[str, Any]:
    """Return *info* as a log's object."""
    extent = info.extent
    gaps = [{"start": gap.start, "end": gap.end} for gap in extent.gaps]
    return {"name": info.name, "bytes": extent.end, "gaps": gaps, "growing": extent.growing}


async def _stream(log: Log, start: int, lineage: str | None, *, follows: bool) -> None:
    with contextlib.ExitStack() as stack:
        reader = LogReader(log, start, stack.enter_context(log.changes()) if follows else None)
        await websocket.send(wire.log_start_to_json(start, lineage))
        while (found := await reader.next()) is not None:
            if isinstance(found, Gap):
                await websocket.send(wire.reply_to_json(found))
            else:
                await websocket.send(wire.frame(found.stream, found.data))
        await websocket.send(wire.log_end_to_json(reader.offset))


class _Body(ResponseBody):
    """The bytes of *log* from *start* up to *stop* without *gaps*; with no *stop*, followed as long as it grows."""

    def __init__(self, log: Log, start: int, stop: int | None, gaps: list[Gap], streams: OpenStreams) -> None:
        self._streams = streams
        self._log = log
        self._start = start
        self._stop = stop
        self._gaps = gaps
        self._held = contextlib.ExitStack()

    async def __aenter__(self) -> _Body:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._held.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:  # noqa: ASYNC900  # what it holds, __aexit__ frees
        changes = self._held.enter_context(self._log.changes()) if self._stop is None else None
        stay = self._held.enter_context(self._streams.stay()) if self._stop is None else Stay()
        reader = LogReader(self._log, self._start, changes)
        while self._stop is None or reader.offset < self._stop:
            limit = PIECE_BYTES if self._stop is None else min(PIECE_BYTES, self._stop - reader.offset)
            found = None
            with stay.interruptible():
                found = await reader.next(limit)
            if stay.over is not None:
                raise BrokenOff  # not the log's end: a client that follows it has to open it again
            if found is None:
                return
            if not isinstance(found, Gap):
                yield found.data
            elif found not in self._gaps:
                raise DeadlineExceeded("the log was read more slowly than it is written, so its reader was cut off.")


def _span(wanted: re.Match[str], extent: LogExtent) -> tuple[int, int]:
    first, last, suffix = wanted.groups()
    if suffix is not None:
        return max(0, extent.end - int(suffix)), extent.end
    return int(first), extent.end if last is None else min(int(last) + 1, extent.end)


def _kept(start: int, stop: int, extent: LogExtent) -> tuple[int, int]:
    """Return the first part of *start* to *stop* that has no gap."""
    for gap in extent.gaps:
        if gap.start <= start < gap.end:
            start = gap.end
        elif start < gap.start:
            stop = min(stop, gap.start)
    return start, stop


def _position(info: LogInfo) -> Position:
    """Return where a log is among its VM's: the console's, then those of processes."""
    return "" if info.name == CONSOLE else "process", info.name
