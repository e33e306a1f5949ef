"""``noid api``, ``operations``, ``quota``: the server's interface, raw and for people."""

from __future__ import annotations

import json
from typing import Any

import pytest

OPERATION = {
    "id": "019a6f3e-1",
    "kind": "vm.create",
    "vm": "web",
    "state": "failed",
    "step": "template",
    "started_at": "2026-01-02T03:04:05.678+00:00",
    "ended_at": "2026-01-02T03:04:06.000+00:00",
    "timings": {"reserve": 0.002},
    "error": {"error": "no\x1b[2J", "code": "backend"},
    "status": 500,
    "result": None,
}


def test_the_body_is_printed_as_it_came(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [{"a": 1}])
    for words in (("/v1/vms",), ("GET", "/v1/vms"), ("get", "v1/vms")):
        done = noid("api", *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, b'[{"a": 1}]', b"")
    assert agent.requests[0].headers["authorization"].startswith("Bearer ")
    assert agent.requests[0].headers["accept"] == "*/*"
    assert noid("api", "-i", "/v1/vms").stdout.decode() == (
        "HTTP/1.1 200\nx-noid-api-version: 1\ncontent-type: application/json\ncontent-length: 10\n\n" + '[{"a": 1}]'
    )
    assert noid("api", "HEAD", "/v1/vms").stdout == b""


def test_an_error_is_a_body_too_and_exit_code_1(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/nope", 404, {"error": "not found"})
    agent.answers("GET", "/elsewhere", 302, None, Location="http://x/")
    done = noid("api", "/nope")
    assert (done.returncode, done.stdout) == (1, b'{"error": "not found"}')
    assert done.stderr.decode() == f"Error: {agent.url} answered 404.\n"
    assert noid("api", "/elsewhere").returncode == 1


def test_a_body_comes_from_the_argument_a_file_or_a_pipe(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, {})
    agent.answers("PATCH", "/v1/vms/web", 200, {})
    assert noid("api", "/v1/vms", "-d", '{"name": "wéb"}').returncode == 0
    assert agent.requests[-1].body == '{"name": "wéb"}'.encode()
    (noid.cwd / "body").write_bytes(b"\x00\xff")
    noid("api", "PATCH", "/v1/vms/web", "-d", "@body", "-H", "content-type: application/x-tar", "-H", "X-Mine: 1")
    assert agent.requests[-1].body == b"\x00\xff"
    headers = agent.requests[-1].headers
    assert (headers["content-type"], headers["x-mine"], headers["content-length"]) == ("application/x-tar", "1", "2")
    noid("api", "PATCH", "/v1/vms/web", "-d", "-", stdin=b"{}")
    assert agent.requests[-1].headers["transfer-encoding"] == "chunked"
    noid("api", "POST", "/v1/vms")
    assert agent.requests[-1].headers["content-length"] == "0"


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("a", "b", "c"),
        ("GET", "/a b"),
        ("GET", "/a\r\nX: y"),
        ("GE T", "/a"),
        ("/a", "-H", "no header"),
        ("/a", "-H", "X: y\r\nZ: 1"),
        ("/a", "-H", "content-length: 3"),
        ("/a", "-d", "@missing"),
    ],
)
def test_what_is_no_request_is_sent_nowhere(noid: Any, agent: Any, words: tuple[str, ...]) -> None:
    done = noid("api", *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert agent.requests == []


def test_operations_are_listed_shown_and_cancelled(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/operations?vm=web&state=failed&limit=50", 200, [OPERATION])
    agent.answers("GET", "/v1/operations/019a6f3e-1", 200, OPERATION)
    agent.answers("POST", "/v1/operations/019a6f3e-1/cancel", 202, OPERATION | {"state": "running"})
    assert noid("operations", "--vm", "web", "--state", "failed").stdout.decode() == (
        "+------------+-----------+-----+--------+----------+---------------------+\n"
        "| operation  | kind      | vm  | state  | step     | started             |\n"
        "+------------+-----------+-----+--------+----------+---------------------+\n"
        "| 019a6f3e-1 | vm.create | web | failed | template | 2026-01-02 03:04:05 |\n"
        "+------------+-----------+-----+--------+----------+---------------------+\n"
    )
    assert noid("operations", "019a6f3e-1").stdout.decode() == (
        "Operation: 019a6f3e-1\nKind:      vm.create\nVM:        web\nState:     failed\nStep:      template\n"
        "Started:   2026-01-02 03:04:05\nEnded:     2026-01-02 03:04:06\nPhases:    reserve 2 ms\n"
        "Error:     no\\x1b[2J\n"
    )
    assert json.loads(noid("operations", "019a6f3e-1", "--cancel", "--json").stdout)["state"] == "running"
    assert noid("operations", "--cancel").returncode == 2


def test_quota_shows_a_dash_for_no_limit(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/quota", 200, {"limits": {"vms": 3, "bytes": None}, "use": {"vms": 1, "bytes": 4096}})
    assert noid("quota").stdout.decode() == (
        "+----------+------+-------+\n"
        "| resource | used | limit |\n"
        "+----------+------+-------+\n"
        "| vms      | 1    | 3     |\n"
        "+----------+------+-------+\n"
        "| bytes    | 4096 | -     |\n"
        "+----------+------+-------+\n"
    )


def test_a_file_on_standard_input_is_announced_with_what_is_left_of_it(noid: Any, agent: Any) -> None:
    agent.answers("PUT", "/v1/vms/web/files?path=/root/data", 200, {})
    data = bytes(range(256)) * 3000
    (noid.cwd / "data").write_bytes(b"first\n" + data)
    script = "{ read -r line; noid api PUT '/v1/vms/web/files?path=/root/data' -d -; } < data"
    assert noid.sh(script).returncode == 0
    [request] = agent.requests
    assert request.headers["content-length"] == str(len(data))
    assert request.body == data
