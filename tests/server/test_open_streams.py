"""What a client holds open ends with the token it was opened with, and with nothing else of that user's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from noid.core.model.times import now
from noid.core.model.users import TOKEN_SCOPES
from noid.errors import DependencyDown
from noid.server import open_streams
from noid.testing.raw_http import RawClient, open_ws

Server = Any  # see conftest.py

WEBSOCKETS = ("/v1/vms/web/console", "/v1/vms/web/exec", "/v1/vms/web/logs/console?follow", "/v1/vms/web/ports/7")
STREAMS = ("/v1/events", "/v1/vms/web/logs/console?follow")


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are asked for again all the time."""
    monkeypatch.setattr(open_streams, "RECHECK_SECS", 0.05)


@contextlib.asynccontextmanager
async def opened(server: Server, path: str, token: str) -> AsyncIterator[WebSocketConnection]:
    async with open_ws((await server.tcp()).stream, path, {"authorization": f"Bearer {token}"}) as ws:
        if "exec" in path:
            await ws.send_message(json.dumps({"command": ["cat"], "stdin": True}))
            await ws.get_message()
        yield ws


async def ended(ws: WebSocketConnection) -> tuple[str, int, str]:
    """Return the code of the last words, and the close code and reason."""
    last = ""

    async def read() -> None:
        nonlocal last
        while True:
            message = await ws.get_message()
            last = message if isinstance(message, str) else last

    with trio.fail_after(10), pytest.raises(ConnectionClosed) as closed:
        await read()
    reason: Any = closed.value.reason
    return json.loads(last)["code"], reason.code, reason.reason


async def following(server: Server, path: str, token: str) -> RawClient:
    client: RawClient = await server.tcp()
    await client.send("GET", path, headers={"authorization": f"Bearer {token}"})
    head = b""
    while b"\r\n\r\n" not in head:
        head += await client.stream.receive_some()
    assert head.startswith(b"HTTP/1.1 200")
    return client


async def short_lived(server: Server, secs: float) -> str:
    """Add a user with a VM ``web``, and return a token that ends in a moment."""
    await server.create(token=await server.add_user("alice"))
    alice = server.agent.users.named("alice")
    end = now() + timedelta(seconds=secs)
    return str((await server.agent.users.create_token(alice, "short", TOKEN_SCOPES, end))[0])


@pytest.mark.parametrize("path", WEBSOCKETS)
async def test_a_websocket_ends_with_its_token(server: Server, path: str) -> None:
    token = await short_lived(server, 0.7)
    async with opened(server, path, token) as ws:
        assert await ended(ws) == ("unauthenticated", 1008, "the token is no longer valid")


async def test_streams_end_with_their_token_and_a_log_is_not_said_to_be_whole(server: Server) -> None:
    token = await short_lived(server, 0.7)
    events, log = [await following(server, path, token) for path in STREAMS]
    with trio.fail_after(10):
        assert (await events.until_closed()).endswith(b"0\r\n\r\n")
        assert not (await log.until_closed()).endswith(b"0\r\n\r\n")


async def test_what_was_opened_with_a_revoked_token_ends_and_what_another_holds_open_stays(
    often: None, server: Server
) -> None:
    kept = await server.add_user("alice")
    await server.create(token=kept)
    alice = server.agent.users.named("alice")
    revoked, _ = await server.agent.users.create_token(alice, "revoked")
    async with contextlib.AsyncExitStack() as stack:
        going = [await stack.enter_async_context(opened(server, path, revoked)) for path in WEBSOCKETS]
        staying = await stack.enter_async_context(server.exec(token=kept))
        await staying.ask("cat", stdin=True)
        events = await following(server, "/v1/events", revoked)
        await trio.sleep(0.2)  # some checks find nothing
        await server.agent.users.revoke_token(alice, "revoked")
        for ws in going:
            assert await ended(ws) == ("unauthenticated", 1008, "the token is no longer valid")
        with trio.fail_after(10):
            assert (await events.until_closed()).endswith(b"0\r\n\r\n")
        await staying.feed(b"still here")
        await staying.until(b"still here")


async def test_a_database_that_cannot_be_asked_ends_nothing(
    often: None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await server.add_user("alice")
    await server.create(token=token)
    asked = trio.Event()

    def fail(*_: object) -> None:
        asked.set()
        raise DependencyDown("another process holds the token database")

    async with server.exec(token=token) as exec_:
        await exec_.ask("cat", stdin=True)
        monkeypatch.setattr(type(server.agent.users), "authenticate", fail)
        with trio.fail_after(10):
            await asked.wait()
        await exec_.feed(b"still here")
        await exec_.until(b"still here")
