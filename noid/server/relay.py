"""Between one process and one WebSocket: output as it comes, input as it is read, one result at the end.

**Input and clients that leave.** While a process does not read its input, neither is the WebSocket read, so that
nothing piles up here; and what is not read cannot tell that the client has left. Meanwhile the socket itself is asked.
A TCP client that leaves with a full window is noticed only when the process reads on or ends.
"""

from __future__ import annotations

import contextlib

import trio
from quart import websocket

from noid.core import wire
from noid.core.backends import STDIN_IN_FLIGHT_BYTES
from noid.core.guests.session import Session, Viewer
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import Gap, TerminalSize
from noid.core.waiting import plain_nursery
from noid.errors import InvalidRequest, NoidError
from noid.server.hardening import Transport
from noid.server.websockets import watch_peer

GOODBYE_SECS = 1.0
ARRIVED_EVERY_BYTES = 128 << 10


async def converse(
    viewer: Viewer, transport: Transport, *, writes: bool, resumes: bool, limit_secs: float | None = None
) -> bool:
    """Relay output, and input if the client *writes*, until the process has ended, and say how; return whether it was.

    A client that *resumes* is told how much of its input has arrived. After *limit_secs* the process is ended, and what
    it still wrote is relayed before the result says so. Nothing is said to a client that turned out to be gone.

    Raises:
        Conflict, DependencyDown: see `Viewer.next`.
    """
    session = viewer.session
    taken = await session.stdin_taken() if resumes else None
    started = wire.Started(
        process=session.name, lineage=session.lineage, pid=session.pid, offset=viewer.offset, stdin=taken
    )
    await websocket.send(wire.reply_to_json(started))
    timed_out = told = False
    async with plain_nursery() as nursery:
        nursery.start_soon(_relay_input, viewer, writes, resumes, transport, nursery.cancel_scope)
        ended: ProcessExit | None = None
        with trio.CancelScope() as relaying:

            async def watch_time(limit_secs: float) -> None:
                nonlocal timed_out
                await trio.sleep(limit_secs)
                timed_out = True
                with contextlib.suppress(NoidError):  # the relay below hears it too
                    await session.end()
                if session.exit is None:
                    relaying.cancel()  # it does not end, so nothing more is waited for

            if limit_secs is not None:
                nursery.start_soon(watch_time, limit_secs)
            ended = await _relay_output(viewer)
        if timed_out or ended is None:
            result = wire.ExecResult(exit_code=None, timed_out=True)
        else:
            result = wire.ExecResult.of(ended)
        await websocket.send(wire.reply_to_json(result))
        told = True
        nursery.cancel_scope.cancel()
    return told


async def _relay_output(viewer: Viewer) -> ProcessExit:
    while not isinstance(events := await viewer.next(), ProcessExit):
        for event in events:
            if isinstance(event, Gap):
                await websocket.send(wire.reply_to_json(event))
            else:
                await websocket.send(wire.frame(event.stream, event.data))
            viewer.passed(event)
    return events


async def _relay_input(
    viewer: Viewer, writes: bool, resumes: bool, transport: Transport, conversation: trio.CancelScope
) -> None:
    """Read the WebSocket for as long as the process lives: that is also how a leaving client is noticed.

    A guest that fails here fails `Viewer.next` too, which is where that is told.
    """
    with viewer.typing:
        await _relay_messages(viewer, writes, resumes, transport, conversation)
    conversation.cancel()  # its client is back over another connection, and was told there what has arrived of this


async def _relay_messages(
    viewer: Viewer, writes: bool, resumes: bool, transport: Transport, conversation: trio.CancelScope
) -> None:
    session, told = viewer.session, 0
    while True:
        message = await websocket.receive()
        if message == wire.DETACH:
            if viewer.holds:
                await session.owner.detach(session)
            await websocket.send(wire.reply_to_json(wire.Detached()))
        if not writes or not isinstance(message, bytes):
            continue
        channel, data = wire.split_frame(message)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_peer, transport, conversation)
            with contextlib.suppress(NoidError):
                await _apply(session, channel, data)
            nursery.cancel_scope.cancel()
        if channel == wire.STDIN and resumes and session.process is not None:
            arrived = session.process.stdin_taken - STDIN_IN_FLIGHT_BYTES
            if arrived - told >= ARRIVED_EVERY_BYTES:
                told = arrived
                await websocket.send(wire.reply_to_json(wire.InputArrived(end=arrived)))


async def _apply(session: Session, channel: int, data: bytes) -> None:
    """Do what a frame of the client asks for. Channels nobody knows, and input nobody reads, are skipped."""
    if channel == wire.STDIN and session.stdin:
        await (session.send_stdin(data) if data else session.close_stdin())
    elif channel == wire.RESIZE and session.tty:
        with contextlib.suppress(InvalidRequest):
            columns, rows = wire.parse_resize(data)
            await session.resize(TerminalSize(columns=columns, rows=rows))


async def await_goodbye() -> None:
    """Give a client that has its result the moment it needs to say so: the handler is cancelled when it has."""
    with trio.move_on_after(GOODBYE_SECS):
        while True:
            await websocket.receive()
