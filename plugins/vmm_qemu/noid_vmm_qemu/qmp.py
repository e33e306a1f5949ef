"""A client for QMP, the JSON protocol QEMU is controlled by.

There is no task behind it. Whoever waits for something reads the socket, one task at a time, and hands what it read
to all: so an object can live outside any nursery, a cancelled command loses nothing, and its late reply is dropped by
its id. Events reach *on_event* whenever somebody waits, and `drained` waits until the end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from noid.errors import BackendError, DependencyDown

LINE_BYTES_MAX = 1 << 20
_READ_BYTES = 65536
_NEGOTIATED = "negotiation is already complete"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpEvent:
    """Something QEMU told unasked, such as ``SHUTDOWN``."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


class QmpError(BackendError):
    """QEMU understood a command and refused it. *description* is QEMU's own words."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.description = description


class Qmp:
    """One control connection. Commands queue up, one at a time; `negotiate` comes first.

    Every method raises `DependencyDown` once the connection is over, which means that the VM's process has ended or
    (after `aclose`) that this object was let go.
    """

    def __init__(self, stream: trio.abc.Stream, on_event: Callable[[QmpEvent], None]) -> None:
        self._stream = stream
        self._on_event = on_event
        self._turn = trio.Lock()
        self._someone_reads = False
        self._news = trio.lowlevel.ParkingLot()
        self._buffer = bytearray()
        self._scanned = 0
        self._greeting: dict[str, Any] | None = None
        self._awaited: int | None = None
        self._reply: dict[str, Any] | None = None
        self._last_id = 0
        self._over: str | None = None

    async def negotiate(self) -> str:
        """Wait for QEMU's greeting, enter command mode and return QEMU's version, as ``7.2.22``."""
        await self._read_until(lambda: self._greeting is not None)
        assert self._greeting is not None  # noqa: S101  what the line above waited for
        version = self._greeting["version"]["qemu"]
        try:
            await self.execute("qmp_capabilities")
        except QmpError as error:
            # A QEMU that stood still may carry out what an earlier connection had asked for on this one, first.
            if _NEGOTIATED not in error.description:
                raise
        return f"{version['major']}.{version['minor']}.{version['micro']}"

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:  # JSON of any shape
        """Run *command* and return what it returns.

        After a cancellation the command may or may not have run.

        Raises:
            QmpError: QEMU refused.
            DependencyDown: the VM's process has ended, or what it says is not QMP.
        """
        async with self._turn:
            self._last_id += 1
            message: dict[str, Any] = {"execute": command, "id": self._last_id}
            if arguments:
                message["arguments"] = dict(arguments)
            self._awaited, self._reply = self._last_id, None
            try:
                await self._send(json.dumps(message).encode() + b"\n")
                await self._read_until(lambda: self._reply is not None)
                reply = self._reply
            finally:
                self._awaited = self._reply = None
        assert reply is not None  # noqa: S101  what the wait was for
        if "error" in reply:
            raise QmpError(command, str(reply["error"].get("desc", reply["error"])))
        return reply["return"]

    async def event(self, happened: Callable[[], bool]) -> None:
        """Wait until *happened*, which looks at what *on_event* noted down."""
        await self._read_until(happened)

    async def drained(self, or_until: Callable[[], bool] = lambda: False) -> bool:
        """Return True when the connection is over and every event that came over it has been delivered.

        False: *or_until*, which looks at what *on_event* noted down, was true before.
        """
        if self._over is None:
            try:
                await self._read_until(or_until)
            except DependencyDown:
                return True
            return False
        return True

    async def aclose(self) -> None:
        """Close the connection; QEMU goes on. Whoever waits gets `DependencyDown`."""
        self._end("noid has let go of this VM.")
        await trio.aclose_forcefully(self._stream)

    async def _send(self, line: bytes) -> None:
        if self._over is not None:
            raise DependencyDown(self._over)
        sent = False
        try:
            await self._stream.send_all(line)
            sent = True
        except trio.BrokenResourceError:
            sent = True  # nobody reads any more: what QEMU still said, and the end, come from reading
        except trio.ClosedResourceError as error:
            raise DependencyDown(self._over or "the VM's control connection is closed.") from error
        finally:
            if not sent and self._over is None:
                # Cancelled, perhaps in the middle of the line; nothing sensible can follow half a line.
                self._end("a command to QEMU was cut off; the control connection cannot be used any more.")

    async def _read_until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._over is not None:
                raise DependencyDown(self._over)
            if self._someone_reads:
                await self._news.park()
                continue
            self._someone_reads = True
            try:
                data = await self._stream.receive_some(_READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            finally:
                self._someone_reads = False
                self._news.unpark_all()
            if data:
                self._feed(bytes(data))
            elif self._over is None:
                self._end("the VM process ended.")

    def _feed(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            if line.strip():
                self._handle(line)
        self._scanned = len(self._buffer)
        if len(self._buffer) > LINE_BYTES_MAX:
            self._end(f"QEMU sent a line of over {LINE_BYTES_MAX} bytes; its control connection was given up.")

    def _handle(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self._end(f"what answers is not QEMU: {line[:80]!r}.")
        elif "event" in message:
            self._on_event(QmpEvent(name=message["event"], data=message.get("data", {})))
        elif "QMP" in message:
            self._greeting = message["QMP"]
        elif message.get("id") == self._awaited is not None:
            self._reply = message
        elif "id" not in message and "error" in message:
            # QEMU could not even parse what it got, so it does not know whom it answers.
            self._reply = message if self._awaited is not None else None
        else:
            log.debug("dropped the reply to a command nobody waits for any more: %.200r", message)

    def _end(self, why: str) -> None:
        if self._over is None:
            self._over = why
            self._news.unpark_all()
