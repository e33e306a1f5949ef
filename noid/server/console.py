"""The serial console over a WebSocket: what was printed last, then what is printed, and what the client types.

Frames are exec's (`noid.core.wire`): channel 1 is the console's output, 3 input, 4 the size of the client's terminal.
A viewer that reads too slowly is dropped with a reason, and never holds up the guest or another viewer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

import trio
from quart import Response, websocket

from noid.core import wire
from noid.core.agent import Agent
from noid.core.guests.console import Console
from noid.core.guests.logs import LogReader
from noid.core.model.names import checked_name
from noid.core.model.processes import Gap, TerminalSize
from noid.core.model.users import Scope, User
from noid.core.waiting import plain_nursery
from noid.errors import DeadlineExceeded, DependencyDown, InvalidRequest, NoidError
from noid.server.answers import upgrade_required
from noid.server.hardening import Transport
from noid.server.schemas.failures import GUEST, UPGRADE_REQUIRED
from noid.server.schemas.logs import CONSOLE
from noid.server.table import WS, Route
from noid.server.visit import current_user
from noid.server.websockets import GONE_CHECK_SECS, WebSockets, flag, same_life, watch_peer, whole_number

logger = logging.getLogger(__name__)

HISTORY_BYTES = 512
INPUT_SECS = 10.0
INPUT_PIECE_BYTES = 4096


class ConsoleRoutes:
    """``/v1/vms/<name>/console``."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        path, also = "/v1/vms/<name>/console", ("/console/<name>",)
        return [
            Route(
                method="GET", path=path, handler=self.upgrade_required, scope=Scope.EXEC, also=also,
                answers={426: UPGRADE_REQUIRED},
            ),
            Route(
                method=WS, path=path, handler=self.stream, scope=Scope.EXEC, also=also,
                query=CONSOLE, answers={101: None}, errors=GUEST,
            ),
        ]  # fmt: skip

    async def upgrade_required(self, name: str) -> Response:
        """Say that GET is for WebSockets: 426."""
        checked_name(name)
        return upgrade_required("this needs a WebSocket upgrade; GET .../logs/console reads without one")

    async def stream(self, name: str) -> None:
        """Attach to the console. What can be refused is refused before the upgrade, as plain HTTP."""
        user = current_user()
        console = self._agent.guests.console(user, checked_name(name))
        lineage = same_life(self._agent.vm(user, name))
        history = whole_number("history", websocket.args.get("history"), HISTORY_BYTES)
        offset = whole_number("offset", websocket.args.get("offset"), -1, least=0)
        writes = not flag(websocket.args.get("readonly"))
        session = _Session(self._agent, user, name, console)
        attached_at = (await console.log.extent()).end  # before the upgrade: whoever sees that has missed nothing since
        start = min(offset, attached_at) if offset >= 0 else max(0, attached_at - history)
        await self._websockets.hold(lambda: session.run(start, attached_at, lineage, writes=writes))


class _Session:
    """One client at one console."""

    def __init__(self, agent: Agent, user: User, name: str, console: Console) -> None:
        self._agent = agent
        self._user = user
        self._name = name
        self._console = console
        self._transport = Transport.of(websocket.scope)
        self._idle_secs = agent.config.console_timeout_secs
        self._idle = trio.CancelScope()
        self._size: TerminalSize | None = None
        self._resized = trio.Event()

    async def run(self, start: int, attached_at: int, lineage: str | None, *, writes: bool) -> None:
        """Serve the client until it leaves, the machine ends, or nothing has happened for a while.

        It is shown what was printed from *start* on, what is printed from *attached_at* on, and told *lineage* first
        if that is not None.
        """
        log = self._console.log
        with log.changes() as changes:
            reader = LogReader(log, start, changes)
            self._touch()
            if lineage is not None:
                await websocket.send(wire.log_start_to_json(start, lineage, attached_at))
            with self._idle:
                async with plain_nursery() as nursery:
                    nursery.start_soon(self._relay_input, writes, nursery)
                    await self._show(reader, attached_at)
        if self._idle.cancelled_caught:
            raise DeadlineExceeded(
                f"nothing was typed or printed for {self._idle_secs:g} s, so the console was detached. The VM runs on; "
                "attach again, or raise console_timeout_secs in server.toml."
            )

    def _touch(self) -> None:
        """Take notice that something has happened."""
        self._idle.deadline = trio.current_time() + self._idle_secs

    async def _show(self, reader: LogReader, news_from: int) -> None:
        while (found := await reader.next()) is not None:
            self._touch()
            if not isinstance(found, Gap):
                await websocket.send(wire.frame(wire.STDOUT, found.data))
            elif found.start < news_from:
                await websocket.send(wire.reply_to_json(found))
            else:
                raise DeadlineExceeded(
                    f"the guest prints faster than this client reads: {found.end - found.start} bytes of its console "
                    "are gone, so it was detached. The VM runs on; attach again to see what is printed now."
                )
        raise DependencyDown(
            f"the machine of VM {self._name!r} has ended, or was replaced by a restore. Look at the VM's state, and "
            "attach again if it runs."
        )

    async def _relay_input(self, writes: bool, nursery: trio.Nursery) -> None:
        """Read the WebSocket for as long as the session lives: that is also how a leaving client is noticed."""
        while True:
            message = await websocket.receive()
            if not isinstance(message, bytes):
                continue
            channel, data = wire.split_frame(message)
            self._touch()
            if channel == wire.RESIZE and writes:
                with contextlib.suppress(InvalidRequest):  # what makes no sense is ignored, as unknown channels are
                    columns, rows = wire.parse_resize(data)
                    if self._size is None:
                        nursery.start_soon(self._relay_size)
                    self._size = TerminalSize(columns=columns, rows=rows)
                    self._resized.set()
            elif channel == wire.STDIN and data and writes:
                await self._type(data, nursery.cancel_scope)

    async def _type(self, data: bytes, session: trio.CancelScope) -> None:
        """Type *data*, or tell the client that a guest that does not read has not got it."""
        typed = 0
        async with self._watched(session):
            while typed < len(data):
                piece = data[typed : typed + INPUT_PIECE_BYTES]
                with trio.move_on_after(INPUT_SECS) as scope:
                    await self._console.write(piece)
                if scope.cancelled_caught:
                    break
                typed += len(piece)
        if typed < len(data):
            why = (
                f"the guest has not read its console for {INPUT_SECS:g} s, so what was typed last was dropped. What it "
                "prints is shown as before."
            )
            await websocket.send(wire.dropped_to_json(len(data) - typed, why))

    @contextlib.asynccontextmanager
    async def _watched(self, session: trio.CancelScope) -> AsyncIterator[None]:
        """Notice during the block, in which nothing is read from the client, that it leaves.

        Not at once: a client types its last and leaves in one go (that of 0.2 takes back its ``exit`` like that), and a
        guest that reads gets all of it. So the block is shielded for a moment.
        """
        with trio.CancelScope(shield=True) as last_words:

            async def watch() -> None:
                await trio.sleep(GONE_CHECK_SECS)
                last_words.shield = False
                await watch_peer(self._transport, session)

            async with plain_nursery() as nursery:
                nursery.start_soon(watch)
                yield
                nursery.cancel_scope.cancel()

    async def _relay_size(self) -> None:
        """Tell the guest the size of the client's terminal where it can be told, the latest if it cannot keep up."""
        while True:
            await self._resized.wait()
            self._resized = trio.Event()
            if self._size is None:
                continue
            try:
                async with self._agent.guests.reach(self._user, self._name) as guest:
                    if "tty" in guest.features:
                        await guest.resize_console(self._size)
            except NoidError as error:  # a console works without
                logger.info("the console of VM %s keeps its size: %s", self._name, error)
