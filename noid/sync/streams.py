"""Streams and processes, for programs that wait."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from noid.client.answers import ProcessInfo
from noid.client.event_stream import Event
from noid.client.waiting import finished
from noid.core.model.processes import Gap
from noid.sdk import connection, console, events, log, process, running
from noid.sync.face import Face, waited, wrapped

StreamT = TypeVar("StreamT")
ItemT = TypeVar("ItemT")


class Stream(Face[StreamT], Generic[StreamT, ItemT]):
    """See `noid.sdk.stream.Stream`; for one thread at a time."""

    _it: Any  # a Stream of ItemT; TypeVars know no bound with another one in it

    def __enter__(self) -> Self:
        """Connect."""
        finished(self._it.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Hang up."""
        finished(self._it.__aexit__(kind, error, traceback))

    def __iter__(self) -> Self:
        """Yield what comes, until its end."""
        return self

    def __next__(self) -> ItemT:
        """Return the next piece, when it is there."""
        try:
            item: ItemT = finished(self._it.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None
        return item


class RunningProcess(Stream[running.RunningProcess, tuple[int, bytes]]):
    """See `noid.RunningProcess`."""

    @property
    def id(self) -> str | None:
        """Which process of the VM it is; None before its server has said so."""
        found: str | None = self._it.id
        return found

    send = waited(running.RunningProcess.send)
    close_input = waited(running.RunningProcess.close_input)
    resize = waited(running.RunningProcess.resize)
    signal = waited(running.RunningProcess.signal)
    leave = waited(running.RunningProcess.leave)
    wait = waited(running.RunningProcess.wait)


class Console(Stream[console.Console, bytes]):
    """See `noid.Console`."""

    @property
    def notices(self) -> Sequence[str]:
        """What was said beside the guest's output."""
        found: list[str] = self._it.notices
        return found

    send = waited(console.Console.send)
    resize = waited(console.Console.resize)


class Connection(Stream[connection.Connection, bytes]):
    """See `noid.Connection`."""

    send = waited(connection.Connection.send)
    send_eof = waited(connection.Connection.send_eof)


class Log(Stream[log.Log, tuple[int, bytes]]):
    """See `noid.Log`."""

    @property
    def gaps(self) -> Sequence[Gap]:
        """Those met so far."""
        found: list[Gap] = self._it.gaps
        return found

    @property
    def start(self) -> int:
        """The offset of the first byte that is read."""
        found: int = self._it.start
        return found

    @property
    def end(self) -> int | None:
        """The offset behind the last byte, once that was read: where to go on."""
        found: int | None = self._it.end
        return found

    read = waited(log.Log.read)


class Events(Stream[events.Events, Event]):
    """See `noid.Events`."""


class Process(Face[process.Process]):
    """See `noid.Process`."""

    @property
    def vm(self) -> str:
        """The VM it is a process of."""
        return self._it.vm

    @property
    def info(self) -> ProcessInfo:
        """What the server said of it last."""
        return self._it.info

    @property
    def id(self) -> str:
        """Its id, 8 hex digits."""
        return self._it.id

    refresh = waited(process.Process.refresh)
    wait = waited(process.Process.wait)
    signal = waited(process.Process.signal)
    remove = waited(process.Process.remove)
    attach = wrapped(process.Process.attach, RunningProcess)
