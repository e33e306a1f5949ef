"""A log of a VM: bytes numbered from 0, of which some may be kept no longer."""

from __future__ import annotations

from noid.client import log_stream
from noid.client.link import Link
from noid.client.log_stream import LogProtocol
from noid.client.websocket import WebSocket
from noid.core.model.processes import Gap
from noid.sdk.stream import Stream


class Log(Stream[tuple[int, bytes]]):
    """A log. Iterate over it for ``(channel, data)``, 1 stdout, which a console's all is, and 2 stderr.

    *gaps* are those met so far, between the bytes that were iterated over.
    """

    def __init__(self, link: Link, vm: str, log: str, *, offset: int, follow: bool) -> None:
        super().__init__(link.waiting.turns())
        self.gaps: list[Gap] = []
        self._link, self._vm, self._log = link, vm, log
        self._offset, self._follow = offset, follow
        self._protocol = LogProtocol(
            lambda _, channel, data: self._arrived.append((channel, data)),
            lambda start, end: self.gaps.append(Gap(start=start, end=end)),
        )
        self._ws: WebSocket | None = None

    @property
    def start(self) -> int:
        """The offset of the first byte that is read."""
        return self._protocol.start

    @property
    def end(self) -> int | None:
        """The offset behind the last byte, once that was read: where to go on."""
        return self._protocol.end

    async def read(self) -> bytes:
        """Return all that is left of it, of both channels."""
        await self._until(lambda: False)
        data = b"".join(data for _, data in self._arrived)
        self._arrived.clear()
        return data

    async def _open(self) -> None:
        self._ws = await log_stream.opened(
            self._link, self._vm, self._log, offset=self._offset, follow=self._follow, turns=self._turns
        )

    async def _step(self) -> None:
        if self._ws is None:
            raise RuntimeError("a log is to be entered first: async with vm.logs() as log.")
        messages, _ = await self._ws.step()
        for message in messages:
            try:
                self._protocol.handle(message)
            except EOFError as error:
                raise self._ws.lost(str(error)) from error
            if self._protocol.end is not None:
                return  # what follows is only the goodbye

    def _is_over(self) -> bool:
        return self._protocol.end is not None

    def _close(self) -> None:
        if self._ws is not None:
            self._ws.close()
            self._ws = None
