"""A test per lettered item of noid/server/hardening, against a live server with an application of its own."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import trio
from hypercorn.config import Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app
from quart import Response, request, websocket
from trio_websocket import ConnectionClosed, WebSocketConnection

from noid.errors import Conflict
from noid.server.hardening import RESTARTING, App, BrokenOff, Settings, Stay, Transport, hold_websocket, upload
from noid.server.listening import tcp_listeners
from noid.testing.raw_http import RawClient, open_ws

UPGRADE = {
    "connection": "keep-alive, Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


class Quick(Settings):
    """The same limits, sooner."""

    keep_alive_timeout = 0.3
    graceful_timeout = 0.3
    write_timeout_secs = 0.5
    linger_secs = 0.5


class Rig:
    """A server on a port of its own, and what its handlers noticed."""

    def __init__(self) -> None:
        self.stopping = trio.Event()
        self.stay = Stay()  # of the WebSocket that is open
        self.stopped = trio.Event()
        self.cancelled = trio.Event()
        self.noticed = trio.Event()
        self.transport: Transport | None = None
        self.address = ("", 0)
        self.clients: list[RawClient] = []
        self.settings = Quick()
        self.trust: ssl.SSLContext | None = None

    async def stream(self) -> Any:
        """Connect, through TLS where the server is."""
        stream = await trio.open_tcp_stream(*self.address)
        if self.trust is None:
            return stream
        secure = trio.SSLStream(stream, self.trust, server_hostname="localhost")
        try:
            await secure.do_handshake()
        except trio.BrokenResourceError:
            await stream.aclose()
            raise
        return secure

    async def connect(self) -> RawClient:
        self.clients.append(RawClient(await self.stream()))
        return self.clients[-1]

    @contextlib.asynccontextmanager
    async def websocket(self, path: str) -> AsyncIterator[WebSocketConnection]:
        async with open_ws(await self.stream(), path) as ws:
            yield ws

    @contextlib.asynccontextmanager
    async def notes_cancellation(self) -> AsyncIterator[None]:
        try:
            yield
        except trio.Cancelled:
            self.cancelled.set()
            raise

    def app(self) -> App:
        app = App("test", static_folder=None)
        app.config.update(MAX_CONTENT_LENGTH=100_000, BODY_TIMEOUT=0.3, RESPONSE_TIMEOUT=None)

        @app.route("/", methods=["GET", "POST"])
        async def echo() -> Response:
            self.transport = Transport.of(request.scope)
            return Response(await request.get_data())

        @app.route("/slow")
        async def slow() -> Response:
            async with self.notes_cancellation():
                await trio.sleep_forever()
            raise AssertionError

        @app.route("/long")
        async def long() -> Response:
            await trio.sleep(3 * Quick.keep_alive_timeout)
            return Response(b"at last")

        @app.route("/put/<int:pieces>", methods=["PUT"])
        async def put(pieces: int) -> Response:
            size = 0
            async with contextlib.aclosing(upload().pieces(1.0)) as body:
                async for piece in body:
                    size += len(piece)
                    pieces -= 1
                    if not pieces:
                        break
            return Response(b"%d" % size)

        @app.route("/breaks/<int:length>")
        async def breaks(length: int) -> Response:
            async def body() -> AsyncIterator[bytes]:
                yield b"beginning"
                raise BrokenOff

            response = Response(body())
            if length:
                response.content_length = length
            return response

        @app.route("/interim")
        async def interim() -> Response:
            for _ in range(3):
                await Transport.of(request.scope).say_still_working()
            return Response(b"done")

        @app.websocket("/flood")
        async def flood() -> None:
            async with self.notes_cancellation():
                while True:
                    await websocket.send(bytes(65536))

        @app.websocket("/echo")
        async def ws_echo() -> None:
            async def session() -> None:
                async with self.notes_cancellation():
                    while True:
                        await websocket.send(await websocket.receive())

            await hold_websocket(self.stay, session, str)

        @app.websocket("/fails/<how>")
        async def fails(how: str) -> None:
            async def session() -> None:
                raise Conflict("on purpose") if how == "kindly" else RuntimeError("a secret")

            await hold_websocket(self.stay, session, str)

        @app.websocket("/deaf")
        async def deaf() -> None:
            await websocket.accept()
            transport = Transport.of(websocket.scope)
            while not transport.is_gone():  # noqa: ASYNC110  # that is what is tested
                await trio.sleep(0.01)
            self.noticed.set()

        return app


@pytest.fixture(scope="module")
def certificate() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a server shows, and what makes a client believe it."""
    return certificate_of_another_authority()


def certificate_of_another_authority() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.set_alpn_protocols(["http/1.1"])
    authority.issue_cert("localhost").configure_cert(shown)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return shown, trust


@pytest.fixture(params=["clear", "tls"])
async def rig(nursery: trio.Nursery, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """A server, in the clear and behind TLS: every letter holds for both."""
    rig = Rig()
    if request.param == "tls":
        rig.settings.tls, rig.trust = request.getfixturevalue("certificate")
    with tcp_listeners("127.0.0.1:0") as listeners:
        rig.address = listeners[0].getsockname()

        async def run(*, task_status: trio.TaskStatus[object]) -> None:
            await worker_serve(
                wrap_app(rig.app(), 0, "asgi"),
                rig.settings,
                sockets=Sockets([], listeners, []),
                shutdown_trigger=rig.stopping.wait,
                task_status=task_status,
            )
            rig.stopped.set()

        await nursery.start(run)
        yield rig
        rig.stopping.set()
        with trio.fail_after(10):
            await rig.stopped.wait()
        for client in rig.clients:
            await trio.aclose_forcefully(client.stream)


async def test_a_an_idle_connection_is_closed_also_after_a_response(rig: Rig) -> None:
    client = await rig.connect()
    await client.ask("GET", "/")
    with trio.fail_after(5):
        assert await client.until_closed() == b""


async def test_a_connection_close_is_honoured_with_the_whole_answer(rig: Rig) -> None:
    client = await rig.connect()
    await client.send("POST", "/", bytes(90_000), headers={"connection": "close"})
    with trio.fail_after(5):
        assert (await client.until_closed()).endswith(bytes(90_000))


async def test_a_idle_clients_do_not_delay_shutdown(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quick, "graceful_timeout", 30.0)
    monkeypatch.setattr(Quick, "keep_alive_timeout", 30.0)
    client = await rig.connect()
    await client.ask("GET", "/")
    rig.stopping.set()
    with trio.fail_after(5):
        await rig.stopped.wait()


async def test_a_slow_headers_are_cut_off_on_every_request(rig: Rig) -> None:
    client = await rig.connect()
    await client.ask("GET", "/")
    with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
        async with trio.open_nursery() as nursery:

            async def dribble() -> None:
                while True:
                    await client.stream.send_all(b"X")
                    await trio.sleep(0.05)

            nursery.start_soon(dribble)
            assert await client.until_closed() == b""
            nursery.cancel_scope.cancel()


async def test_b_a_client_that_does_not_read_is_dropped(rig: Rig) -> None:
    async with rig.websocket("/flood"):  # its receive buffer is one message; then it stops reading
        with trio.fail_after(10):
            await rig.cancelled.wait()


async def test_b_a_client_that_does_not_read_does_not_stop_shutdown(rig: Rig) -> None:
    async with rig.websocket("/flood"):
        rig.stopping.set()
        with trio.fail_after(10):
            await rig.stopped.wait()


async def test_s_a_handler_that_only_sends_does_not_starve_others_after_its_client_left(rig: Rig) -> None:
    async with rig.websocket("/flood") as ws:
        await ws._stream.aclose()
        with trio.fail_after(10):
            await rig.cancelled.wait()
            assert (await (await rig.connect()).ask("GET", "/")).status == 200


async def test_c_a_client_that_leaves_cancels_its_handler(rig: Rig) -> None:
    client = await rig.connect()
    await client.send("GET", "/slow")
    await client.stream.aclose()
    with trio.fail_after(5):
        await rig.cancelled.wait()


async def test_d_a_websocket_is_told_of_a_restart(rig: Rig) -> None:
    async with rig.websocket("/echo") as ws:
        await ws.send_message("x")
        await ws.get_message()
        rig.stopping.set()
        rig.stay.end(RESTARTING)
        assert "restart" in await ws.get_message()
        with pytest.raises(ConnectionClosed) as closed:
            await ws.get_message()
    assert closed.value.reason.code == 1012


async def test_e_a_failing_handler_is_an_internal_error_and_keeps_its_secrets(rig: Rig) -> None:
    async with rig.websocket("/fails/badly") as ws:
        assert "secret" not in await ws.get_message()
        with pytest.raises(ConnectionClosed) as closed:
            await ws.get_message()
    assert closed.value.reason.code == 1011


async def test_e_an_error_meant_for_the_client_is_a_normal_end(rig: Rig) -> None:
    async with rig.websocket("/fails/kindly") as ws:
        assert await ws.get_message() == "on purpose"
        with pytest.raises(ConnectionClosed) as closed:
            await ws.get_message()
    assert closed.value.reason.code == 1000


@pytest.mark.parametrize("message", [b"", "", b"\0", "text"])
async def test_f_empty_messages_are_messages(rig: Rig, message: bytes | str) -> None:
    async with rig.websocket("/echo") as ws:
        await ws.send_message(message)
        assert await ws.get_message() == message


async def test_g_an_oversized_message_ends_session_and_connection_though_the_client_stays(rig: Rig) -> None:
    client = await rig.connect()
    await client.send("GET", "/echo", headers=UPGRADE)
    assert (await client.stream.receive_some()).startswith(b"HTTP/1.1 101")
    size = (1 << 20) + 1
    await client.stream.send_all(b"\x82\xff" + size.to_bytes(8, "big") + bytes(4) + bytes(size))
    with trio.fail_after(5):
        assert await client.until_closed() == b"\x88\x02" + (1009).to_bytes(2, "big")
        await rig.cancelled.wait()


async def test_g_the_largest_message_passes(rig: Rig) -> None:
    async with rig.websocket("/echo") as ws:
        await ws.send_message(bytes(1 << 20))
        assert len(await ws.get_message()) == 1 << 20


async def test_h_compression_is_never_negotiated_and_connection_is_single_valued(rig: Rig) -> None:
    client = await rig.connect()
    await client.send("GET", "/echo", headers=UPGRADE | {"sec-websocket-extensions": "permessage-deflate"})
    head = (await client.stream.receive_some()).decode().lower()
    assert head.startswith("http/1.1 101")
    assert "sec-websocket-extensions" not in head
    assert "\r\nconnection: upgrade\r\n" in head
    await client.stream.send_all(b"\xc1\x80\0\0\0\0")  # a compressed frame nobody agreed on: RSV1 is set
    with trio.fail_after(5):
        assert await client.until_closed() == b""


async def test_i_dead_peers_are_found_by_keepalive(rig: Rig) -> None:
    client = await rig.connect()
    await client.ask("GET", "/")
    assert rig.transport is not None
    assert rig.transport._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert rig.transport._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


async def test_j_a_client_that_leaves_is_noticed_while_its_input_is_unread(rig: Rig) -> None:
    async with rig.websocket("/deaf") as ws:
        for _ in range(20):
            await ws.send_message(bytes(1000))
        await ws._stream.aclose()
        with trio.fail_after(5):
            await rig.noticed.wait()


async def test_k_a_body_over_the_limit_is_413_with_length_and_chunked(rig: Rig) -> None:
    assert (await (await rig.connect()).ask("POST", "/", bytes(100_001))).status == 413
    client = await rig.connect()
    await client.stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1000000\r\n")
    with contextlib.suppress(trio.BrokenResourceError):
        await client.stream.send_all(bytes(150_000))
    assert (await client.receive()).status == 413


async def test_k_a_body_that_does_not_arrive_is_408(rig: Rig) -> None:
    client = await rig.connect()
    await client.stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
    assert (await client.receive()).status == 408
    with trio.fail_after(5):
        assert await client.until_closed() == b""


async def test_n_http2_is_refused_in_the_clear(rig: Rig) -> None:
    client = await rig.connect()
    h2c = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
    assert (await client.ask("GET", "/", headers=h2c)).status == 200
    client = await rig.connect()
    await client.stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    with trio.fail_after(5):
        assert (await client.until_closed()).startswith(b"HTTP/1.1 505")


async def test_r_an_early_refusal_does_not_reset_a_client_that_is_still_sending(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quick, "linger_secs", 10.0)
    client = await rig.connect()
    await client.stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n")
    for _ in range(80):
        await client.stream.send_all(bytes(100_000))
    assert (await client.receive()).status == 413
    assert await client.until_closed() == b""


async def test_r_lingering_is_bounded(rig: Rig) -> None:
    client = await rig.connect()
    await client.send("GET", "/", headers={"connection": "close"})
    await client.until_closed()

    async def stay() -> None:
        while True:
            await client.stream.send_all(b"still here")
            await trio.sleep(0.02)

    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await stay()


async def test_signs_of_life_precede_the_answer(rig: Rig) -> None:
    answer = await (await rig.connect()).ask("GET", "/interim")
    assert (answer.status, answer.body, answer.interim) == (200, b"done", 3)


async def test_http_1_0_gets_no_signs_of_life(rig: Rig) -> None:
    client = await rig.connect()
    await client.stream.send_all(b"GET /interim HTTP/1.0\r\n\r\n")
    assert (await client.until_closed()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\0\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET ?x HTTP/1.1\r\nHost: x"]
)
async def test_even_what_is_not_http_is_answered_with_the_api_version(rig: Rig, garbage: bytes) -> None:
    client = await rig.connect()
    await client.stream.send_all(garbage + b"\r\n\r\n")
    with trio.fail_after(5):
        received = await client.until_closed()
    assert received.startswith(b"HTTP/1.1 400")
    assert b"x-noid-api-version: 1" in received.lower()


async def test_a_body_of_the_limit_arrives_in_pieces(rig: Rig) -> None:
    client = await rig.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(client.send, "POST", "/", bytes(100_000)))
        assert (await client.receive()).body == bytes(100_000)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/put/1", 200),  # one piece is taken, then answered
        ("PUT", "/nowhere", 404),
        ("PUT", "/slow", 405),
        ("POST", "/nowhere", 404),
        ("POST", "/slow", 405),
        ("DELETE", "/nowhere", 404),
        ("POST", "/", 413),
    ],
)
async def test_u_a_body_nobody_reads_holds_up_neither_its_answer_nor_shutdown(
    rig: Rig, method: str, path: str, status: int
) -> None:
    client = await rig.connect()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.send(method, path, bytes(8 << 20))

            nursery.start_soon(send)
            answer = await client.receive(method)
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            nursery.cancel_scope.cancel()
        rig.stopping.set()
        await rig.stopped.wait()


@pytest.mark.parametrize("body", [b"", b"hello"])
async def test_u_a_refusal_before_the_body_was_read_says_that_the_connection_ends_and_ends_it(
    rig: Rig, body: bytes
) -> None:
    client = await rig.connect()
    await client.send("PUT", "/nowhere", body, headers={"content-length": "5"})
    answer = await client.receive("PUT")
    assert (answer.status, answer.headers["connection"]) == (404, "close")
    with trio.fail_after(10):
        assert await client.until_closed() == b""


async def test_u_a_refusal_after_the_body_was_read_keeps_the_connection(rig: Rig) -> None:
    client = await rig.connect()
    for method in ("PUT", "POST"):
        answer = await client.ask(method, "/nowhere", b"" if method == "PUT" else b"hello")
        assert (answer.status, "connection" in answer.headers) == (404, False)


async def test_u_a_body_is_a_stream_and_the_connection_serves_another_request(rig: Rig) -> None:
    client = await rig.connect()
    for _ in range(2):
        assert (await client.ask("PUT", "/put/0", bytes(3_000_000))).body == b"3000000"
    assert (await client.ask("PUT", "/put/0", b"")).body == b"0"
    assert (await client.ask("GET", "/")).status == 200


async def test_u_a_body_that_falls_silent_frees_its_connection(rig: Rig) -> None:
    client = await rig.connect()
    await client.send("PUT", "/put/0", b"x", headers={"content-length": "10"})
    with trio.fail_after(10):
        assert (
            await client.receive("PUT")
        ).status == 500  # of the test's application: nothing there answers our errors
        await client.until_closed()


@pytest.mark.parametrize("length", [0, 100])
async def test_v_a_response_that_breaks_off_ends_without_its_end_mark_and_is_no_bug(
    rig: Rig, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    client = await rig.connect()
    await client.send("GET", f"/breaks/{length}")
    with trio.fail_after(5):
        received = await client.until_closed()
    assert b"beginning" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert (await (await rig.connect()).ask("GET", "/")).status == 200


async def test_w_a_request_may_take_longer_than_a_connection_may_idle_which_counts_anew_after_it(rig: Rig) -> None:
    client = await rig.connect()
    with trio.fail_after(10):
        assert (await client.ask("GET", "/long")).body == b"at last"
        assert (await client.ask("GET", "/long")).body == b"at last"
        assert await client.until_closed() == b""


async def test_w_a_connection_that_was_closed_is_gone_without_waiting_for_its_idle_timer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quick, "keep_alive_timeout", 60.0)
    client = await rig.connect()
    await client.ask("GET", "/")
    await client.stream.aclose()
    assert rig.transport is not None
    with trio.fail_after(5):
        while rig.transport._socket.fileno() >= 0:  # noqa: ASYNC110  # nothing tells of it
            await trio.sleep(0.01)


async def test_w_requests_sent_at_once_are_answered_in_order(rig: Rig) -> None:
    client = await rig.connect()
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n"
    await client.stream.send_all(b"".join(request + b"%d" % number for number in range(9)))
    for number in range(9):
        assert (await client.receive("POST")).body == b"%d" % number


only_in_the_clear = pytest.mark.parametrize("rig", ["clear"], indirect=True)
only_tls = pytest.mark.parametrize("rig", ["tls"], indirect=True)


@only_in_the_clear
@pytest.mark.parametrize("limit", ["most", "most_per_address"])
async def test_x_a_connection_too_many_hears_503_until_another_ends(rig: Rig, limit: str) -> None:
    setattr(rig.settings.connections, limit, 1)
    first = await rig.connect()
    assert (await first.ask("GET", "/")).status == 200
    second = await rig.connect()
    await second.send("POST", "/", bytes(300_000))
    answer = await second.receive("POST")
    assert (answer.status, answer.json()["code"], answer.headers["retry-after"]) == (503, "unavailable", "1")
    assert answer.headers["x-noid-api-version"] == "1"
    assert await second.until_closed() == b""
    await first.stream.aclose()
    with trio.fail_after(5):
        while (await (await rig.connect()).ask("GET", "/")).status == 503:
            pass
    assert rig.settings.connections.refused >= 1


@only_in_the_clear
async def test_x_behind_a_proxy_are_many_clients(rig: Rig) -> None:
    rig.settings.connections.most_per_address = 1
    rig.settings.connections.is_proxy = lambda address: address == "127.0.0.1"
    for _ in range(3):
        assert (await (await rig.connect()).ask("GET", "/")).status == 200


@only_in_the_clear
async def test_x_ended_connections_are_not_counted(rig: Rig) -> None:
    for _ in range(20):
        stream = await trio.open_tcp_stream(*rig.address)
        await stream.aclose()
    with trio.fail_after(5):
        while rig.settings.connections.open:  # noqa: ASYNC110  # no event tells
            await trio.sleep(0.01)
    assert rig.settings.connections._from == {}


@only_tls
async def test_x_through_tls_one_too_many_is_not_worth_a_handshake(rig: Rig) -> None:
    rig.settings.connections.most = 0
    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
        await rig.stream()


@only_tls
async def test_y_a_handshake_that_does_not_come_is_cut_off(rig: Rig) -> None:
    rig.settings.ssl_handshake_timeout = 0.2
    stream = await trio.open_tcp_stream(*rig.address)
    with trio.fail_after(5):
        assert await stream.receive_some(10) == b""
    await stream.aclose()


@only_tls
async def test_y_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(rig: Rig) -> None:
    old = await rig.connect()
    rig.settings.tls, trust = certificate_of_another_authority()
    with pytest.raises(trio.BrokenResourceError):
        await rig.stream()
    rig.trust = trust
    assert (await (await rig.connect()).ask("GET", "/")).status == 200
    assert (await old.ask("GET", "/")).status == 200


@only_tls
async def test_y_what_is_spoken_is_http_1_1(rig: Rig) -> None:
    assert rig.trust is not None
    rig.trust.set_alpn_protocols(["h2", "http/1.1"])
    stream = await rig.stream()
    assert stream.selected_alpn_protocol() == "http/1.1"
    await trio.aclose_forcefully(stream)


async def test_z_a_websocket_that_reads_too_slowly_is_told_so_when_it_reads_on(rig: Rig) -> None:
    rig.settings.write_timeout_secs, rig.settings.farewell_secs = 0.2, 10.0
    client = await rig.connect()
    await client.send("GET", "/flood", headers=UPGRADE)
    last = b""
    with trio.fail_after(30):
        while True:
            await trio.sleep(0.5)  # longer than it may take
            with trio.move_on_after(0.2):
                while data := bytes(await client.stream.receive_some(1 << 20)):
                    last = last[-100:] + data
                break
    reason = b"reading too slowly"
    assert last.endswith(b"\x88" + bytes([2 + len(reason)]) + (1008).to_bytes(2, "big") + reason)
    await rig.cancelled.wait()


@pytest.mark.parametrize("known", [True, False])
async def test_who_speaks_before_its_websocket_is_accepted_harms_nobody(web: Any, log: Any, known: bool) -> None:
    head = (
        b"GET /v1/vms/web/exec HTTP/1.1\r\nHost: noid\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    for early in (b"\x81\x80\0\0\0\0", b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n"):
        client = await (web.unix() if known else web.tcp())
        heard = b""
        with trio.fail_after(10):
            if known:  # before it is answered at all; else after it was refused
                await client.stream.send_all(head + early)
            else:
                await client.stream.send_all(head)
                heard = await client.stream.receive_some()
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.stream.send_all(early)
            while received := await client.stream.receive_some():
                heard += received
        assert heard.startswith(b"HTTP/1.1 400 " if known else b"HTTP/1.1 401 ")
        assert heard.count(b"HTTP/1.1") == 1
    assert (await web.ask("GET", "/healthz")).status == 200
    assert not [line for line in log.lines if line["level"] in ("error", "critical")]
