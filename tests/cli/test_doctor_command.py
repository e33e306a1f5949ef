"""``noid doctor`` names what is wrong and what to do, for a server and for this machine."""

from __future__ import annotations

import json
from email.utils import formatdate
from time import time
from typing import Any

import pytest

VERSION = {"version": "0.3.0", "api_version": 1}


@pytest.fixture
def server(agent: Any) -> Any:
    agent.answers("GET", "/version", 200, VERSION, Date=formatdate(time(), usegmt=True))
    who = {"user_id": "u1", "name": "alice", "token": "laptop", "scopes": ["read", "exec"]}
    agent.answers("GET", "/v1/whoami", 200, who)
    return agent


def found(noid: Any, *options: str, code: int, **env: str) -> dict[str, dict[str, str]]:
    """What each check found; the worst of those that have a name in common."""
    done = noid("doctor", "--json", *options, **env)
    assert (done.returncode, done.stderr) == (code, b"")
    findings = json.loads(done.stdout)
    assert all(each.keys() == {"check", "status", "text", "next"} for each in findings)
    return {
        each["check"]: each for each in sorted(findings, key=lambda each: ["ok", "warn", "fail"].index(each["status"]))
    }


def test_all_is_well_with_a_server_that_answers(noid: Any, server: Any) -> None:
    checks = found(noid, code=0)
    assert {each["status"] for each in checks.values()} == {"ok"}
    assert f"{server.url}: noid-server 0.3.0, API 1" in checks["server"]["text"]
    assert checks["token"]["text"] == "you are alice, with the token laptop (read, exec)"
    assert checks["environment"]["text"] == "NOID_TOKEN is set, and wins over the files"
    text = noid("doctor").stdout.decode()
    assert "ok    token         you are alice" in text
    assert noid("doctor", "-q").stdout == b""


def test_a_token_that_is_not_valid_any_more_is_told_with_the_next_step(noid: Any, server: Any) -> None:
    server.answers("GET", "/v1/whoami", 401, {"error": "invalid token"})
    checks = found(noid, code=1)
    assert checks["server"]["status"] == "ok"
    assert checks["token"]["status"] == "fail"
    assert "noid auth setup" in checks["token"]["text"]
    assert noid("doctor", "-q").stdout == b"token\n"


def test_a_server_without_a_token_for_it_is_told(noid: Any, server: Any) -> None:
    assert found(noid, code=1, NOID_TOKEN="")["token"]["next"] == "Run: noid auth setup"


def test_a_clock_that_is_wrong_is_a_warning(noid: Any, agent: Any, server: Any) -> None:
    agent.answers("GET", "/version", 200, VERSION, Date=formatdate(time() - 3600, usegmt=True))
    clock = found(noid, code=0)["clock"]
    assert clock["status"] == "warn"
    assert "s ahead of the server's" in clock["text"]


def test_what_is_no_noid_server_is_told_as_such(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/version", 200, ["login"])
    assert found(noid, code=1)["server"]["text"] == f"{agent.url} is no noid-server"
    agent.answers("GET", "/version", 200, VERSION, X_Noid_Api_Version="2")
    assert "version '2' of the API" in found(noid, code=1)["server"]["text"]


def test_nobody_there_is_told_once(noid: Any) -> None:
    checks = found(noid, "--server", "http://127.0.0.1:9", code=1)
    assert "Connection refused" in checks["server"]["text"]
    assert "token" not in checks


def test_settings_are_looked_at_first(offline_noid: Any, server: Any) -> None:
    offline_noid("auth", "setup", "--url", server.url, stdin=b"x")
    config = offline_noid.home / ".noid" / "config.toml"
    config.chmod(0o644)
    settings = found(offline_noid, code=0)["settings"]
    assert (settings["status"], settings["next"]) == ("warn", f"Run: chmod 600 {config}")
    config.write_text("[server\n")
    assert "line 1, column 8" in found(offline_noid, code=1)["settings"]["text"]


def test_a_token_that_travels_in_the_clear_is_a_warning(noid: Any) -> None:
    checks = found(noid, "--server", "http://no-such-host.invalid", code=1)
    assert checks["encryption"]["status"] == "warn"


def test_this_machine_is_looked_at_without_changing_it(offline_noid: Any) -> None:
    checks = found(offline_noid, code=1, PATH="/nowhere")
    assert checks["agent"]["text"].startswith("not running")
    assert checks["server.toml"]["status"] == checks["data"]["status"] == "ok"
    assert checks["vmm"]["status"] == "fail"
    assert "qemu-system-x86_64 is not installed" in checks["vmm"]["text"]
    assert checks["images"]["status"] == "warn"
    assert "noid-server image build" in checks["images"]["next"]
    assert not (offline_noid.home / ".noid").exists()


def test_settings_of_the_server_that_are_wrong_are_told(offline_noid: Any) -> None:
    (offline_noid.home / ".noid").mkdir()
    (offline_noid.home / ".noid" / "server.toml").write_text("[backends]\nvmm = 'bochs'\n")
    assert "bochs" in found(offline_noid, code=1)["server.toml"]["text"]
