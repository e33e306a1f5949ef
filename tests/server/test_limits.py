"""What clients may use of a server: requests, WebSockets, bodies, headers, output; and where they come from."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock
from trio_websocket import ConnectionRejected

from noid.core.config.reading import load_config
from noid.core.config.settings import Config, LimitsConfig
from noid.core.people.networks import place
from noid.errors import ConfigError, TooManyRequests
from noid.server import limiter
from noid.server.hardening.admission import Connections
from noid.server.limiter import RequestLimiter
from noid.server.origins import Origins

Server = Any  # see conftest.py
Log = Any


def limited(**limits: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", [{"limits": LimitsConfig(**limits)}], indirect=True)


# --- requests --------------------------------------------------------------------------------------------------------


async def test_requests_pass_at_their_rate_and_some_at_once_after_a_pause(autojump_clock: MockClock) -> None:
    requests = RequestLimiter()

    def passed() -> int:
        count = 0
        with contextlib.suppress(TooManyRequests):
            while True:
                requests.pass_one("alice", per_second=2, burst=5)
                count += 1
        return count

    assert passed() == 5
    await trio.sleep(1)
    assert passed() == 2
    await trio.sleep(3600)
    assert passed() == 5
    with pytest.raises(TooManyRequests) as refused:
        requests.pass_one("alice", per_second=2, burst=5)
    assert refused.value.retry_after_secs == 0.5
    requests.pass_one("bob", per_second=2, burst=5)
    requests.pass_one("alice", per_second=0, burst=5)


async def test_the_rates_of_a_bounded_number_of_users_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "REQUEST_KEYS_MAX", 10)
    requests = RequestLimiter()
    for number in range(50):
        requests.pass_one(f"user-{number}", per_second=1, burst=1)
    assert len(requests._users) == 10


@limited(requests_per_second=0.1, requests_burst=2)
async def test_a_token_that_is_too_fast_is_429_and_says_when_to_come_again(server: Server) -> None:
    token, other = await server.add_user("alice"), await server.add_user("bob")
    for _ in range(2):
        assert (await server.ask("GET", "/v1/whoami", token=token)).status == 200
    answer = await server.ask("GET", "/v1/whoami", token=token)
    assert (answer.status, answer.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 10
    assert (await server.ask("GET", "/v1/whoami", token=other)).status == 200
    assert (await server.ask("GET", "/healthz", token=token)).status == 200
    for _ in range(4):
        assert (await server.ask("GET", "/v1/whoami")).status == 200


@limited(requests_per_second=0.1, requests_burst=4)
async def test_who_makes_more_tokens_may_not_make_more_requests(server: Server) -> None:
    tokens = [await server.add_user("alice")]
    for name in ("more", "and-more"):
        made = await server.ask("POST", "/v1/tokens", {"name": name}, token=tokens[-1])
        tokens.append(made.json()["token"])
        assert (await server.ask("GET", "/v1/whoami", token=tokens[-1])).status == 200
    for token in tokens:
        assert (await server.ask("GET", "/v1/whoami", token=token)).status == 429


@limited(requests_per_second=0.1, requests_burst=3)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/vms/web/exec", {"command": ["echo", "x"]}),
        ("POST", "/v1/vms/web/checkpoints", {}),
    ],
)
async def test_what_costs_most_has_the_same_rate(server: Server, method: str, path: str, body: Any) -> None:
    token = await server.add_user("alice")
    await server.create(token=token)
    for _ in range(2):
        assert (await server.ask(method, path, body, token=token)).status < 300
    answer = await server.ask(method, path, body, token=token)
    assert (answer.status, answer.json()["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) >= 1


@limited(requests_per_second=0.1, requests_burst=2)
async def test_websockets_have_the_rate_of_requests_before_anything_is_begun(server: Server) -> None:
    token = await server.add_user("alice")
    await server.create(token=token)
    async with server.exec(token=token):
        pass
    with pytest.raises(ConnectionRejected) as refused:
        async with server.exec(token=token):
            pass
    assert refused.value.status_code == 429


# --- sessions and sizes ----------------------------------------------------------------------------------------------


@limited(max_ws_sessions_per_user=1)
async def test_a_user_has_so_many_websockets_and_others_have_theirs(server: Server) -> None:
    alice, bob = await server.add_user("alice"), await server.add_user("bob")
    for token in (alice, bob):
        await server.create(token=token)
    async with server.exec(token=alice):
        with pytest.raises(ConnectionRejected) as refused:
            async with server.exec(token=alice):
                pass
        assert refused.value.status_code == 429
        async with server.exec(token=bob):
            pass
    with trio.fail_after(10):
        while True:
            with contextlib.suppress(ConnectionRejected):
                async with server.exec(token=alice):
                    break


@limited(max_body_bytes=4096, max_header_bytes=4096, max_output_bytes=1024)
async def test_bodies_headers_and_output_are_as_large_as_the_configuration_says(web: Server) -> None:
    name, body = "x" * 60, "y" * 4000
    assert (await web.refused("POST", "/v1/vms", {"name": name, "image": body}))[0] in (400, 404)
    refused = await web.refused("POST", "/v1/vms", {"name": name, "image": body * 2})
    assert refused == (413, "too_large", "the request's body is over 4096 bytes")
    assert (await web.ask("GET", "/healthz", headers={"x-padding": "z" * 3000})).status == 200
    client = await web.tcp()
    await client.send("GET", "/healthz", headers={"x-padding": "z" * 5000})
    assert (await client.until_closed()).startswith(b"HTTP/1.1 431")
    answer = await web.run("echo", "a" * 2000)
    assert (len(answer["stdout"]), answer["truncated"]) == (1024, True)
    assert (await web.ask("GET", "/v1/capabilities")).json()["max_exec_output_bytes"] == 1024


async def test_who_is_not_let_in_is_answered_before_the_body(server: Server) -> None:
    client = await server.tcp()
    await client.stream.send_all(b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{")
    answer = await client.receive("POST")
    assert answer.status == 401
    assert await client.until_closed() == b""


# --- where clients come from -----------------------------------------------------------------------------------------

PROXIES = ("10.0.0.0/8", "fd00::/8", "203.0.113.7")


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        (False, "192.0.2.1", ["198.51.100.1"], "192.0.2.1"),
        (True, "192.0.2.1", ["198.51.100.1, 198.51.100.2"], "198.51.100.2"),
        (True, "192.0.2.1", ["not an address"], "192.0.2.1"),
        (True, "192.0.2.1", [], "192.0.2.1"),
        (PROXIES, "192.0.2.1", ["198.51.100.1"], "192.0.2.1"),  # nobody of ours says it
        (PROXIES, "10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        (PROXIES, "10.0.0.1", ["6.6.6.6, 198.51.100.1, 10.2.3.4", "203.0.113.7"], "198.51.100.1"),
        (PROXIES, "10.0.0.1", ["6.6.6.6, garbage, 10.2.3.4"], "10.2.3.4"),
        (PROXIES, "10.0.0.1", ["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
        (PROXIES, "10.0.0.1", ["[2001:db8::1]:443"], "2001:db8::1"),
        (PROXIES, "10.0.0.1", ["198.51.100.1:5555"], "198.51.100.1"),
        (PROXIES, "fd00::1", ["2001:db8::1"], "2001:db8::1"),
        (PROXIES, "::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        (PROXIES, None, ["198.51.100.1"], "198.51.100.1"),
        (False, None, ["198.51.100.1"], "local"),
        ((), "10.0.0.1", ["198.51.100.1"], "10.0.0.1"),
    ],
)
def test_proxies_are_believed_from_the_right_up_to_the_first_that_is_none_of_ours(
    trusted: bool | tuple[str, ...], peer: str | None, forwarded: list[str], client: str
) -> None:
    assert Origins(trusted).of(peer, forwarded) == client


def test_who_has_one_address_of_ipv6_has_all_of_its_64() -> None:
    assert place("2001:db8:1:2::1") == place("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert place("2001:db8:1:3::1") != place("2001:db8:1:2::1")
    assert place("::ffff:192.0.2.1") == place("192.0.2.1") == "192.0.2.1"
    assert place("::1") == "::/64"
    assert place("local") == "local"


@pytest.mark.parametrize("server", [{"trust_forwarded_for": ("127.0.0.0/8",)}], indirect=True)
async def test_failures_are_counted_by_the_clients_network_behind_a_listed_proxy(server: Server) -> None:
    wrong = f"noid_tok_{0:064}"
    for host in range(limiter.FAILURES_PER_TOKEN):
        headers = {"x-forwarded-for": f"2001:db8::{host + 1:x}"}
        assert (await server.refused("GET", "/v1/vms", token=wrong, headers=headers))[0] == 401
    for client, status in (("2001:db8::ffff", 429), ("2001:db8:0:1::1", 401)):
        headers = {"x-forwarded-for": client}
        answer = await server.ask("GET", "/v1/vms", token=wrong, headers=headers)
        assert answer.status == status


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", True), ("false", False), ('"10.0.0.1"', ("10.0.0.1",)), ('["10.0.0.0/8", "::1"]', ("10.0.0.0/8", "::1"))],
)
def test_the_proxies_are_a_word_or_a_list(data_dir: Any, written: str, read: object) -> None:
    path = data_dir / "server.toml"
    path.write_text(f"trust_forwarded_for = {written}")
    assert load_config(path).trust_forwarded_for == read


@pytest.mark.parametrize("written", ['["proxy.example"]', '["10.0.0.0/33"]', "3"])
def test_what_is_no_network_is_refused(data_dir: Any, written: str) -> None:
    path = data_dir / "server.toml"
    path.write_text(f"trust_forwarded_for = {written}")
    with pytest.raises(ConfigError, match="trust_forwarded_for"):
        load_config(path)


def test_no_limit_is_below_what_works(data_dir: Any) -> None:
    assert Config(data_dir=data_dir).limits == LimitsConfig()
    for line in ("max_connections = 0", "max_message_bytes = 1000", "header_timeout_secs = 0", "max_body_bytes = inf"):
        path = data_dir / "server.toml"
        path.write_text(f"[limits]\n{line}")
        with pytest.raises(ConfigError, match=r"limits: m|limits: h"):
            load_config(path)


async def reset(server: Server, *, read: bool) -> None:
    """Connect, and break off: after what the server says has been *read*, or before."""
    host, _, port = server.config.listen.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    if read:
        await stream.receive_some()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


@limited(max_connections=1)
async def test_a_refused_connection_that_is_reset_harms_nobody(server: Server, log: Any) -> None:
    client = await server.tcp()
    assert (await client.ask("GET", "/healthz")).status == 200
    for read in (True, False):
        await reset(server, read=read)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert (await client.ask("GET", "/healthz")).status == 200
    assert not [line for line in log.lines if "exception" in line]


async def test_a_connection_that_fails_ends_no_other(server: Server, log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await server.tcp()
    assert (await client.ask("GET", "/healthz")).status == 200
    with monkeypatch.context() as patch:
        patch.setattr(Connections, "take", None)
        await reset(server, read=False)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert (await client.ask("GET", "/healthz")).status == 200
    assert (await server.ask("GET", "/healthz", token="none")).status == 200
    assert [line["message"] for line in log.lines if "exception" in line] == ["a connection failed"]
