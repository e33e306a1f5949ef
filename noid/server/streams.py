"""Exec: live over a WebSocket, or collected into one answer by POST. Unless detached, a process ends with its client.

**Clients that leave and clients that are lost.** A client that says goodbye (a close frame), or cannot resume, ends its
process at once: TERM, then KILL. One that asked to *resume* and loses its connection finds its process again for
``exec_reattach_secs``, also on the next agent: see `noid.server.processes`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio
from quart import Response, request, websocket

from noid.core import wire
from noid.core.agent import Agent
from noid.core.guests.session import Session, Viewer
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.names import checked_name
from noid.core.model.processes import ExecRequest
from noid.core.model.users import Scope, User
from noid.errors import DeadlineExceeded, DependencyDown, InvalidRequest
from noid.server.answers import json_reply, upgrade_required
from noid.server.hardening import Transport
from noid.server.interim import still_working
from noid.server.relay import await_goodbye, converse
from noid.server.schemas.failures import GUEST, UPGRADE_REQUIRED
from noid.server.schemas.processes import COMMAND, OUTPUT
from noid.server.table import WS, Route
from noid.server.visit import current_user, visit
from noid.server.websockets import WebSockets

logger = logging.getLogger(__name__)

FIRST_MESSAGE_SECS = 10.0
START_SECS = 30.0
LEAVE_SECS = 20.0


class ExecRoutes:
    """``/v1/vms/<name>/exec``."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        path = "/v1/vms/<name>/exec"
        return [
            Route(
                method="POST", path=path, handler=self.collect, scope=Scope.EXEC,
                body=COMMAND, answers={200: OUTPUT}, errors=GUEST,
            ),
            Route(
                method="GET", path=path, handler=self.upgrade_required, scope=Scope.EXEC,
                answers={426: UPGRADE_REQUIRED},
            ),
            Route(
                method=WS, path=path, handler=self.stream, scope=Scope.EXEC, answers={101: None}, errors=GUEST
            ),
        ]  # fmt: skip

    async def upgrade_required(self, name: str) -> Response:
        """Say that GET is for WebSockets: 426."""
        checked_name(name)
        return upgrade_required("this needs a WebSocket upgrade; POST runs a command without one")

    # --- POST --------------------------------------------------------------------------------------------------------

    async def collect(self, name: str) -> Response:
        """Run a command and answer with all its output, stdout and stderr in the order they were written.

        ``exec_timeout_secs`` of the configuration, or less if the request says so, ends the command; the output until
        then is in the answer. There is no input: the command finds it ended.
        """
        checked_name(name)
        command = wire.request_from_json(await request.get_data())
        limit_secs = min(command.timeout_secs or math.inf, self._agent.config.exec_timeout_secs)
        output = Output(self._agent.config.limits.max_output_bytes)
        timed_out = False
        command = dataclasses.replace(command, stdin=False)
        async with still_working(), self._process(current_user(), name, command) as session:
            with session.view(0, holds=True) as viewer:
                with trio.move_on_after(limit_secs) as limit:
                    await _collect(viewer, output)
                if limit.cancelled_caught:
                    timed_out = True
                    await session.end()
                    if session.exit is not None:
                        await _collect(viewer, output)
        exit_ = None if timed_out else session.exit
        return json_reply(
            {
                "stdout": output.text(),
                "exit_code": None if exit_ is None else exit_.status,
                "timed_out": timed_out,
                "truncated": output.truncated,
                "signal": None if exit_ is None else exit_.signal,
            }
        )

    @contextlib.asynccontextmanager
    async def _process(self, user: User, name: str, command: ExecRequest) -> AsyncIterator[Session]:
        """Run *command* in the guest; end it, if it still runs, when the body is left by whatever way."""
        session = await start(self._agent, user, name, command, detached=False)
        try:
            yield session
        finally:
            await leave(session, goodbye=True)  # noqa: ASYNC102  # shields itself

    # --- WebSocket ---------------------------------------------------------------------------------------------------

    async def stream(self, name: str) -> None:
        """Run a command whose input and output travel as they come. See `noid.core.wire` for the messages.

        What can be refused is refused before the upgrade, as plain HTTP. Unlike POST there is no limit in time except
        the request's own ``timeout_secs``.
        """
        user = current_user()
        self._agent.vm(user, checked_name(name))
        await self._websockets.hold_asked(_call, lambda call: self._session(user, name, call))

    async def _session(self, user: User, name: str, call: wire.ExecCall) -> None:
        transport = Transport.of(websocket.scope)
        session = await start(self._agent, user, name, call.request, detached=call.detached)
        try:
            with session.view(0, holds=True) as viewer:
                limit_secs = call.request.timeout_secs
                writes = call.request.stdin or session.tty
                relayed = await converse(viewer, transport, writes=writes, resumes=call.resume, limit_secs=limit_secs)
                if relayed and call.resume:
                    await await_goodbye()
        finally:
            await leave(session, goodbye=transport.said_goodbye or not call.resume)  # noqa: ASYNC102  # shields itself


async def _call() -> wire.ExecCall:
    """Return what the client of the current WebSocket wants to run: its first message.

    Raises:
        DeadlineExceeded: it says nothing.
        InvalidRequest: it says something else.
    """
    try:
        with trio.fail_after(FIRST_MESSAGE_SECS):
            first = await websocket.receive()
    except trio.TooSlowError as error:
        raise DeadlineExceeded(f"no exec request within {FIRST_MESSAGE_SECS:g} s of the upgrade.") from error
    if not isinstance(first, str):
        raise InvalidRequest("invalid exec request: the first message must be text.")
    return wire.call_from_json(first)


async def start(agent: Agent, user: User, name: str, command: ExecRequest, *, detached: bool) -> Session:
    """Start a process in the VM. It is the caller's to leave: see `VmSessions.leave`.

    Raises:
        DependencyDown: the guest takes too long.
        NoidError: see `Agent.start_process`.
    """
    try:
        with trio.fail_after(START_SECS):
            session = await agent.guests.start_process(user, name, command, detached=detached)
    except trio.TooSlowError as error:
        raise DependencyDown(
            f"the guest of VM {name!r} did not start the command within {START_SECS:g} s. The VM still runs; it may be "
            "overloaded. Try again, or restore it from a checkpoint."
        ) from error
    visit().acted = True
    return session


async def leave(session: Session, *, goodbye: bool) -> None:
    """Leave *session*, which one has started or spoken for, whatever ends the request. Bounded: see `Owner.leave`."""
    with trio.move_on_after(LEAVE_SECS, shield=True) as bound:
        await session.owner.leave(session, goodbye=goodbye)
    if bound.cancelled_caught:
        logger.warning("process %s was not ended within %g s", session.name, LEAVE_SECS)


async def _collect(viewer: Viewer, output: Output) -> None:
    """Add what the process writes to *output* until it has ended."""
    while not isinstance(events := await viewer.next(), ProcessExit):
        for event in events:
            if isinstance(event, OutputChunk):
                output.add(event.data)
            viewer.passed(event)


@dataclass(slots=True)
class Output:
    """What a command wrote, up to *most* bytes; the rest is counted as *truncated* and dropped."""

    most: int
    truncated: bool = False
    _data: bytearray = field(default_factory=bytearray)

    def add(self, data: bytes) -> None:
        """Append *data* as far as there is room."""
        room = self.most - len(self._data)
        self._data += data[:room]
        self.truncated = self.truncated or len(data) > room

    def text(self) -> str:
        """Return it as text. A character the limit cut through is left out; other invalid bytes become U+FFFD."""
        data = bytes(self._data)
        if self.truncated:
            data = data[: _whole_characters(data)]
        return data.decode("utf-8", "replace")


def _whole_characters(data: bytes) -> int:
    """Return how many bytes of *data* there are up to an incomplete UTF-8 sequence at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # begins a sequence of 2, 3 or 4 bytes
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)
