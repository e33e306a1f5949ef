"""Exec: live over a WebSocket, or collected into one answer by POST. The guest's process ends with its client.

**Input and clients that leave.** While a process does not read its input, neither is the WebSocket read, so that
nothing piles up here; and what is not read cannot tell that the client has left. Meanwhile the socket itself is asked.
A TCP client that leaves with a full window is noticed only when the process reads on or ends.
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
from noid.core.backends import Guest, Process
from noid.core.model import ExecRequest, OutputChunk, ProcessExit, User, checked_name
from noid.core.waiting import plain_nursery
from noid.errors import DeadlineExceeded, DependencyDown, InvalidRequest, NoidError
from noid.server.guard import Guard, current_user, json_reply
from noid.server.hardening import App, Transport, hold_websocket
from noid.server.interim import still_working

logger = logging.getLogger(__name__)

OUTPUT_BYTES_MAX = 1 << 20
FIRST_MESSAGE_SECS = 10.0
START_SECS = 30.0
RELEASE_SECS = 10.0
GONE_CHECK_SECS = 1.0


class ExecRoutes:
    """``/v1/vms/<name>/exec``. At most ``max_ws_sessions`` WebSockets at a time, each counted from its upgrade on."""

    def __init__(self, agent: Agent, guard: Guard, stopping: trio.Event) -> None:
        self._agent = agent
        self._guard = guard
        self._stopping = stopping
        self._sessions = 0

    def add_to(self, app: App) -> None:
        """Add the routes."""
        rule = "/v1/vms/<name>/exec"
        app.add_url_rule(rule, f"POST {rule}", self.collect, methods=["POST"])
        app.add_url_rule(rule, f"GET {rule}", self.upgrade_required, methods=["GET"])
        app.add_websocket(rule, f"WS {rule}", self.stream)

    async def upgrade_required(self, name: str) -> Response:
        """Say that GET is for WebSockets: 426."""
        checked_name(name)
        reply = json_reply({"error": "this needs a WebSocket upgrade; POST runs a command without one"}, 426)
        reply.headers["Upgrade"] = "websocket"
        return reply

    # --- POST --------------------------------------------------------------------------------------------------------

    async def collect(self, name: str) -> Response:
        """Run a command and answer with all its output, stdout and stderr in the order they arrived.

        ``exec_timeout_secs`` of the configuration, or less if the request says so, ends the command; the output until
        then is in the answer. There is no input: the command finds it ended.
        """
        checked_name(name)
        raw = await request.get_data()
        command = wire.request_from_json(raw)
        limit_secs = min(command.timeout_secs or math.inf, self._agent.config.exec_timeout_secs)
        output = Output()
        exit_: ProcessExit | None = None
        command = dataclasses.replace(command, stdin=False)
        async with still_working(), self._process(current_user(), name, command) as process:
            with trio.move_on_after(limit_secs):
                while not isinstance(received := await process.receive(), ProcessExit):
                    if isinstance(received, OutputChunk):
                        output.add(received.data)
                exit_ = received
        return json_reply(
            {
                "stdout": output.text(),
                "exit_code": None if exit_ is None else exit_.status,
                "timed_out": exit_ is None,
                "truncated": output.truncated,
                "signal": None if exit_ is None else exit_.signal,
            }
        )

    # --- WebSocket ---------------------------------------------------------------------------------------------------

    async def stream(self, name: str) -> None:
        """Run a command whose input and output travel as they come. See `noid.core.wire` for the messages.

        What can be refused is refused before the upgrade, as plain HTTP. Unlike POST there is no limit in time except
        the request's own ``timeout_secs``.
        """
        user = current_user()
        self._agent.vm(user, checked_name(name))
        if self._stopping.is_set():
            raise DependencyDown("the server is going down for a restart. Try again.")
        if self._sessions >= self._agent.config.max_ws_sessions:
            raise DependencyDown("too many WebSocket sessions. End one, or raise max_ws_sessions in server.toml.")
        self._sessions += 1
        try:
            await websocket.accept()
            await hold_websocket(self._stopping, lambda: self._session(user, name), self._last_words)
        finally:
            self._sessions -= 1

    def _last_words(self, error: NoidError) -> str:
        return wire.reply_to_json(wire.ErrorResponse(error=self._guard.public_text(error), code=error.code))

    async def _session(self, user: User, name: str) -> None:
        try:
            with trio.fail_after(FIRST_MESSAGE_SECS):
                first = await websocket.receive()
        except trio.TooSlowError as error:
            raise DeadlineExceeded(f"no exec request within {FIRST_MESSAGE_SECS:g} s of the upgrade.") from error
        if not isinstance(first, str):
            raise InvalidRequest("invalid exec request: the first message must be text.")
        command = wire.request_from_json(first)
        async with self._process(user, name, command) as process:
            result = await _converse(process, command, Transport.of(websocket.scope))
        await websocket.send(wire.reply_to_json(result))

    @contextlib.asynccontextmanager
    async def _process(self, user: User, name: str, command: ExecRequest) -> AsyncIterator[Process]:
        """Run *command* in the guest; end it, if it still runs, when the body is left by whatever way."""
        if command.user is None:
            command = dataclasses.replace(command, user=self._agent.default_user(user, name))
        async with self._agent.guest(user, name) as guest:
            process = await _start(guest, name, command)
            try:
                yield process
            finally:
                with trio.move_on_after(RELEASE_SECS, shield=True):
                    try:
                        await guest.release(process)
                    except NoidError as error:  # the guest is gone, and its processes with it
                        logger.info("could not release a process of VM %s: %s", name, error)


async def _start(guest: Guest, name: str, command: ExecRequest) -> Process:
    try:
        with trio.fail_after(START_SECS):
            return await guest.start(command)
    except trio.TooSlowError as error:
        raise DependencyDown(
            f"the guest of VM {name!r} did not start the command within {START_SECS:g} s. The VM still runs; it may be "
            "overloaded. Try again, or restore it from a checkpoint."
        ) from error


async def _converse(process: Process, command: ExecRequest, transport: Transport) -> wire.ExecResult:
    """Relay output, and input if the command wants it, until the process has ended or its time is up."""
    result = wire.ExecResult(exit_code=None, timed_out=True)
    async with plain_nursery() as nursery:
        nursery.start_soon(_relay_input, process, command.stdin, transport, nursery.cancel_scope)
        with trio.move_on_after(command.timeout_secs or math.inf):
            while not isinstance(received := await process.receive(), ProcessExit):
                if isinstance(received, OutputChunk):
                    await websocket.send(wire.frame(received.stream, received.data))
            result = wire.ExecResult.of(received)
        nursery.cancel_scope.cancel()
    return result


async def _relay_input(process: Process, wanted: bool, transport: Transport, session: trio.CancelScope) -> None:
    """Read the WebSocket for as long as the process lives: that is also how a leaving client is noticed.

    A guest that fails here fails `Process.receive` too, which is where that is told.
    """
    while True:
        message = await websocket.receive()
        if not wanted or not isinstance(message, bytes):
            continue
        channel, data = wire.split_frame(message)
        if channel != wire.STDIN:
            continue
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_peer, transport, session)
            with contextlib.suppress(NoidError):
                await (process.send_stdin(data) if data else process.close_stdin())
            nursery.cancel_scope.cancel()
        wanted = bool(data)


async def _watch_peer(transport: Transport, session: trio.CancelScope) -> None:
    while not transport.is_gone():  # noqa: ASYNC110  # nothing to wait for: unread input hides it
        await trio.sleep(GONE_CHECK_SECS)
    session.cancel()


@dataclass(slots=True)
class Output:
    """What a command wrote, up to `OUTPUT_BYTES_MAX`; the rest is counted as *truncated* and dropped."""

    truncated: bool = False
    _data: bytearray = field(default_factory=bytearray)

    def add(self, data: bytes) -> None:
        """Append *data* as far as there is room."""
        room = OUTPUT_BYTES_MAX - len(self._data)
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
