"""Attaches a terminal, or a pipe, to a VM's serial console over a WebSocket: one thread, one ``select``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from noid.client.calls.call import with_query
from noid.client.channels import Closed, Message
from noid.client.errors import ServerError
from noid.client.link import Link
from noid.client.settings import Endpoint
from noid.client.terminal import DetachKeys, Terminal
from noid.client.waiting import Blocking, Turns, finished
from noid.client.websocket import WebSocket
from noid.core import wire
from noid.errors import DependencyDown

AFTER_INPUT_SECS = 1.0
"""How long after the end of its input and the last output a console that is fed by a pipe stays attached."""


def attach(
    endpoint: Endpoint,
    name: str,
    *,
    input_fd: int | None,
    terminal: Terminal | None,
    on_output: Callable[[bytes], None],
    on_notice: Callable[[str], None],
    on_attached: Callable[[], None],
    history: int | None = None,
) -> None:
    """Show the console of the VM *name* and type what is typed, until the detach keys or the end of the input.

    *input_fd* is where typing is read; None only watches. *terminal* is None where there is none, as in a pipe.
    *on_notice* gets what is said beside the guest's output. *on_attached* is called once it is. Ctrl+C and other
    exceptions detach; the VM never notices.

    Raises:
        ConnectionFailed, ServerError: it could not be attached to, or was detached by the agent, which says why.
        ConnectionLost: the connection to the agent ended.
    """
    ws = finished(opened(Link(endpoint, Blocking()), name, history=history, readonly=input_fd is None))
    try:
        on_attached()
        _Attached(ws, input_fd, terminal, on_output, on_notice).run()
    finally:
        ws.close()


async def opened(
    link: Link, name: str, *, history: int | None, readonly: bool, turns: Turns | None = None
) -> WebSocket:
    """Return a WebSocket to the console of the VM *name*, whose messages `hear` understands."""
    path = with_query(f"/v1/vms/{name}/console", history=history, readonly=1 if readonly else None)
    return await WebSocket.open(link, path, turns=turns)


def hear(message: Message, on_output: Callable[[bytes], None], on_notice: Callable[[str], None]) -> None:
    """Tell what *message* of a console means.

    Raises:
        ServerError: the agent detaches, and says why.
        DependencyDown: it does not.
    """
    match message:
        case Closed():
            raise DependencyDown("the agent ended the console without saying why. The VM is not affected.")
        case (wire.STDOUT, data):
            on_output(data)
        case str():
            match json.loads(message):
                case {"gap": {"start": int(start), "end": int(end)}}:
                    on_notice(f"{end - start} bytes of the console are no longer kept")
                case {"dropped": {"why": str(why)}}:
                    on_notice(why)
                case {"error": str(error), **rest}:
                    raise ServerError(error, status=0, code=str(rest.get("code", "internal")))


class _Attached:
    def __init__(
        self,
        ws: WebSocket,
        input_fd: int | None,
        terminal: Terminal | None,
        on_output: Callable[[bytes], None],
        on_notice: Callable[[str], None],
    ) -> None:
        self._ws = ws
        self._input_fd = input_fd
        self._terminal = terminal
        self._on_output, self._on_notice = on_output, on_notice
        self._keys = DetachKeys(terminal.keys if terminal else b"")
        self._detached = False
        self._quiet_at: float | None = None

    def run(self) -> None:
        self._tell_size()
        while not self._detached:
            self._step()

    def _step(self) -> None:
        ws, wakeup_fd = self._ws, None if self._terminal is None else self._terminal.wakeup_fd
        readers = [self._input_fd] if self._input_fd is not None and ws.channels.has_room else []
        if wakeup_fd is not None:
            readers.append(wakeup_fd)
        left = None if self._quiet_at is None else self._quiet_at - time.monotonic()
        messages, readable = finished(ws.step(readers, secs=left))
        for message in messages:
            hear(message, self._show, self._on_notice)
        if wakeup_fd is not None and wakeup_fd in readable:
            os.read(wakeup_fd, 4096)
            self._tell_size()
        if self._input_fd is not None and self._input_fd in readable:
            self._type()
        if self._quiet_at is not None and time.monotonic() >= self._quiet_at and not ws.channels.unsent:
            self._detached = True

    def _type(self) -> None:
        assert self._input_fd is not None  # noqa: S101  # the caller saw it in its set
        try:
            data = os.read(self._input_fd, wire.CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal that went away
        if not data:
            self._input_fd = None
            self._quiet_at = time.monotonic() + AFTER_INPUT_SECS
            return
        typed, self._detached = self._keys.feed(data)
        if typed:
            self._ws.channels.send(wire.STDIN, typed)

    def _show(self, data: bytes) -> None:
        self._on_output(data)
        if self._quiet_at is not None:
            self._quiet_at = time.monotonic() + AFTER_INPUT_SECS

    def _tell_size(self) -> None:
        if self._terminal is not None:
            self._ws.channels.send_size(*self._terminal.size())
