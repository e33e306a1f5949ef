"""How a client waits: by holding up its thread, as here, or under trio (`noid.client.trio_waiting`).

Everything that talks to an agent is written once, as coroutines that wait through `Waiting` and nothing else. With
`Blocking` they are never suspended, so that `finished` needs no event loop to run one, and importing this imports none.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from noid.errors import NoidError

T = TypeVar("T")
Source = socket.socket | int
Ready = tuple[Sequence[Source], Sequence[Source]]

_SELECT_MAX = 1024  # file descriptors from here on are beyond what select(2) can say


class Abandoned(NoidError):
    """Who wanted the result has been cancelled. Seen by nobody but the thread that worked for it."""

    def __init__(self) -> None:
        super().__init__("nobody waits for this any more.")


class Turns(Protocol):
    """Lets the tasks that share a connection wait on it one at a time."""

    def taken(self) -> AbstractAsyncContextManager[None]:
        """Return what has the turn while it is entered."""
        ...

    async def until_ready(self, readers: Sequence[Source], writers: Sequence[Source], secs: float | None) -> Ready:
        """Wait as `Waiting.until_ready` does, or until somebody interrupts; only for who has the turn."""
        ...

    def interrupt(self) -> None:
        """Make who waits now return, so that another one gets its turn."""
        ...


class Waiting(Protocol):
    """Every way in which the client's coroutines can be held up. Times are seconds."""

    async def until_ready(self, readers: Sequence[Source], writers: Sequence[Source], secs: float | None) -> Ready:
        """Return which of *readers* have something to read and which *writers* take something; none after *secs*."""
        ...

    async def sleep(self, secs: float) -> None:
        """Let *secs* pass."""
        ...

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Return what *function* does, which blocks, and whose result needs no cleaning up when nobody wants it."""
        ...

    async def work(self, function: Callable[[Waiting], T]) -> T:
        """Return what *function* does, which blocks, and waits for connections through what it is given.

        A cancellation waits for its end, which comes as soon as it waits for a connection.
        """
        ...

    def turns(self) -> Turns:
        """Return what lets tasks take turns."""
        ...

    def shielded(self, secs: float) -> AbstractContextManager[object]:
        """Return what holds a cancellation up: for cleaning up. `DeadlineExceeded` if that takes more than *secs*."""
        ...

    def let_go(self, sock: socket.socket) -> None:
        """Make whoever waits for *sock* give up; it is about to be closed."""
        ...


class Blocking:
    """Holds up the thread. *abandoned* becomes readable when nobody waits any more for what this thread does."""

    def __init__(self, abandoned: int | None = None) -> None:
        self._abandoned = abandoned

    async def until_ready(self, readers: Sequence[Source], writers: Sequence[Source], secs: float | None) -> Ready:
        """See `Waiting.until_ready`."""
        watched = readers if self._abandoned is None else [*readers, self._abandoned]
        # select, not poll or epoll: it takes regular files and terminals everywhere, and there are few descriptors.
        if all(_number(source) < _SELECT_MAX for source in (*watched, *writers)):
            readable, writable, _ = select.select(watched, writers, [], None if secs is None else max(0.0, secs))
        else:
            readable, writable = _polled(watched, writers, secs)
        if self._abandoned in readable:
            raise Abandoned
        return readable, writable

    async def sleep(self, secs: float) -> None:
        """See `Waiting.sleep`."""
        if self._abandoned is None:
            time.sleep(secs)  # noqa: ASYNC251  # holding up the thread is what this class is for
        else:
            await self.until_ready((), (), secs)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """See `Waiting.in_thread`."""
        return function()

    async def work(self, function: Callable[[Waiting], T]) -> T:
        """See `Waiting.work`."""
        return function(self)

    def turns(self) -> Turns:
        """See `Waiting.turns`. What is used by one thread needs none."""
        return _NoTurns(self)

    def shielded(self, secs: float) -> AbstractContextManager[object]:
        """See `Waiting.shielded`. Nothing is cancelled here."""
        return nullcontext(secs)

    def let_go(self, sock: socket.socket) -> None:
        """See `Waiting.let_go`. Nobody else waits here."""


class _NoTurns:
    def __init__(self, waiting: Blocking) -> None:
        self.until_ready = waiting.until_ready

    def taken(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def interrupt(self) -> None:
        """Nobody waits: whoever calls this is the only one."""


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of *coroutine*, which waits only through `Blocking`."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    coroutine.close()
    raise RuntimeError("the coroutine waits for something other than noid.client.waiting.Blocking.")


def _number(source: Source) -> int:
    return source if isinstance(source, int) else source.fileno()


def _polled(
    readers: Sequence[Source], writers: Sequence[Source], secs: float | None
) -> tuple[list[Source], list[Source]]:
    poll = select.poll()
    wanted: dict[int, int] = {}
    for sources, flag in ((readers, select.POLLIN), (writers, select.POLLOUT)):
        for source in sources:
            wanted[_number(source)] = wanted.get(_number(source), 0) | flag
    for number, flags in wanted.items():
        poll.register(number, flags)
    found = dict(poll.poll(None if secs is None else max(0.0, secs) * 1000))
    ended = select.POLLHUP | select.POLLERR | select.POLLNVAL
    return (
        [source for source in readers if found.get(_number(source), 0) & (select.POLLIN | ended)],
        [source for source in writers if found.get(_number(source), 0) & (select.POLLOUT | ended)],
    )
