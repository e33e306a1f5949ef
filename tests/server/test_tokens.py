"""Tokens over HTTP: what each allows, who may make which, and how they end. Also as an admin types it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionRejected

from noid.core.model.times import now
from noid.core.model.users import Scope

Server = Any  # see conftest.py


async def token_of(server: Server, name: str = "less", *scopes: Scope, **more: Any) -> str:
    """Return a new token of alice, who is added if she is not there."""
    if all(user.name != "alice" for user in server.agent.users.list()):
        await server.add_user("alice")
    made, _ = await server.agent.users.create_token(server.agent.users.named("alice"), name, frozenset(scopes), **more)
    return str(made)


async def test_a_token_of_before_there_were_scopes_may_do_everything_but_administer(server: Server) -> None:
    who = (await server.ask("GET", "/v1/whoami", token=await server.add_user("alice"))).json()
    assert (who["name"], who["token"], who["scopes"]) == ("alice", "default", ["read", "exec", "manage"])
    local = (await server.ask("GET", "/v1/whoami")).json()
    assert (local["token"], local["scopes"]) == (None, ["read", "exec", "manage", "admin"])


async def test_tokens_come_in_pages_that_hold_each_once_whatever_goes_meanwhile(server: Server) -> None:
    token = await server.add_user("alice")
    for name in ("b", "a", "c"):
        await token_of(server, name, Scope.READ)
    seen, step = [], "/v1/tokens?limit=1"
    while step:
        page = await server.ask("GET", step, token=token)
        seen += [each["name"] for each in page.json()]
        await server.ask("DELETE", "/v1/tokens/b", token=token)
        step = page.headers.get("link", "").partition(">")[0].lstrip("<")
    assert seen == ["default", "a", "c"]


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [(Scope.READ, {"GET /v1/vms"}), (Scope.EXEC, {"POST /v1/vms/web/exec"}), (Scope.MANAGE, {"POST /v1/vms"})],
)
async def test_a_token_allows_its_scopes_and_no_other(server: Server, scope: Scope, allowed: set[str]) -> None:
    token = await token_of(server, "less", scope)
    needs = {"GET /v1/vms": "read", "POST /v1/vms/web/exec": "exec", "POST /v1/vms": "manage"}
    for route, needed in needs.items():
        method, path = route.split()
        answer = await server.ask(method, path, {} if method == "POST" else None, token=token)
        refusal = answer.json() if answer.status == 403 else {}
        assert (answer.status != 403) == (route in allowed), route
        if refusal:
            assert refusal["code"] == "scope"
            assert f"needs the scope '{needed}', " in refusal["error"]
            assert "'less'" in refusal["error"]


async def test_a_websocket_too_is_refused_before_its_upgrade_without_the_scope(server: Server) -> None:
    token = await token_of(server, "less", Scope.READ)
    with pytest.raises(ConnectionRejected) as rejected:
        async with server.exec("web", token=token):
            pass
    assert rejected.value.status_code == 403


async def test_whether_a_thing_exists_is_not_told_to_who_lacks_the_scope(server: Server) -> None:
    token = await token_of(server, "less", Scope.EXEC)
    await server.create("web", token=await token_of(server, "all", Scope.MANAGE))
    answers = [await server.refused("DELETE", f"/v1/vms/{name}", token=token) for name in ("web", "nothing")]
    assert answers[0] == answers[1]
    assert answers[0][0] == 403


async def test_an_expired_token_is_401(server: Server) -> None:
    token = await token_of(server, "old", Scope.READ, expires_at=now() - timedelta(seconds=1))
    assert (await server.refused("GET", "/v1/vms", token=token))[:2] == (401, "unauthenticated")


async def test_users_make_list_and_revoke_their_own_tokens(server: Server) -> None:
    alice, bob = await server.add_user("alice"), await server.add_user("bob")
    fields = {"name": "ci", "scopes": ["exec", "read"], "expires_in_secs": 3600}
    answer = await server.ask("POST", "/v1/tokens", fields, token=alice)
    assert answer.status == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    secret = made.pop("token")
    assert re.fullmatch(r"noid_tok_[0-9a-f]{64}", secret)
    assert (made["name"], made["scopes"], made["last_used_at"]) == ("ci", ["read", "exec"], None)
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    assert (await server.ask("GET", "/v1/whoami", token=secret)).json()["token"] == "ci"

    listed = await server.ask("GET", "/v1/tokens", token=alice)
    assert [info["name"] for info in listed.json()] == ["default", "ci"]
    assert listed.json()[1]["last_used_at"] is not None
    assert b"noid_tok_" not in listed.body
    assert [info["name"] for info in (await server.ask("GET", "/v1/tokens", token=bob)).json()] == ["default"]
    assert (await server.refused("DELETE", "/v1/tokens/ci", token=bob))[0] == 404

    assert (await server.refused("POST", "/v1/tokens", fields, token=alice))[:2] == (409, "conflict")
    assert (await server.ask("DELETE", "/v1/tokens/ci", token=alice)).status == 204
    assert (await server.refused("GET", "/v1/whoami", token=secret))[0] == 401
    assert (await server.refused("DELETE", "/v1/tokens/ci", token=alice))[:2] == (404, "not_found")


async def test_a_token_makes_none_that_may_do_more_or_lives_longer(server: Server) -> None:
    end = now() + timedelta(hours=1)
    token = await token_of(server, "less", Scope.MANAGE, Scope.READ, expires_at=end)
    more = {"name": "more", "scopes": ["manage", "exec"]}
    status, code, text = await server.refused("POST", "/v1/tokens", more, token=token)
    assert (status, code, "'exec'" in text) == (403, "scope", True)
    for name, wanted in (("same", {}), ("longer", {"expires_in_secs": 86400})):
        made = (await server.ask("POST", "/v1/tokens", {"name": name, **wanted}, token=token)).json()
        assert (made["scopes"], datetime.fromisoformat(made["expires_at"])) == (["read", "manage"], end)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "a b"},
        {"name": "x", "scopes": []},
        {"name": "x", "scopes": "read"},
        {"name": "x", "scopes": ["admin"]},
        {"name": "x", "scopes": [{}]},
        {"name": "x", "expires_in_secs": 0},
        {"name": "x", "expires_in_secs": -1},
        {"name": "x", "expires_in_secs": 1e17},
        {"name": "x", "expires_in_secs": "1h"},
    ],
    ids=str,
)
async def test_a_token_that_cannot_be_is_400(server: Server, body: dict[str, Any]) -> None:
    assert (await server.refused("POST", "/v1/tokens", body))[:2] == (400, "invalid")


async def test_the_local_user_may_have_tokens_too_but_none_that_administers(server: Server) -> None:
    token = (await server.ask("POST", "/v1/tokens", {"name": "remote"})).json()["token"]
    who = (await server.ask("GET", "/v1/whoami", token=token)).json()
    assert who["name"].startswith("local:")
    assert who["scopes"] == ["read", "exec", "manage"]


async def test_there_is_an_end_to_how_many_tokens_a_user_has(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noid.core.people.users.TOKENS_MAX", 2)
    statuses = [(await server.ask("POST", "/v1/tokens", {"name": name})).status for name in ("a", "b", "c")]
    assert statuses == [201, 201, 409]


async def test_who_began_to_ask_before_the_tokens_were_rotated_gets_none(server: Server) -> None:
    stolen = await server.add_user("alice")
    client, body = await server.tcp(), b'{"name":"heir"}'
    head = f"Host: noid\r\nAuthorization: Bearer {stolen}\r\nContent-Length: {len(body)}\r\n\r\n"
    await client.stream.send_all(b"POST /v1/tokens HTTP/1.1\r\n" + head.encode() + body[:-1])
    users = server.agent.users
    with trio.fail_after(10):  # until the guard has let it in
        while (await users.tokens(users.named("alice")))[0].last_used_at is None:  # noqa: ASYNC110
            await trio.sleep(0.01)
    await users.rotate_token("alice")
    await client.stream.send_all(body[-1:])
    answer = await client.receive("POST")
    assert (answer.status, answer.json()["code"]) == (401, "unauthenticated")
    assert [info.name for info in await users.tokens(users.named("alice"))] == ["default"]
