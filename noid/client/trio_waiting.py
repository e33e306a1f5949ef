"""Waiting under trio: every wait is a checkpoint, can be cancelled, and holds up nobody else."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

import trio

from noid.client.waiting import Abandoned, Blocking, Ready, Source, Turns, Waiting
from noid.errors import DeadlineExceeded

T = TypeVar("T")


class TrioWaiting:
    """See `Waiting`. What is ready is told by trio, the reading and writing is the same as ever."""

    async def until_ready(self, readers: Sequence[Source], writers: Sequence[Source], secs: float | None) -> Ready:
        """See `Waiting.until_ready`."""
        readable: list[Source] = []
        writable: list[Source] = []
        with trio.CancelScope() if secs is None else trio.move_on_after(max(0.0, secs)):
            if len(readers) == 1 and not writers:
                await trio.lowlevel.wait_readable(readers[0])
                return readers, ()
            async with trio.open_nursery() as nursery:

                async def wait(until: Callable[[Source], Awaitable[None]], source: Source, ready: list[Source]) -> None:
                    await until(source)
                    ready.append(source)
                    nursery.cancel_scope.cancel()

                for source in readers:
                    nursery.start_soon(wait, trio.lowlevel.wait_readable, source, readable)
                for source in writers:
                    nursery.start_soon(wait, trio.lowlevel.wait_writable, source, writable)
                if not readers and not writers:
                    await trio.sleep_forever()
        return readable, writable

    async def sleep(self, secs: float) -> None:
        """See `Waiting.sleep`."""
        await trio.sleep(secs)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """See `Waiting.in_thread`."""
        return await trio.to_thread.run_sync(function, abandon_on_cancel=True)

    async def work(self, function: Callable[[Waiting], T]) -> T:
        """See `Waiting.work`."""
        results: list[T] = []
        failures: list[Exception] = []
        reader, writer = os.pipe()

        async def abandon_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                os.write(writer, b"x")

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(abandon_when_cancelled)
                with trio.CancelScope(shield=True):
                    try:
                        results.append(await trio.to_thread.run_sync(function, Blocking(reader)))
                    except Abandoned:
                        pass  # the cancellation, which is about to be seen, is why
                    except Exception as error:  # raised below: in here a nursery would put it into a group
                        failures.append(error)
                nursery.cancel_scope.cancel()
        finally:
            os.close(reader)
            os.close(writer)
        for failure in failures:
            raise failure
        if not results:
            await trio.lowlevel.checkpoint_if_cancelled()
        return results[0]

    def turns(self) -> Turns:
        """See `Waiting.turns`."""
        return _TrioTurns(self)

    @contextmanager
    def shielded(self, secs: float) -> Iterator[None]:
        """See `Waiting.shielded`."""
        try:
            with trio.fail_after(secs, shield=True):
                yield
        except trio.TooSlowError as error:
            raise DeadlineExceeded(f"cleaning up was not done in {secs:g} s; something may be left.") from error

    def let_go(self, sock: socket.socket) -> None:
        """See `Waiting.let_go`."""
        trio.lowlevel.notify_closing(sock)


class _TrioTurns:
    def __init__(self, waiting: TrioWaiting) -> None:
        self._waiting = waiting
        self._lock = trio.Lock()
        self._scope: trio.CancelScope | None = None

    def taken(self) -> AbstractAsyncContextManager[None]:
        return self._taken()

    @asynccontextmanager
    async def _taken(self) -> AsyncIterator[None]:
        async with self._lock:
            yield

    async def until_ready(self, readers: Sequence[Source], writers: Sequence[Source], secs: float | None) -> Ready:
        with trio.CancelScope() as self._scope:
            return await self._waiting.until_ready(readers, writers, secs)
        return (), ()

    def interrupt(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
