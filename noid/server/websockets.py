"""The WebSockets of one server: how many there are at most, and how every one of them begins and ends."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio
from quart import websocket

from noid.core import wire
from noid.core.agent import Agent
from noid.core.model.vms import Vm
from noid.core.waiting import plain_nursery
from noid.errors import DependencyDown, InvalidRequest, LineageEnded, NoidError, TooManyRequests
from noid.server.answers import Answers
from noid.server.hardening import Transport, hold_websocket
from noid.server.open_streams import OpenStreams
from noid.server.visit import current_user, visit

GONE_CHECK_SECS = 1.0

T = TypeVar("T")


class WebSockets:
    """At most ``max_ws_sessions`` at a time, each counted from its upgrade on. *streams* say when one has to end."""

    def __init__(self, agent: Agent, answers: Answers, streams: OpenStreams) -> None:
        self._agent = agent
        self._answers = answers
        self._streams = streams
        self._sessions: Counter[str] = Counter()

    @property
    def streams(self) -> OpenStreams:
        """What ends them."""
        return self._streams

    @property
    def open_sessions(self) -> int:
        """How many there are now."""
        return self._sessions.total()

    async def hold(self, session: Callable[[], Awaitable[None]], *, counted: bool = True) -> None:
        """Upgrade the current request, run *session* on it and close it; see `hold_websocket`.

        *counted*: it is one of ``max_ws_sessions``. What is not has a limit of its own.

        Raises:
            DependencyDown: before the upgrade: there are too many, or the server is going down.
            TooManyRequests: before the upgrade: the user has too many.
        """

        async def listen() -> None:
            """Hear nothing: the client need not speak first."""

        await self._hold(listen, lambda _: session(), counted=counted)

    async def hold_asked(self, listen: Callable[[], Awaitable[T]], session: Callable[[T], Awaitable[None]]) -> None:
        """As `hold`, for a client that speaks first: *session* is given what *listen* heard.

        Nothing happens before the upgrade is in the audit log; to listen is nothing, so both go on at once.
        """
        await self._hold(listen, session, counted=True)

    async def _hold(
        self, listen: Callable[[], Awaitable[T]], session: Callable[[T], Awaitable[None]], *, counted: bool
    ) -> None:
        if self._streams.stopping.is_set():
            raise DependencyDown("the server is going down for a restart. Try again.")
        with self._counted(current_user().id) if counted else contextlib.nullcontext():
            upgraded = visit().upgraded

            async def begin() -> None:
                async with plain_nursery() as nursery:
                    if upgraded is not None:
                        nursery.start_soon(upgraded)
                    heard = await listen()
                await session(heard)

            await websocket.accept()
            with self._streams.stay() as stay:
                await hold_websocket(stay, begin, self._last_words)

    @contextlib.contextmanager
    def _counted(self, user: str) -> Iterator[None]:
        config = self._agent.config
        if self.open_sessions >= config.max_ws_sessions:
            raise DependencyDown("too many WebSocket sessions. End one, or raise max_ws_sessions in server.toml.")
        most = config.limits.max_ws_sessions_per_user
        if most is not None and self._sessions[user] >= most:
            raise TooManyRequests(f"you have {most} WebSocket sessions, and may not have more. End one first.")
        self._sessions[user] += 1
        try:
            yield
        finally:
            self._sessions[user] -= 1
            if not self._sessions[user]:
                del self._sessions[user]

    def _last_words(self, error: NoidError) -> str:
        return wire.reply_to_json(wire.ErrorResponse(error=self._answers.public_text(error), code=error.code))


async def watch_peer(transport: Transport, session: trio.CancelScope) -> None:
    """Cancel *session* when the client has gone, for as long as nobody reads from it: unread input hides that."""
    while not transport.is_gone():  # noqa: ASYNC110  # nothing to wait for
        await trio.sleep(GONE_CHECK_SECS)
    session.cancel()


def whole_number(name: str, text: str | None, default: int, *, least: int = 0) -> int:
    """Return the number a query parameter *name* says, *default* if it is not there.

    Raises:
        InvalidRequest: it is no number, or below *least*.
    """
    if text is None:
        return default
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18) or int(text) < least:
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; it must be a whole number{f' from {least} on' if least >= 0 else ''}."
        )
    return int(text)


def same_life(vm: Vm) -> str | None:
    """Return which life of *vm* a log is of if the client wants to know, to go on in it over another connection.

    Raises:
        LineageEnded: the client means another one.
    """
    lineage = websocket.args.get("lineage")
    if lineage is not None and lineage != vm.instance:
        raise LineageEnded("and the log that was read with it. There is a new one, which begins with that.")
    return vm.instance if flag(websocket.args.get("resume")) else None


def flag(text: str | None) -> bool:
    """Return whether a query parameter is switched on: there, and not 0, no or false."""
    return text is not None and text.lower() not in ("0", "no", "false")
