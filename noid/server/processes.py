"""The processes of a VM: listed, started without a client, looked at, waited for, signalled, ended, attached to."""

from __future__ import annotations

import signal
from typing import Any

import trio
from quart import Response, request, websocket

from noid.core import wire
from noid.core.agent import Agent
from noid.core.database.listing import Position
from noid.core.guests.session import Session
from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.errors import InvalidRequest, NoidError
from noid.server.answers import empty_reply, json_reply, upgrade_required
from noid.server.hardening import Transport
from noid.server.interim import still_working
from noid.server.lists import Page
from noid.server.queries import seconds
from noid.server.relay import await_goodbye, converse
from noid.server.rest import read_body
from noid.server.schemas.failures import GUEST, UPGRADE_REQUIRED
from noid.server.schemas.lists import PAGE, listed
from noid.server.schemas.processes import ATTACH, COMMAND, PROCESS, SIGNAL
from noid.server.schemas.vocabulary import number
from noid.server.streams import leave, start
from noid.server.table import WS, Route
from noid.server.visit import current_user
from noid.server.websockets import WebSockets, flag, whole_number

WAIT_SECS = 30.0
WAIT_SECS_MAX = 3600.0
SIGNAL_MAX = 64


class ProcessRoutes:
    """``/v1/vms/<name>/processes`` and what is below."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        processes = "/v1/vms/<name>/processes"
        process = f"{processes}/<process>"
        return [
            Route(
                method="GET", path=processes, handler=self.all, scope=Scope.EXEC,
                query=PAGE, answers={200: listed(PROCESS)}, errors=GUEST,
            ),
            Route(
                method="POST", path=processes, handler=self.start, scope=Scope.EXEC,
                body=COMMAND, answers={201: PROCESS}, errors=GUEST,
            ),
            Route(
                method="GET", path=process, handler=self.one, scope=Scope.EXEC, answers={200: PROCESS}, errors=GUEST
            ),
            Route(
                method="DELETE", path=process, handler=self.end, scope=Scope.EXEC, answers={204: None}, errors=GUEST
            ),
            Route(
                method="GET", path=f"{process}/wait", handler=self.wait, scope=Scope.EXEC,
                query={"timeout_secs?": number(0, WAIT_SECS_MAX, default=WAIT_SECS)},
                answers={200: PROCESS}, errors=GUEST,
            ),
            Route(
                method="POST", path=f"{process}/signal", handler=self.signal, scope=Scope.EXEC,
                body=SIGNAL, answers={204: None}, errors=GUEST,
            ),
            Route(
                method="GET", path=f"{process}/attach", handler=self.upgrade_required, scope=Scope.EXEC,
                answers={426: UPGRADE_REQUIRED},
            ),
            Route(
                method=WS, path=f"{process}/attach", handler=self.attach, scope=Scope.EXEC,
                query=ATTACH, answers={101: None}, errors=GUEST,
            ),
        ]  # fmt: skip

    async def all(self, name: str) -> Response:
        """List the VM's processes, oldest first."""
        sessions = await self._agent.guests.sessions(current_user(), checked_name(name))
        page = Page.asked()
        return page.reply(page.cut(await sessions.all(), _position), process_fields, _position)

    async def start(self, name: str) -> Response:
        """Start a process that runs on by itself: 201."""
        call = wire.call_from_json(await request.get_data())
        async with still_working():
            session = await start(self._agent, current_user(), checked_name(name), call.request, detached=True)
        await leave(session, goodbye=True)
        return json_reply(process_fields(session), 201)

    async def one(self, name: str, process: str) -> Response:
        """Show one process."""
        return json_reply(process_fields(await self._session(name, process)))

    async def wait(self, name: str, process: str) -> Response:
        """Answer when the process has ended, or after ``timeout_secs`` as it is then."""
        limit_secs = seconds("timeout_secs", request.args.get("timeout_secs"), WAIT_SECS, WAIT_SECS_MAX)
        session = await self._session(name, process)
        async with still_working():
            with trio.move_on_after(limit_secs):
                try:
                    await session.ended()
                except NoidError:
                    if session.failure is None:
                        raise  # else it is lost, which is an end too, and the answer says so
        return json_reply(process_fields(session))

    async def signal(self, name: str, process: str) -> Response:
        """Send a signal to the process' group: 204, also when it has ended."""
        signo = signal_number((await read_body()).fields.get("signal"))
        session = await self._session(name, process)
        await session.signal(signo)
        return empty_reply()

    async def end(self, name: str, process: str) -> Response:
        """End the process if it runs (TERM, then KILL), and forget it and its output: 204."""
        session = await self._session(name, process)
        async with still_working():
            await session.owner.finish(session)
        return empty_reply()

    async def upgrade_required(self, name: str, process: str) -> Response:
        """Say that this is for WebSockets: 426."""
        checked_name(name)
        del process
        return upgrade_required("this needs a WebSocket upgrade")

    async def attach(self, name: str, process: str) -> None:
        """Relay a process' output from an offset on, and input to it. See `noid.core.wire` for the messages.

        With *resume* the client is the one that started the process: it holds the process back, and may lose its
        connection again. Others leave the process as it is.
        """
        arguments = websocket.args
        offset = None if arguments.get("offset") is None else whole_number("offset", arguments["offset"], 0)
        resumes, writes = flag(arguments.get("resume")), not flag(arguments.get("readonly"))
        session = await self._session(name, process, arguments.get("lineage"))

        async def relay() -> None:
            transport = Transport.of(websocket.scope)
            try:
                with session.view(offset, holds=resumes) as viewer:
                    if await converse(viewer, transport, writes=writes, resumes=resumes) and resumes:
                        await await_goodbye()
            finally:
                if resumes:
                    await leave(session, goodbye=transport.said_goodbye)  # noqa: ASYNC102  # shields itself

        await self._websockets.hold(relay)

    async def _session(self, name: str, process: str, lineage: str | None = None) -> Session:
        sessions = await self._agent.guests.sessions(current_user(), checked_name(name))
        return await sessions.get(process, lineage)


def process_fields(session: Session) -> dict[str, Any]:
    """Return *session* as ProcessInfo."""
    exit_ = session.exit
    usage = None if exit_ is None or exit_.usage is None else exit_.usage
    return {
        "id": session.name,
        "pid": session.pid,
        "command": list(session.argv),
        "state": session.state,
        "exit_code": None if exit_ is None else exit_.status,
        "signal": None if exit_ is None else exit_.signal,
        "origin": session.origin,
        "lineage": session.lineage,
        "detached": session.detached,
        "attached": session.viewers,
        "tty": session.tty,
        "stdin": session.stdin,
        "log": {"start": session.log.start, "end": session.log.end},
        "started_at": None if session.started_at is None else session.started_at.isoformat(),
        "usage": None
        if usage is None
        else {"user_secs": usage.user_secs, "system_secs": usage.system_secs, "rss_max_kib": usage.rss_max_kib},
    }


def signal_number(value: object) -> int:
    """Return the signal that *value*, a number or a name with or without ``SIG``, stands for.

    Raises:
        InvalidRequest: none.
    """
    if type(value) is int and 1 <= value <= SIGNAL_MAX:
        return value
    if isinstance(value, str):
        name = value.upper()
        found = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
        if found is not None:
            return int(found)
    raise InvalidRequest(
        f"there is no signal {str(value)[:40]!r}. Name it as in TERM, or by its number, 1 to {SIGNAL_MAX}."
    )


def _position(session: Session) -> Position:
    """Return where a process is among its VM's, oldest first."""
    return f"{session.started_at_unix_ns:020d} {session.pid:010d}", session.name
