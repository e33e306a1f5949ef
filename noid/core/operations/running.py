"""Operations run in the agent's nursery: whoever asked only waits, and may leave without changing anything."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import trio

from noid.core import tracing
from noid.errors import Busy, DependencyDown, OperationCancelled

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Result(Generic[T]):
    """What an operation came to, for whoever still waits."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.value: T | None = None
        self.error: Exception | None = None


class Operations:
    """Starts operations and keeps them apart: one at a time for each VM, and nobody waits for a lock."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._holders: dict[tuple[str, str], str] = {}
        self._running = 0
        self._idle = trio.Event()
        self._idle.set()
        self._started = trio.Event()
        self._freed = trio.lowlevel.ParkingLot()
        self._closing = False
        self._leftovers: set[trio.CancelScope] = set()

    def holder(self, owner: str, vm_name: str) -> str | None:
        """Return what holds the VM now, or None."""
        return self._holders.get((owner, vm_name))

    async def run(
        self,
        what: str,
        owner: str,
        vm_names: tuple[str, ...],
        job: Callable[[], Awaitable[T]],
        scope: trio.CancelScope | None = None,
        leftover: Callable[[], Awaitable[None]] | None = None,
    ) -> T:
        """Run *job* in the agent's nursery, holding *vm_names* of *owner*, and return its result.

        Cancelling the caller does not cancel the job. Cancelling *scope* does. *leftover* is done while nobody waits
        for it any more and the VMs are still held; it is cancelled when the agent stops.

        Raises:
            Busy: names the operation that holds one of *vm_names*, which may be ``checkpoint/<id>`` too.
            DependencyDown: the agent is stopping.
            OperationCancelled: *scope* was cancelled before the job was done.
        """
        if self._closing:
            raise DependencyDown("the noid agent is stopping. Try again when it is back.")
        result: _Result[T] = _Result()
        locks = self._hold(what, owner, vm_names)
        locks.__enter__()  # released by the task, which outlives this call
        cancelled = OperationCancelled(f"{what} of {' and '.join(map(repr, vm_names))} was cancelled; it is undone.")

        async def carry_out() -> None:
            try:
                with scope or trio.CancelScope() as asked:
                    result.value = await job()
                if asked.cancelled_caught:
                    result.error = cancelled
            except Exception as error:  # the waiter raises it; nothing may cross the nursery
                result.error = error
            except BaseException:  # a cancellation (perhaps several, in a group), or the end of the process
                result.error = DependencyDown(
                    f"{what} was interrupted because the noid agent stopped. What was not finished is undone, at the "
                    "latest by the next start. Try again when the agent is back."
                )
                raise
            finally:
                result.done.set()  # who waits goes on when this task waits for something, or has ended

        async def task() -> None:
            try:
                await carry_out()
                if leftover is not None:
                    with self._until_closing():
                        await leftover()
            except Exception:  # a bug here must not end the agent
                logger.exception("what is left over of %s of %s is left to the next start", what, vm_names)
            finally:
                locks.__exit__(None, None, None)

        self._nursery.start_soon(task, name=f"{what} {' '.join(vm_names)}")
        await result.done.wait()
        if result.error is not None:
            raise result.error
        return result.value  # type: ignore[return-value]  # set whenever there is no error

    async def free(self, owner: str, vm_name: str) -> None:
        """Return when no operation holds the VM. The next may be faster than whoever waited."""
        while (owner, vm_name) in self._holders:
            await self._freed.park()

    async def quiet(self, secs: float) -> None:
        """Return when no operation has run for *secs*."""
        while True:
            await self._idle.wait()
            with trio.move_on_after(secs) as calm:
                await self._started.wait()
            if calm.cancelled_caught:
                return

    async def drain(self) -> None:
        """Refuse new operations and wait for the running ones. Bound it with ``move_on_after``.

        What is left over of others is not waited for.
        """
        self._closing = True
        for scope in self._leftovers:
            scope.cancel()
        await self._idle.wait()

    @contextmanager
    def _until_closing(self) -> Iterator[None]:
        """Cancel what is inside when the agent stops."""
        with trio.CancelScope() as scope:
            if self._closing:
                scope.cancel()
            self._leftovers.add(scope)
            try:
                yield
            finally:
                self._leftovers.remove(scope)

    @contextmanager
    def _hold(self, what: str, owner: str, vm_names: tuple[str, ...]) -> Iterator[None]:
        keys = [(owner, name) for name in dict.fromkeys(vm_names)]
        for key in keys:
            if key in self._holders:
                kind, _, name = key[1].rpartition("/")
                raise Busy(name, self._holders[key], what=kind or "VM")
        self._holders.update(dict.fromkeys(keys, what))
        self._running += 1
        if self._running == 1:
            self._idle = trio.Event()
        self._started.set()
        self._started = trio.Event()
        try:
            with tracing.carrying_on():
                yield
        finally:
            for key in keys:
                del self._holders[key]
            self._freed.unpark_all()
            self._running -= 1
            if self._running == 0:
                self._idle.set()
