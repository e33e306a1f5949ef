"""``noid version`` and ``noid update``, as far as sources can go; installed ones are in tests/test_packaging.py."""

from __future__ import annotations

import json
from typing import Any

from noid import __version__


def test_version_tells_this_noid_and_the_server_s(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/version", 200, {"version": "0.2.31", "api_version": 1})
    first, installed, python, server = noid("version").stdout.decode().splitlines()
    assert first == f"noid {__version__}"
    assert installed.startswith("Installed: checkout, ")
    assert python.startswith("Python: 3.")
    assert server == f"Server: 0.2.31, API 1, at {agent.url}"
    assert noid("version", "-q").stdout.decode() == f"{__version__}\n"
    assert json.loads(noid("version", "--json").stdout)["server"] == {
        "address": agent.url,
        "version": "0.2.31",
        "api_version": 1,
    }


def test_a_server_that_does_not_answer_hides_not_our_own_version(offline_noid: Any) -> None:
    done = offline_noid("version", "--server", "http://127.0.0.1:9")
    assert done.returncode == 0
    assert done.stdout.startswith(f"noid {__version__}\n".encode())
    assert b"Server: connection error: cannot connect to http://127.0.0.1:9" in done.stdout


def test_version_starts_no_agent(offline_noid: Any) -> None:
    done = offline_noid("version")
    assert b"Server: not running (unix://" in done.stdout
    assert not (offline_noid.home / ".noid").exists()


def test_sources_are_not_updated_but_told_how(offline_noid: Any) -> None:
    done = offline_noid("update")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"Error: this noid (checkout) is not updated by itself." in done.stderr
    assert b"git pull" in done.stderr
