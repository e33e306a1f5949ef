"""Connections to ports of guests over WebSockets: who holds what, and what ends it; the words are in a transcript."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from noid.core.config.settings import LimitsConfig
from noid.core.guests import tunnels
from noid.core.model.connections import checked_host, checked_port
from noid.core.people.audit import entries
from noid.errors import InvalidRequest, Unsupported
from noid.testing.faults import fail, hang
from noid.testing.raw_http import open_ws
from noid.testing.simulated_exec import SERVICES, SimulatedGuestLink

Server = Any  # see conftest.py

ECHO, FLOOD = 7, 19
LEFT_SECS = 10


@contextlib.asynccontextmanager
async def port(server: Server, number: int, *, name: str = "web", token: str | None = None) -> AsyncIterator[Any]:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    stream: trio.abc.Stream
    if token is None:
        stream = await trio.open_unix_socket(str(server.config.socket_path))
    else:
        stream = (await server.tcp()).stream
    async with open_ws(stream, f"/v1/vms/{name}/ports/{number}", headers) as ws:
        yield ws


async def refused(server: Server, number: int, **who: Any) -> tuple[int, bytes]:
    with pytest.raises(ConnectionRejected) as rejected:
        async with port(server, number, **who):
            pass
    return rejected.value.status_code, rejected.value.body or b""


async def nobody_is_connected(server: Server) -> None:
    with trio.fail_after(LEFT_SECS):
        while server.agent.guests.tunnels.open:  # noqa: ASYNC110  # what is awaited is the figure
            await trio.sleep(0.01)


async def last_words(ws: WebSocketConnection) -> tuple[str, int]:
    last: Any = ""

    async def read() -> None:
        nonlocal last
        while True:
            last = await ws.get_message()

    with trio.fail_after(LEFT_SECS), pytest.raises(ConnectionClosed) as closed:
        await read()
    reason: Any = closed.value.reason
    return last, reason.code


async def test_a_large_message_comes_back_whole_and_both_ends_close_it(web: Server) -> None:
    sent = bytes(range(256)) * 2000
    async with port(web, ECHO) as ws:
        await ws.send_message(sent)
        await ws.send_message(b"")
        received = b""
        while data := await ws.get_message():
            received += data
        assert received == sent
        assert (await last_words(ws))[1] == 1000
    await nobody_is_connected(web)


@pytest.mark.parametrize("server", [{"limits": LimitsConfig(max_tunnels_per_user=2)}], indirect=True)
async def test_a_user_has_so_many_and_the_next_is_told_when_to_come_back(web: Server) -> None:
    token = await web.add_user("alice")
    await web.create(token=token)
    async with port(web, ECHO, token=token), port(web, ECHO, token=token):
        status, body = await refused(web, ECHO, token=token)
        assert status == 429
        assert b"you have 2 connections to ports" in body
        async with port(web, ECHO):  # the local user's own
            assert web.agent.guests.tunnels.open == 3
    await nobody_is_connected(web)
    async with port(web, ECHO, token=token):
        pass


async def test_a_vm_has_so_many(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "PER_VM_MAX", 1)
    await web.create("other")
    async with port(web, ECHO), port(web, ECHO, name="other"):
        assert (await refused(web, ECHO))[0] == 429


@pytest.mark.parametrize("server", [{"max_ws_sessions": 1}], indirect=True)
async def test_they_take_no_place_of_other_websockets(web: Server) -> None:
    async with port(web, ECHO), port(web, ECHO), web.exec() as exec_:
        await exec_.ask("cat", stdin=True)
        await exec_.feed(b"still")
        await exec_.until(b"still")


async def test_a_client_that_leaves_ends_what_it_was_connected_to(web: Server) -> None:
    async with port(web, FLOOD) as ws:
        assert await ws.get_message()
    await nobody_is_connected(web)
    async with web.agent.guests.reach(web.agent.local_user(), "web") as guest:
        assert await guest.processes() == []


async def test_a_client_that_vanishes_while_nothing_is_read_is_noticed(web: Server) -> None:
    stream = await trio.open_unix_socket(str(web.config.socket_path))
    async with open_ws(stream, f"/v1/vms/web/ports/{FLOOD}", {}) as ws:
        assert await ws.get_message()
        await stream.aclose()
    await nobody_is_connected(web)


async def test_they_are_no_processes_and_count_as_none(web: Server) -> None:
    async with port(web, ECHO):
        assert (await web.ask("GET", "/v1/vms/web/processes")).json() == []
        assert (await web.ask("GET", "/v1/quota")).json()["use"]["exec_sessions"] == 0
        assert (await web.ask("GET", "/v1/vms/web/logs")).json()[0]["name"] == "console"
        assert len((await web.ask("GET", "/v1/vms/web/logs")).json()) == 1


async def test_a_stop_and_a_restore_in_place_end_them_and_a_copy_has_none(web: Server) -> None:
    async with port(web, ECHO) as ws:
        await ws.send_message(b"before")
        assert await ws.get_message() == b"before"
        taken = (await web.ask("POST", "/v1/vms/web/checkpoints")).json()["id"]
        await ws.send_message(b"and after a checkpoint")
        assert await ws.get_message() == b"and after a checkpoint"
        copy = await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": taken, "new_name": "copy"})
        assert copy.status == 200, copy.body
        await ws.send_message(b"and beside a copy")
        assert await ws.get_message() == b"and beside a copy"
        assert (await web.ask("POST", "/v1/vms/web/restore", {"checkpoint_id": taken})).status == 200
        text, code = await last_words(ws)
        assert code == 1000
        assert '"code":"unavailable"' in text
    async with port(web, ECHO) as ws:
        await ws.send_message(b"anew")
        assert await ws.get_message() == b"anew"
        assert (await web.ask("POST", "/v1/vms/web/stop", {"force": True})).status == 200
        assert '"code":"unavailable"' in (await last_words(ws))[0]
    await nobody_is_connected(web)
    assert (await refused(web, ECHO))[0] == 409


async def test_a_connection_is_in_the_audit_log_with_its_port(web: Server) -> None:
    async with port(web, ECHO):
        pass
    await refused(web, 80)
    rows = [(row.action, row.target, row.status) for row in entries(web.agent.services.store) if "ports" in row.action]
    assert rows == [
        ("WS /v1/vms/<name>/ports/<port>", "web/7", 101),
        ("WS /v1/vms/<name>/ports/<port>", "web/80", 502),
    ]


async def test_where_nothing_answers_somebody_says_so(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "CONNECT_SECS", 0.2)
    web.faults.arm("connect_port", hang)
    status, body = await refused(web, ECHO)
    assert status == 504
    assert b"nothing answered at localhost:7 of the guest within 0.2 s" in body
    await nobody_is_connected(web)


async def test_a_guest_that_cannot_is_501_in_one_line(web: Server) -> None:
    web.faults.arm("connect_port", fail(Unsupported("serial", "connect to localhost:7 of a guest")))
    status, body = await refused(web, ECHO)
    assert status == 501
    assert b"Backend 'serial' cannot connect to localhost:7 of a guest." in body


async def test_what_is_no_port_or_address_is_refused(web: Server) -> None:
    for text in ("0", "65536", "1e3", "-1", "080", "", "8" * 5000):
        with pytest.raises(InvalidRequest):
            checked_port(text)
    for text in ("", "example.com", "1.2.3", "1.2.3.4:5", "::1%lo; rm", "[::1", "\0"):
        with pytest.raises(InvalidRequest):
            assert checked_host(text) is None
    assert [checked_host(text) for text in ("::1", "[::1]", "127.0.0.1", "localhost")] == [
        "::1", "::1", "127.0.0.1", "localhost",
    ]  # fmt: skip


def test_the_simulated_guest_says_that_it_can() -> None:
    assert "ports" in SimulatedGuestLink.features
    assert {ECHO, FLOOD} < SERVICES.keys()
