"""Connections that are lost, calls nobody waits for any more, and what comes between: nothing lost, twice or left."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import noid
from noid.client import http
from noid.client.settings import Endpoint
from noid.client.waiting import Blocking, finished
from noid.testing.between import Between, between

HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 22\r\n\r\n<html>Log in</html>\r\n\r\n"
VERSION = b'HTTP/1.1 200 OK\r\nContent-Length: 36\r\n\r\n{"version":"0.2.31","api_version":1}'


@pytest.fixture
def proxy(server: Any) -> Iterator[Between]:
    with between(server.socket) as it:
        yield it


@pytest.fixture
def far(connect: Callable[..., Any], client: Any, proxy: Between) -> Any:
    """A client whose connections go through the proxy; what it makes is gone afterwards."""
    return connect(proxy.url, token="any")


async def test_a_command_goes_on_where_its_server_was_killed(server: Any, vm: Any) -> None:
    data = b"".join(b"%07d\n" % number for number in range(150_000))
    received = b""
    async with vm.exec(["cat"], stdin=True) as process:
        sent = 0
        while sent < len(data):
            if sent == 500_000:
                server.kill()
                server.start()
            await process.send(data[sent : sent + 50_000])
            sent += 50_000
            received += (await anext(process))[1]
        await process.close_input()
        done = await process.wait()
    assert received + done.stdout == data
    assert (done.exit_code, done.missing) == (0, 0)


async def test_a_change_whose_answer_was_lost_is_asked_for_again_and_made_once(far: Any, proxy: Between) -> None:
    proxy.loses = 1
    vm = await far.create("web", mem_mib=128)
    assert proxy.requests == ["POST /v1/vms", "GET /version", "POST /v1/vms"]
    assert [each.name for each in await far.vms()] == ["web"]
    proxy.loses = 1
    await vm.destroy()
    assert await far.vms() == []


async def test_a_second_loss_is_an_error(far: Any, proxy: Between) -> None:
    proxy.answer = lambda request: b"" if request.startswith("POST") else None
    with pytest.raises(noid.ConnectionLost, match="no answer: it closed the connection"):
        await far.create("web", mem_mib=128)
    assert len(proxy.requests) == 3


async def test_an_old_server_is_not_asked_twice_for_a_change(far: Any, proxy: Between) -> None:
    proxy.answer = lambda request: VERSION if request == "GET /version" else b""
    with pytest.raises(noid.ConnectionLost):
        await far.create("web", mem_mib=128)
    assert proxy.requests == ["POST /v1/vms", "GET /version"]


async def test_events_go_on_behind_the_last_one(far: Any, client: Any, server: Any, proxy: Between) -> None:
    async with far.events(kinds=["vm.create"]) as events:
        vm = await client.create("one", mem_mib=128)
        assert (await anext(events)).vm == "one"
        proxy.loses = 1  # it is noticed with the next event, which is lost with it
        await vm.destroy()
        await client.create("two", mem_mib=128)
        with trio.fail_after(20):
            assert (await anext(events)).vm == "two"
    assert proxy.requests == ["GET /v1/events?kind=vm.create"] * 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (HTML, "answered something noid-server would not. Is the URL right"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "answered something noid-server would not"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[", "half an answer"),
        (b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n", "it points to /login"),
        (b"no HTTP at all\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX-Noid-Api-Version: 2\r\nContent-Length: 2\r\n\r\n{}", "speaks version '2'"),
    ],
)
async def test_an_answer_that_is_none_is_an_error(far: Any, proxy: Between, answer: bytes, why: str) -> None:
    proxy.answer = lambda _: answer
    with pytest.raises(noid.NoidError, match=why):
        await far.whoami()


@pytest.mark.parametrize(
    "answer",
    [HTML, b"HTTP/1.1 101 \r\nUpgrade: websocket\r\nSec-WebSocket-Accept: something\r\n\r\n"],
    ids=["a web page", "another key"],
)
async def test_a_stream_that_is_none_is_an_error(far: Any, client: Any, proxy: Between, answer: bytes) -> None:
    await client.create("web", mem_mib=128)
    vm = await far.vm("web")
    proxy.answer = lambda _: answer
    with pytest.raises(noid.ConnectionFailed):
        await vm.run(["true"])
    with pytest.raises(noid.ConnectionFailed):
        async with vm.logs():
            pass


async def test_it_speaks_tls_in_both_directions(
    connect: Callable[..., Any], client: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with between(server.socket, context) as proxy:
        with pytest.raises(noid.ConnectionFailed, match="SSL_CERT_FILE"):
            await connect(proxy.url, token="any").whoami()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        far = connect(proxy.url, token="any")
        vm = await far.create("web", mem_mib=128)
        data = bytes(range(256)) * 3000
        assert (await vm.run(["cat"], input=data)).stdout == data
        with pytest.raises(noid.ServerError, match="cannot copy files"):  # said before all of it was sent
            await vm.write_file("/root/data", data)


@pytest.mark.parametrize("secret", [False, True], ids=["plain", "TLS"])
async def test_an_answer_that_came_before_the_server_hung_up_is_told_although_sending_failed(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: bool
) -> None:
    context = None
    if secret:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with between(server.socket, context) as proxy:
        proxy.answer = lambda _: b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"

        def content() -> Iterator[bytes]:
            proxy.wait_until(lambda: proxy.hung_up == 1)
            while True:
                yield bytes(100_000)

        def put() -> int:
            endpoint = Endpoint(url=proxy.url, token="any")
            sending = http.exchange(endpoint, Blocking(), "PUT", "/", {"Transfer-Encoding": "chunked"}, content())
            with contextlib.closing(finished(sending)) as answer:
                return answer.status

        with trio.fail_after(20):
            assert await trio.to_thread.run_sync(put) == 413


# --- cancellation: trio's alone -------------------------------------------------------------------------------------


@pytest.fixture
async def web(server: Any) -> Any:
    """A VM by the asynchronous face."""
    client = noid.Client(socket=server.socket)
    vm = await client.create("cancelled", mem_mib=128)
    yield vm
    for each in await client.vms():
        await each.destroy()


async def test_a_cancelled_call_hangs_up(web: Any, proxy: Between) -> None:
    far = noid.Client(proxy.url, token="any")
    with trio.move_on_after(0.2) as scope:
        await far.request("GET", "/v1/vms/cancelled?after=1000000&wait=300")
    assert scope.cancelled_caught
    await trio.to_thread.run_sync(proxy.wait_until, lambda: proxy.ended == 1)


async def test_a_cancelled_command_ends_in_the_guest(web: Any) -> None:
    with trio.move_on_after(0.5) as scope:
        await web.run(["sleep", "1000"])
    assert scope.cancelled_caught
    with trio.fail_after(10):
        while any(each.info["state"] == "running" for each in await web.processes()):
            pass


async def test_a_cancelled_temporary_vm_is_not_there_whenever_that_was(server: Any, web: Any) -> None:
    client = noid.Client(socket=server.socket)
    for secs in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08):
        with trio.move_on_after(secs):
            async with client.temporary(mem_mib=128):
                await trio.sleep_forever()
        assert [each.name for each in await client.vms()] == ["cancelled"]


async def test_a_cancelled_fork_leaves_nothing(server: Any, web: Any) -> None:
    client = noid.Client(socket=server.socket)
    with trio.move_on_after(0.15) as scope:
        await web.fork(50)
    assert scope.cancelled_caught
    assert await client.checkpoints() == []
    assert [each.name for each in await client.vms()] == ["cancelled"]


async def test_what_somebody_else_made_is_not_unmade(web: Any, proxy: Between) -> None:
    """Cut off before its server has said that there is one of that name."""
    far = noid.Client(proxy.url, token="any")
    silent = threading.Event()

    def answer(_: str) -> bytes | None:
        return None if silent.is_set() else b"" * silent.wait(10)

    proxy.answer = answer
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.temporary(name="cancelled", mem_mib=128).__aenter__)
        await trio.to_thread.run_sync(proxy.wait_until, lambda: len(proxy.requests) == 1)
        silent.set()
        nursery.cancel_scope.cancel()
    assert proxy.requests[:2] == ["POST /v1/vms"] * 2
    assert (await web.refresh())["state"] == "running"


async def test_a_cancelled_copy_ends_its_thread(tmp_path: Path) -> None:
    """Its server takes no more of it, so that it would wait for ever."""
    (tmp_path / "large").write_bytes(bytes(32 << 20))
    path = tmp_path / "agent.sock"
    look = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"kind":"missing"}'
    began = trio.Event()
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()

        async def serve() -> None:
            asked, _ = await listener.accept()
            with asked:
                await asked.recv(65536)
                await asked.send(look)
            deaf, _ = await listener.accept()
            with deaf:
                await deaf.recv(1)
                began.set()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            vm = noid.Vm(noid.Client(socket=path)._link, {"name": "web"})  # type: ignore[typeddict-item]
            with trio.fail_after(20), trio.CancelScope() as scope:

                async def cancel_once_it_stands_still() -> None:
                    await began.wait()
                    scope.cancel()

                nursery.start_soon(cancel_once_it_stands_still)
                await vm.copy_in(tmp_path / "large", "/root/large")
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()


async def test_one_task_sends_while_another_reads(web: Any) -> None:
    data = b"".join(b"%07d\n" % number for number in range(200_000))
    received = bytearray()
    async with web.exec(["cat"], stdin=True) as process, trio.open_nursery() as nursery:

        async def send() -> None:
            await process.send(data)
            await process.close_input()

        nursery.start_soon(send)
        async for _, part in process:
            received += part
    assert received == data
