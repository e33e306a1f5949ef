"""Who may come in, and that tenants know nothing of each other."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from trio_websocket import ConnectionRejected

from noid.errors import TooManyRequests
from noid.server import limiter
from noid.server.limiter import FailureLimiter

Server = Any  # see conftest.py
WRONG = "noid_tok_" + "0" * 64

# Becomes nobody, connects to the socket, asks who it is, and prints the answer's first line, or what failed.
AS_NOBODY = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
try:
    sock.connect(sys.argv[1])
    sock.sendall(b"GET /v1/whoami HTTP/1.1\\r\\nHost: noid\\r\\n" + sys.argv[2].encode() + b"\\r\\n")
    print(sock.recv(65536).decode().split("\\r\\n")[0].strip())
except OSError as error:
    print(type(error).__name__)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


async def as_nobody(server: Server, header: str = "") -> str:
    """Return what a process of another uid hears on the unix socket."""
    command = [sys.executable, "-c", AS_NOBODY, str(server.config.socket_path), header]
    done = await trio.run_process(command, capture_stdout=True)
    return str(done.stdout.decode().strip())


@pytest.fixture
async def tenants(server: Server) -> tuple[str, str]:
    """The tokens of alice, who has a VM ``secret``, and of bob."""
    alice, bob = await server.add_user("alice"), await server.add_user("bob")
    await server.create("secret", token=alice)
    return alice, bob


# --- the local socket ------------------------------------------------------------------------------------------------


@needs_root
async def test_l_another_user_cannot_reach_the_local_socket(server: Server) -> None:
    assert await as_nobody(server) == "PermissionError"


@needs_root
async def test_l_another_user_who_reaches_the_local_socket_needs_a_token(server: Server) -> None:
    token = await server.add_user("alice")
    path = server.config.socket_path
    path.chmod(0o666)
    for directory in list(path.parents)[:-2]:
        directory.chmod(directory.stat().st_mode | 0o011)
    assert await as_nobody(server) == "HTTP/1.1 401"
    assert await as_nobody(server, f"Authorization: Bearer {WRONG}\r\n") == "HTTP/1.1 401"
    assert await as_nobody(server, f"Authorization: Bearer {token}\r\n") == "HTTP/1.1 200"
    assert (await server.ask("GET", "/v1/whoami")).status == 200


async def test_on_the_local_socket_a_token_changes_nothing(server: Server) -> None:
    answer = await server.ask("GET", "/v1/whoami", headers={"authorization": f"Bearer {WRONG}"})
    assert answer.json()["name"].startswith("local:")


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (None, "missing or invalid Authorization header"),
        ("Bearer", "missing or invalid Authorization header"),
        ("Bearer ", "missing or invalid Authorization header"),
        ("bearer " + WRONG, "missing or invalid Authorization header"),
        ("Basic bm9pZDpub2lk", "missing or invalid Authorization header"),
        (f"Bearer {WRONG}", "invalid token"),
        ("Bearer noid_tok_", "invalid token"),
        ("Bearer \xe9\xff", "invalid token"),
        ("Bearer " + "x" * 20_000, "invalid token"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", ["/v1/vms", "/no/such/path"])
async def test_without_a_valid_token_everything_is_401(
    server: Server, header: str | None, text: str, path: str
) -> None:
    answer = await (await server.tcp()).ask("GET", path, headers={} if header is None else {"authorization": header})
    assert (answer.status, answer.json()) == (401, {"error": text, "code": "unauthenticated"})
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_of_two_authorization_headers_the_last_counts(server: Server) -> None:
    token = await server.add_user("alice")
    client = await server.tcp()
    for first, last, status in ((WRONG, token, 200), (token, WRONG, 401)):
        fields = ["GET /v1/whoami HTTP/1.1", "Host: x", *(f"Authorization: Bearer {t}" for t in (first, last)), "", ""]
        await client.stream.send_all("\r\n".join(fields).encode())
        assert (await client.receive()).status == status


async def test_a_replaced_token_is_worth_nothing_at_once(server: Server) -> None:
    old = await server.add_user("alice")
    assert (await server.ask("GET", "/v1/whoami", token=old)).json()["name"] == "alice"
    new = await server.agent.users.rotate_token("alice")
    assert (await server.refused("GET", "/v1/whoami", token=old))[:2] == (401, "unauthenticated")
    assert (await server.ask("GET", "/v1/whoami", token=new)).json()["name"] == "alice"


async def test_a_token_that_failed_too_often_is_429_and_others_are_not(server: Server) -> None:
    token = await server.add_user("alice")
    for _ in range(limiter.FAILURES_PER_TOKEN):
        assert (await server.refused("GET", "/v1/vms", token=WRONG))[0] == 401
    client = await server.tcp()
    answer = await client.ask("GET", "/v1/vms", headers={"authorization": f"Bearer {WRONG}"})
    assert (answer.status, answer.json()["code"], answer.headers["retry-after"]) == (429, "rate_limited", "60")
    assert (await server.refused("GET", "/v1/vms", token=WRONG.replace("tok_0", "tok_1")))[0] == 401
    assert (await server.ask("GET", "/v1/vms", token=token)).status == 200


async def test_an_address_that_failed_too_often_hears_429_but_a_valid_token_passes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiter, "FAILURES_PER_ADDRESS", 5)
    token = await server.add_user("alice")
    tokens = [f"noid_tok_{n:016}{0:048}" for n in range(7)]
    statuses = [(await server.refused("GET", "/v1/vms", token=wrong))[0] for wrong in tokens]
    assert statuses == [401] * 5 + [429] * 2
    assert (await server.ask("GET", "/v1/vms", token=token)).status == 200


@pytest.mark.parametrize(("server", "expected"), [({"trust_forwarded_for": True}, 401), ({}, 429)], indirect=["server"])
async def test_the_address_a_proxy_forwards_counts_only_where_it_is_trusted(server: Server, expected: int) -> None:
    for address in ("192.0.2.1", "192.0.2.2"):
        for _ in range(limiter.FAILURES_PER_TOKEN // 2 + 1):
            forwarded = {"x-forwarded-for": f"198.51.100.7, {address}"}
            status = (await server.refused("GET", "/v1/vms", token=WRONG, headers=forwarded))[0]
    assert status == expected


def test_the_limiter_remembers_a_bounded_number_of_failures() -> None:
    async def flood() -> None:
        counts = FailureLimiter()
        for number in range(limiter.FAILURE_KEYS_MAX + 500):
            counts.failed(f"address {number}", f"{number:030}")
        assert len(counts._failures) <= limiter.FAILURE_KEYS_MAX
        for _ in range(limiter.FAILURES_PER_TOKEN):
            counts.failed("late", WRONG)
        with pytest.raises(TooManyRequests):
            counts.check("late", WRONG)

    trio.run(flood)


async def test_failures_are_forgotten_after_their_window(autojump_clock: MockClock) -> None:
    counts = FailureLimiter()
    for _ in range(limiter.FAILURES_PER_TOKEN):
        counts.failed("there", WRONG)
    with pytest.raises(TooManyRequests):
        counts.check("there", WRONG)
    await trio.sleep(limiter.FAILURE_WINDOW_SECS + 1)
    counts.check("there", WRONG)
    counts.failed("there", WRONG)
    counts.check("there", WRONG)


# --- what is not yours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/vms/{}", None),
        ("DELETE", "/v1/vms/{}", None),
        ("GET", "/v1/vms/{}/checkpoints", None),
        ("POST", "/v1/vms/{}/checkpoints", None),
        ("POST", "/v1/vms/{}/exec", {"command": ["true"]}),
    ],
)
async def test_what_belongs_to_another_is_answered_as_if_it_were_not(
    server: Server, tenants: tuple[str, str], method: str, path: str, body: Any
) -> None:
    alice, bob = tenants
    foreign = await server.ask(method, path.format("secret"), body, token=bob)
    unknown = await server.ask(method, path.format("nothin"), body, token=bob)
    assert (foreign.status, foreign.body) == (404, unknown.body.replace(b"nothin", b"secret"))
    varying = {"x-request-id", "date"}
    assert {k: v for k, v in foreign.headers.items() if k not in varying} == {
        k: v for k, v in unknown.headers.items() if k not in varying
    }
    assert (await server.ask("GET", "/v1/vms/secret", token=alice)).json()["state"] == "running"


async def test_anothers_vm_has_no_exec_stream(server: Server, tenants: tuple[str, str]) -> None:
    answers = []
    for name in ("secret", "nothin"):
        with pytest.raises(ConnectionRejected) as rejected:
            async with server.exec(name, token=tenants[1]):
                pass
        assert rejected.value.status_code == 404
        answers.append((rejected.value.body or b"").replace(b"nothin", b"secret"))
    assert answers[0] == answers[1]


async def test_anothers_checkpoint_cannot_be_restored(server: Server, tenants: tuple[str, str]) -> None:
    alice, bob = tenants
    made = (await server.ask("POST", "/v1/vms/secret/checkpoints", token=alice)).json()["id"]
    await server.create("mine", token=bob)
    texts = []
    for checkpoint_id in (made, "0123456789abcdef"):
        for body in ({"checkpoint_id": checkpoint_id, "new_name": "copy"}, {"checkpoint_id": checkpoint_id}):
            status, code, text = await server.refused("POST", "/v1/vms/mine/restore", body, token=bob)
            assert (status, code) == (404, "not_found")
            texts.append(text.replace(checkpoint_id, "ID"))
    assert texts[:2] == texts[2:]
    assert [vm["name"] for vm in (await server.ask("GET", "/v1/vms", token=bob)).json()] == ["mine"]


async def test_everybody_has_names_of_their_own(server: Server, tenants: tuple[str, str]) -> None:
    alice, bob = tenants
    await server.create("secret", token=bob)
    await server.create("secret")
    ids = {(await server.ask("GET", "/v1/vms/secret", token=token)).json()["id"] for token in (alice, bob, None)}
    assert len(ids) == 3
    assert (await server.ask("DELETE", "/v1/vms/secret", token=bob)).status == 204
    assert [vm["name"] for vm in (await server.ask("GET", "/v1/vms", token=alice)).json()] == ["secret"]
    assert [vm["name"] for vm in (await server.ask("GET", "/v1/vms")).json()] == ["secret"]
    assert (await server.ask("GET", "/v1/vms", token=bob)).json() == []
