"""One request over HTTP/1, one task for its handler and for most of them one write; and the protocol under it.

Hypercorn and quart-trio serve a request with a queue, three tasks and a nursery, which cost more than what they carry.
Here the connection's reader fills the request's body itself, and cancels the handler itself when the client is gone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import h11
import trio
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, EndBody, Event, Request, StreamClosed
from hypercorn.protocol.events import Response as ResponseHead
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.utils import suppress_body
from quart import request
from quart.typing import ResponseTypes
from quart.utils import encode_headers
from quart.wrappers.response import DataBody, Response
from werkzeug.wrappers import Response as WerkzeugResponse

from noid.errors import DeadlineExceeded
from noid.server.hardening.connection import STATE_KEY
from noid.server.hardening.dispatch import App
from noid.server.hardening.exchange import Exchange, surrounded

logger = logging.getLogger(__name__)

_UPLOAD_KEY = "noid.upload"


class BrokenOff(Exception):
    """A response whose beginning was sent cannot be completed. The client sees its connection end in the middle."""


class Upload:
    """The body of a PUT, piece by piece. What is not asked for stays in the socket."""

    def __init__(self) -> None:
        self._put, self._pieces = trio.open_memory_channel[bytes](0)

    async def put(self, data: bytes) -> None:
        """Hand on a piece; waits until it is taken. Once nobody wants it, it is dropped."""
        if data:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._put.send(data)

    def end(self) -> None:
        """Say that nothing follows."""
        self._put.close()

    def abandon(self) -> None:
        """Drop what still comes."""
        self._pieces.close()

    async def pieces(self, silence_secs: float) -> AsyncGenerator[bytes, None]:  # noqa: ASYNC900  # holds nothing that an end would have to free
        """Yield the pieces as they come.

        Raises:
            DeadlineExceeded: none came for *silence_secs*.
        """
        while True:
            try:
                with trio.fail_after(silence_secs):
                    piece = await self._pieces.receive()
            except trio.EndOfChannel:
                return
            except trio.TooSlowError as error:
                raise DeadlineExceeded(f"nothing more of the body came for {silence_secs:g} s.") from error
            yield piece


def upload() -> Upload:
    """Return the body of the current request, a PUT."""
    stream = request.scope["state"][_UPLOAD_KEY]
    assert isinstance(stream, Upload)  # noqa: S101  # HttpStream put it there
    return stream


@dataclass(frozen=True)
class WholeResponse(Event):
    """A response with all of its body, for the protocol to send in one go."""

    status_code: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class HttpStream(HTTPStream):
    """A request and its response. Everything but the handler runs in the task that reads the connection."""

    async def handle(self, event: Event) -> None:
        """Take what the protocol has read."""
        if self.closed:
            return
        if isinstance(event, Request):
            self._begin(event)
        elif isinstance(event, Body):
            if self._upload is None:
                self._request.body.append(bytes(event.data))
            else:
                await self._upload.put(bytes(event.data))
        elif isinstance(event, EndBody):
            if self._upload is None:
                self._request.body.set_complete()
            else:
                self._upload.end()
        elif isinstance(event, StreamClosed):
            self.closed = True
            if self.state is not ASGIHTTPState.CLOSED:
                self._life.cancel()

    def _begin(self, event: Request) -> None:
        path, _, query_string = event.raw_path.partition(b"?")
        self._upload = Upload() if event.method == "PUT" else None
        state: dict[str, Any] = {**event.state, _UPLOAD_KEY: self._upload}
        app = self.app.app  # type: ignore[attr-defined]  # hypercorn's wrapper of an ASGI application
        assert isinstance(app, App)  # noqa: S101  # the only kind there is here
        self._app = app
        self._request = app.request_of(
            {
                "type": "http",
                "http_version": event.http_version,
                "method": event.method,
                "scheme": self.scheme,
                "path": unquote(path.decode("ascii")),
                "raw_path": path,
                "query_string": query_string,
                "headers": event.headers,
                "client": self.client,
                "server": self.server,
                "state": state,
            }
        )
        self._life = trio.CancelScope()
        self.task_group.spawn(self._serve)

    async def _serve(self) -> None:
        """Call the handler, send what it returns, and end the request whatever happens."""
        exchange = Exchange()
        with surrounded(self._app, self._request.scope, exchange):
            await self._respond(exchange)

    async def _respond(self, exchange: Exchange) -> None:
        try:
            with self._life:
                await self._send_response(await self._app.respond(self._request), exchange)
        except* BrokenOff:
            pass  # nothing more is sent: the connection is closed, and the client sees that the end is missing
        except* Exception as errors:
            logger.error("a response failed", exc_info=errors)  # noqa: TRY400  # the same, said of the whole group
        finally:
            if self._upload is not None:
                self._upload.abandon()
            if not self.closed:
                await self._end(exchange)  # noqa: ASYNC102  # its writes have deadlines of their own

    async def _end(self, exchange: Exchange) -> None:
        if self.state is ASGIHTTPState.REQUEST:
            exchange.status = 500
            await self._send_error_response(500)
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_response(self, response: ResponseTypes, exchange: Exchange) -> None:
        if self._upload is not None:
            self._upload.abandon()
        exchange.status = status = response.status_code
        headers = [*encode_headers(response.headers), *exchange.raw_headers()]
        silent = suppress_body(self._request.method, status)
        if isinstance(response, WerkzeugResponse):  # what the framework's own errors are
            body = response.get_data()
        elif isinstance(whole := response.response, DataBody):
            body = whole.data[whole.begin : whole.end]
        else:
            await self._send_pieces(response, headers, exchange, silent=silent)
            return
        body = b"" if silent else body
        self.state = ASGIHTTPState.CLOSED
        await self.send(WholeResponse(stream_id=self.stream_id, status_code=status, headers=headers, body=body))
        exchange.sent_bytes, exchange.ended = len(body), True

    async def _send_pieces(
        self, response: Response, headers: list[tuple[bytes, bytes]], exchange: Exchange, *, silent: bool
    ) -> None:
        self.state = ASGIHTTPState.RESPONSE
        await self.send(ResponseHead(stream_id=self.stream_id, headers=headers, status_code=response.status_code))
        async with response.response as body, contextlib.AsyncExitStack() as stack:
            pieces = aiter(body)
            if isinstance(pieces, AsyncGenerator):
                await stack.enter_async_context(contextlib.aclosing(pieces))
            async for piece in pieces:
                await trio.lowlevel.checkpoint()  # S: a send on a closed connection does not yield
                if piece and not silent:
                    await self.send(Body(stream_id=self.stream_id, data=bytes(piece)))
                    exchange.sent_bytes += len(piece)
        self.state = ASGIHTTPState.CLOSED
        await self.send(EndBody(stream_id=self.stream_id))
        exchange.ended = True


class Http1Protocol(H11Protocol):
    """N and T: HTTP/1.0 and 1.1 and nothing else, and only for something that has a path. W: one write a response."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        transport = self.connection_state.get(STATE_KEY)
        if transport is not None:
            transport.say_interim = self.send_interim

    async def stream_send(self, event: Event) -> None:
        """Send what a stream says; a whole response in one write.

        U: a response that comes before all of its request's body says that the connection ends with it.
        """
        if not isinstance(event, WholeResponse):
            if isinstance(event, ResponseHead) and self._is_early():
                event.headers.append((b"connection", b"close"))
            await super().stream_send(event)
            return
        headers = [*event.headers, *self.config.response_headers("h11")]
        if self._is_early() or self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        connection = self.connection
        try:
            data = connection.send(h11.Response(headers=headers, status_code=event.status_code))
            if event.body:
                data += connection.send(h11.Data(data=event.body))
            data += connection.send(h11.EndOfMessage())
        except h11.LocalProtocolError:
            if connection.their_state is not h11.ERROR:
                raise
        else:
            await self.send(RawData(data=data))

    def _is_early(self) -> bool:
        """Whether the request has not been read to its end."""
        return isinstance(self.connection, h11.Connection) and self.connection.their_state is h11.SEND_BODY

    async def send_interim(self) -> None:
        """Send ``100 Continue`` if an HTTP/1.1 request waits for its response."""
        connection = self.connection
        if (
            isinstance(connection, h11.Connection)
            and connection.our_state is h11.SEND_RESPONSE
            and connection.their_http_version == b"1.1"
        ):
            headers = self.config.response_headers("h11")
            await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=headers))

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never switch to HTTP/2."""

    async def _send_error_response(self, status_code: int) -> None:
        peer = self.client[0] if self.client else "the unix socket"
        logger.info("what came from %s was answered %d: it is no request", peer, status_code)
        await super()._send_error_response(status_code)

    async def _create_stream(self, request: h11.Request) -> None:
        size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
        if size > self.config.h11_max_incomplete_size:  # h11 looks at heads that come in several pieces only
            await self._send_error_response(431)
            await self.send(Closed())
            return
        supported = request.http_version in (b"1.0", b"1.1")
        if not supported or request.target.startswith(b"?"):
            await self._send_error_response(400 if supported else 505)
            await self.send(Closed())
            return
        await super()._create_stream(request)
