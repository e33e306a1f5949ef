"""The audit log: what is in it, what is not, and that nobody rewrites it."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest
import trio

from noid.core.database.store import Store
from noid.core.model.times import now
from noid.core.model.users import Scope
from noid.core.people import audit
from noid.core.people.audit import AuditEntry, AuditLog, entries

Server = Any  # see conftest.py
WRONG = "noid_tok_" + "0" * 64


def told(server: Server) -> list[tuple[str | None, str, str, int | None]]:
    """Return who did what to what, with what status."""
    return [(entry.user, entry.action, entry.target, entry.status) for entry in entries(store_of(server))]


def store_of(server: Server) -> Store:
    return server.agent.services.store  # type: ignore[no-any-return]  # `Server` is Any here


async def test_whoever_changes_something_is_in_the_log_and_who_looks_is_not(server: Server) -> None:
    token = await server.add_user("alice")
    await server.create("web", token=token)
    await server.ask("GET", "/v1/vms", token=token)
    await server.ask("POST", "/v1/vms/web/exec", {"command": ["echo", "hush"], "env": ["SECRET=hush"]}, token=token)
    await server.refused("DELETE", "/v1/vms/nothing", token=token)
    await server.ask("POST", "/v1/tokens", {"name": "ci"})
    local = server.agent.local_user().name
    assert told(server) == [
        ("alice", "POST /v1/vms", "web", 201),
        ("alice", "POST /v1/vms/<name>/exec", "web", 200),
        ("alice", "DELETE /v1/vms/<name>", "nothing", 404),
        (local, "POST /v1/tokens", "ci", 201),
    ]
    first, *_, last = entries(store_of(server))
    assert (first.token, first.address, first.count) == ("default", "127.0.0.1", 1)
    assert (last.token, last.address) == (None, "local")
    text = json.dumps([str(entry) for entry in entries(store_of(server))])
    assert "hush" not in text
    assert "noid_tok_" not in text


async def test_a_websocket_is_in_the_log_from_its_upgrade_on_or_with_its_refusal(web: Server) -> None:
    async with web.exec("web") as session:
        await session.ask("cat", stdin=True)
        await session.feed(b"x")
        await session.until(b"x")
        assert told(web)[1:] == [(web.agent.local_user().name, "WS /v1/vms/<name>/exec", "web", 101)]
        await session.feed(b"")
        await session.result()
    with pytest.raises(Exception, match="404"):
        async with web.exec("nothing"):
            pass
    assert told(web)[2:] == [(web.agent.local_user().name, "WS /v1/vms/<name>/exec", "nothing", 404)]


async def test_nothing_happens_on_a_websocket_before_its_row_is_written(
    web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, may_write, record = trio.Event(), trio.Event(), AuditLog.record

    async def wait_and_record(log: AuditLog, entry: AuditEntry) -> None:
        writing.set()
        await may_write.wait()
        await record(log, entry)

    monkeypatch.setattr(AuditLog, "record", wait_and_record)
    async with web.exec("web") as session:
        await session.ask("echo", "hello")
        with trio.fail_after(10):
            await writing.wait()
        for _ in range(20):  # each a whole request: the command would have been started by now
            assert (await web.ask("GET", "/v1/vms/web/processes")).json() == []
        may_write.set()
        with trio.fail_after(10):
            await session.until(b"hello\n")


async def test_a_call_whose_client_has_left_is_in_the_log_without_a_status(server: Server) -> None:
    await server.create("web")
    client = await server.unix()
    body = b'{"command":["sleep","60"]}'
    head = b"POST /v1/vms/web/exec HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    await client.stream.send_all(head + body)
    while not (await server.ask("GET", "/v1/vms/web/processes")).json():
        pass
    await client.stream.aclose()
    with trio.fail_after(10):
        while len(told(server)) < 2:  # noqa: ASYNC110  # the server tells nobody that it has noticed
            await trio.sleep(0.01)
    assert told(server)[1][1:] == ("POST /v1/vms/<name>/exec", "web", None)


async def test_who_is_not_let_in_is_one_row_and_a_count(server: Server) -> None:
    for _ in range(5):
        await server.refused("GET", "/v1/vms", token=WRONG)
    assert told(server) == [(None, "authenticate", "", 401)]
    await server.agent.audit.flush()
    await server.agent.audit.flush()
    assert [(entry.status, entry.count) for entry in entries(store_of(server))] == [(401, 1), (401, 4)]


async def test_a_missing_scope_is_in_the_log_also_of_who_only_looks(server: Server) -> None:
    await server.add_user("alice")
    token, _ = await server.agent.users.create_token(server.agent.users.named("alice"), "less", frozenset({Scope.EXEC}))
    await server.refused("GET", "/v1/vms", token=token)
    await server.refused("DELETE", "/v1/vms/web", token=token)
    assert told(server) == [("alice", "GET /v1/vms", "", 403), ("alice", "DELETE /v1/vms/<name>", "web", 403)]
    assert [entry.token for entry in entries(store_of(server))] == ["less"] * 2


async def test_a_token_that_somebody_takes_for_its_name_is_in_no_log(server: Server) -> None:
    token = await server.add_user("alice")
    await server.refused("DELETE", f"/v1/tokens/{token}", token=token)
    await server.refused("POST", "/v1/tokens", {"name": token}, token=token)
    assert [target for _, _, target, _ in told(server)] == ["noid_tok_[hidden]"] * 2


async def test_a_flood_of_refusals_from_everywhere_is_a_bounded_number_of_rows(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "REFUSALS_MAX", 10)
    log = AuditLog(store_of(server))
    for number in range(100):
        await log.record(AuditEntry(at=now(), address=f"192.0.2.{number}", action="authenticate", status=401))
    await log.flush()
    found = entries(store_of(server))
    assert len(found) == 12
    assert sum(entry.count for entry in found) == 100
    assert (found[-1].address, found[-1].count) == ("(many)", 89)


async def test_the_database_refuses_to_change_or_lose_a_row(server: Server) -> None:
    await server.create("web")
    connection = sqlite3.connect(server.config.database)
    for statement in ("DELETE FROM audit", "UPDATE audit SET user = 'bob'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()
    assert len(told(server)) == 1
