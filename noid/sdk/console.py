"""A VM's serial console: what it shows, and what is typed."""

from __future__ import annotations

from noid.client import console_stream
from noid.client.link import Link
from noid.client.websocket import WebSocket
from noid.core import wire
from noid.sdk.stream import Stream


class Console(Stream[bytes]):
    """A serial console. Iterate over it for what it shows. Several may watch and type at once; the VM never notices.

    *notices* is what was said beside the guest's output: of bytes that are no longer kept, of input it did not take.
    """

    def __init__(self, link: Link, vm: str, *, history: int | None, readonly: bool) -> None:
        super().__init__(link.waiting.turns())
        self.notices: list[str] = []
        self._link, self._vm = link, vm
        self._history, self._readonly = history, readonly
        self._watched = console_stream.Watched(self._arrived.append, self.notices.append)
        self._ws: WebSocket | None = None

    async def send(self, data: bytes | str) -> None:
        """Type *data*; return when that is on its way."""
        ws = self._opened()
        unsent = memoryview(data.encode() if isinstance(data, str) else data)
        while unsent:
            await self._until(lambda: ws.channels.has_room)
            ws.channels.send(wire.STDIN, bytes(unsent[: wire.CHUNK_BYTES]))
            unsent = unsent[wire.CHUNK_BYTES :]
            await self._flush(ws)

    async def resize(self, columns: int, rows: int) -> None:
        """Say how large the terminal in front of it is; the guest is told where its agent can tell it."""
        ws = self._opened()
        ws.channels.send_size(columns, rows)
        await self._flush(ws)

    async def _flush(self, ws: WebSocket) -> None:
        ws.flush()
        if ws.channels.unsent:
            self._turns.interrupt()  # who waits for output only would not see that there is room again
            await self._until(lambda: not ws.channels.unsent)

    async def _open(self) -> None:
        self._ws = await console_stream.opened(
            self._link, self._vm, history=self._history, readonly=self._readonly, turns=self._turns
        )

    async def _step(self) -> None:
        messages, _ = await self._opened().step()
        for message in messages:
            self._watched.hear(message)

    def _is_over(self) -> bool:
        return False  # the server says why it ends, which is an error

    def _close(self) -> None:
        if self._ws is not None:
            self._ws.close()
            self._ws = None

    def _opened(self) -> WebSocket:
        if self._ws is None:
            raise RuntimeError("a console is to be entered first: async with vm.console() as console.")
        return self._ws
