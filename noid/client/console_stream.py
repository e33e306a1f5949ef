"""Attaches a terminal, or a pipe, to a VM's serial console over a WebSocket: one thread, one ``select``.

A connection that is lost is made again, at the byte of the console's log where it was lost: nothing that was printed
is missing then, or comes twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from noid.client.again import RETRY_SECS, Again
from noid.client.calls.call import with_query
from noid.client.channels import Closed, Message
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerError
from noid.client.leaving import Leaving
from noid.client.link import Link
from noid.client.settings import Endpoint
from noid.client.terminal import Terminal
from noid.client.waiting import Blocking, Source, Turns, finished
from noid.client.websocket import WebSocket
from noid.core import wire
from noid.errors import LineageEnded

AFTER_INPUT_SECS = 1.0
"""How long after the end of its input and the last output a console that is fed by a pipe stays attached."""
PRELUDE_SECS = 3.0
"""How long the guest's shell may take for what is typed first."""
UNSENT_KEYS_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What is in front of the console: a terminal, or a pipe.

    Attributes:
        input_fd: Where typing is read; None only watches.
        terminal, leaving: None where there is no terminal.
        on_history: Gets what was printed before one came, in place of *on_output*.
        on_notice: Gets what is said beside the guest's output.
        on_help: Called when ``~?`` asks for it.
        words_count: Returns whether a prompt may be there, see `Leaving.feed`.
    """

    on_output: Callable[[bytes], None]
    on_history: Callable[[bytes], None]
    on_notice: Callable[[str], None]
    input_fd: int | None
    terminal: Terminal | None = None
    leaving: Leaving | None = None
    on_help: Callable[[], None] = lambda: None
    words_count: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True, kw_only=True)
class Prelude:
    """What is typed before anything else. Output is shown from behind *mark* on, or after `PRELUDE_SECS` at the latest.

    *missing* is told then.
    """

    keys: bytes
    mark: bytes
    missing: str


class Watched:
    """What is known of a console across connections: where in its log one is, in which life of the VM.

    *lineage* is None where the agent does not tell: then nothing can go on after a loss.
    """

    def __init__(
        self,
        on_output: Callable[[bytes], None],
        on_notice: Callable[[str], None],
        on_history: Callable[[bytes], None] | None = None,
    ) -> None:
        self.lineage: str | None = None
        self.offset = 0
        self._on_output, self._on_notice = on_output, on_notice
        self._on_history = on_history or on_output
        self._history = bytearray()
        self._news_from = 0

    def hear(self, message: Message) -> None:
        """Tell what *message* means.

        Raises:
            ServerError: the agent detaches, and says why.
            ConnectionLost: it does not.
        """
        match message:
            case Closed():
                raise ConnectionLost("the agent ended the console without saying why. The VM is not affected.")
            case (wire.STDOUT, data):
                old = max(0, min(len(data), self._news_from - self.offset))
                self.offset += len(data)
                self._history += data[:old]
                if self.offset >= self._news_from:
                    self._show_history()
                if data[old:]:
                    self._on_output(data[old:])
            case str():
                match json.loads(message):
                    case {"log": {"offset": int(offset), "lineage": str(lineage), **rest}}:
                        if self.lineage is None:  # who comes back has seen nothing of what comes
                            now = rest.get("now")
                            self._news_from = now if isinstance(now, int) else 0
                        self.offset, self.lineage = offset, lineage
                    case {"gap": {"start": int(start), "end": int(end)}}:
                        self._show_history()
                        self.offset = end
                        self._on_notice(f"{end - start} bytes of the console are no longer kept")
                    case {"dropped": {"why": str(why)}}:
                        self._on_notice(why)
                    case {"error": str(error), **rest}:
                        raise ServerError(error, status=0, code=str(rest.get("code", "internal")))

    def _show_history(self) -> None:
        """Show it in one piece: a control sequence is not cut then."""
        history, self._history = bytes(self._history), bytearray()
        if history:
            self._on_history(history)


async def opened(
    link: Link,
    name: str,
    *,
    history: int | None,
    readonly: bool,
    after: Watched | None = None,
    turns: Turns | None = None,
) -> WebSocket:
    """Return a WebSocket to the console of the VM *name*, whose messages a `Watched` hears; *after* goes on with it."""
    where: dict[str, str | int | None] = {"history": history}
    if after is not None and after.lineage is not None:
        where = {"offset": after.offset, "lineage": after.lineage}
    path = with_query(f"/v1/vms/{name}/console", **where, readonly=1 if readonly else None, resume=1)
    return await WebSocket.open(link, path, turns=turns)


def attach(
    endpoint: Endpoint,
    name: str,
    front: Front,
    *,
    on_attached: Callable[[], None],
    history: int | None = None,
    prelude: Prelude | None = None,
) -> None:
    """Show the console of the VM *name* and type what is typed, until its user leaves or the input ends.

    *on_attached* is called once it is. Ctrl+C and other exceptions detach; the VM never notices.

    Raises:
        ConnectionFailed, ServerError: it could not be attached to, or was detached by the agent, which says why.
        ConnectionLost: the connection to the agent was lost, and not made again, see `Again`.
    """
    attached = _Attached(Link(endpoint, Blocking()), name, front)
    try:
        attached.open(history)
        on_attached()
        attached.run(prelude)
    finally:
        attached.close()


class _Attached:
    def __init__(self, link: Link, name: str, front: Front) -> None:
        self._link, self._name, self._front = link, name, front
        self._watched = Watched(self._show, front.on_notice, self._show_history)
        self._ws: WebSocket | None = None
        self._input_fd = front.input_fd
        self._unsent_keys = bytearray()
        self._detached = False
        self._quiet_at: float | None = None
        self._again = Again()
        self._hidden: bytearray | None = None  # what was shown of a prelude
        self._prelude: Prelude | None = None
        self._show_at = 0.0

    def open(self, history: int | None = None) -> None:
        """Attach, or attach again."""
        readonly = self._front.input_fd is None
        self._ws = finished(opened(self._link, self._name, history=history, readonly=readonly, after=self._watched))
        self._again.succeeded()
        self._tell_size()
        if self._unsent_keys:
            self._send(bytes(self._unsent_keys))
            self._unsent_keys.clear()

    def close(self) -> None:
        """Hang up. What was typed last is sent if that takes no waiting."""
        if self._ws is not None:
            self._ws.flush()
            self._ws.close()
            self._ws = None

    def run(self, prelude: Prelude | None) -> None:
        """Show and type until the user has left."""
        if prelude is not None:
            self._prelude, self._hidden, self._show_at = prelude, bytearray(), time.monotonic() + PRELUDE_SECS
            self._send(prelude.keys)
        while not self._detached:
            try:
                self._step()
            except ConnectionLost as lost:
                self._resume(lost)

    def _step(self) -> None:
        ws = self._ws
        assert ws is not None  # noqa: S101  # between `open` and `close` there is one, or `_resume` has raised
        may_type = ws.channels.has_room and self._prelude is None
        messages, readable = finished(ws.step(self._readers(may_type=may_type), secs=self._left()))
        for message in messages:
            self._watched.hear(message)
        self._take(readable)
        now = time.monotonic()
        if self._quiet_at is not None and now >= self._quiet_at and not ws.channels.unsent:
            self._detached = True
        if self._prelude is not None and now >= self._show_at:
            self._front.on_notice(self._prelude.missing)
            self._prelude = None

    def _resume(self, lost: ConnectionLost) -> None:
        """Attach again, at the byte where the connection was lost, or raise *lost*."""
        if self._watched.lineage is None:
            raise lost
        if self._again.begins():
            self._front.on_notice("the connection is lost; attaching again")
        while not self._detached and self._again.is_worth_it:
            self.close()
            # The user may leave here too. A pipe is not read on: what it says can wait.
            readers = self._readers(may_type=self._front.terminal is not None)
            readable, _ = finished(self._link.waiting.until_ready(readers, (), RETRY_SECS))
            self._take(readable)
            if readable:
                continue
            try:
                self.open()
            except ConnectionFailed:
                continue  # the agent is not up yet
            except ServerError as error:
                if error.code == LineageEnded.code:
                    self._front.on_notice("the VM was put back to a checkpoint; this is its console since then")
                    self._watched.lineage = None
                elif error.status not in (503, 504):
                    raise self._again.failed(lost, error) from error
                continue
            self._front.on_notice("attached again")
            return
        if not self._detached:
            raise lost

    def _readers(self, *, may_type: bool) -> list[int]:
        terminal = self._front.terminal
        wakeup_fd = None if terminal is None else terminal.wakeup_fd
        return [fd for fd in (self._input_fd if may_type else None, wakeup_fd) if fd is not None]

    def _left(self) -> float | None:
        limits = [self._quiet_at, self._show_at if self._prelude is not None else None]
        known = [limit - time.monotonic() for limit in limits if limit is not None]
        return max(0.0, min(known)) if known else None

    def _take(self, readable: Sequence[Source]) -> None:
        terminal = self._front.terminal
        if terminal is not None and terminal.wakeup_fd is not None and terminal.wakeup_fd in readable:
            os.read(terminal.wakeup_fd, 4096)
            self._tell_size()
        if self._input_fd is not None and self._input_fd in readable:
            self._type()

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
        if self._front.leaving is None:
            self._send(data)
            return
        typed = self._front.leaving.feed(data, words_count=self._front.words_count())
        self._send(typed.data)
        self._detached = typed.leaves
        if typed.asks:
            self._front.on_help()

    def _send(self, data: bytes) -> None:
        if self._ws is None:
            self._unsent_keys += data[: UNSENT_KEYS_MAX - len(self._unsent_keys)]
        elif data:
            self._ws.channels.send(wire.STDIN, data)

    def _show_history(self, data: bytes) -> None:
        if self._prelude is None:
            self._front.on_history(data)

    def _show(self, data: bytes) -> None:
        if self._prelude is not None:
            assert self._hidden is not None  # noqa: S101  # it is set with the prelude
            self._hidden += data
            _, found, data = bytes(self._hidden).partition(self._prelude.mark)
            if not found:
                del self._hidden[: -len(self._prelude.mark)]
                return
            self._prelude = None
        self._front.on_output(data)
        if self._quiet_at is not None:
            self._quiet_at = time.monotonic() + AFTER_INPUT_SECS

    def _tell_size(self) -> None:
        if self._front.terminal is not None and self._ws is not None:
            self._ws.channels.send_size(*self._front.terminal.size())
