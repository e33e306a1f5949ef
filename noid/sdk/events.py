"""What happens to the caller's VMs, told as it does."""

from __future__ import annotations

from noid.client.event_stream import Event, EventStream
from noid.client.link import Link
from noid.sdk.stream import Stream


class Events(Stream[Event]):
    """A stream of events, to be entered. What happens from then on is in it; who looks after that misses nothing.

    A connection that is lost is made again, behind the last event: nothing is told twice. An event of the kind ``gap``
    says that what happened before the next one is not known.
    """

    def __init__(self, link: Link, vm: str | None, kinds: tuple[str, ...], after: str | None, *, follow: bool) -> None:
        super().__init__(link.waiting.turns())
        self._stream = EventStream(link, vm=vm, kinds=kinds, after=after, follow=follow)
        self._has_ended = False

    async def _open(self) -> None:
        await self._stream.open()

    async def _step(self) -> None:
        event = await self._stream.next()
        if event is None:
            self._has_ended = True
        else:
            self._arrived.append(event)

    def _is_over(self) -> bool:
        return self._has_ended

    def _close(self) -> None:
        self._stream.close()
