"""What all streams have in common: entered to connect, iterated for what comes, left to hang up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from noid.client.waiting import Turns

ItemT = TypeVar("ItemT")


class Stream(Generic[ItemT]):
    """Something that comes piece by piece over a connection of its own. Tasks may share it: one reads, another sends.

    What nobody asks for stays with the agent, which holds its source back as far as that can be.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._arrived: deque[ItemT] = deque()

    async def __aenter__(self) -> Self:
        """Connect."""
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Hang up."""
        self._close()

    def __aiter__(self) -> Self:
        """Yield what comes, until its end."""
        return self

    async def __anext__(self) -> ItemT:
        """Return the next piece, when it is there."""
        await self._until(lambda: bool(self._arrived))
        if not self._arrived:
            raise StopAsyncIteration
        return self._arrived.popleft()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Let things come and go until *condition* holds, or nothing more can come."""
        while not condition() and not self._is_over():
            async with self._turns.taken():
                if not condition() and not self._is_over():
                    await self._step()

    async def _open(self) -> None:
        raise NotImplementedError

    async def _step(self) -> None:
        raise NotImplementedError

    def _is_over(self) -> bool:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError
