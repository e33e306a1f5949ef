"""What a command must not import: starting fast is a feature, and imports are what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

HEAVY = {"trio", "trio_websocket", "httpx", "rich", "importlib.metadata", "http.client", "ssl", "asyncio", "pluggy"}
PROGRAM = """
import sys, json
from noid.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(noid: Any, *args: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], env=noid.env, cwd=noid.cwd, capture_output=True, check=True, timeout=20
    )
    code, modules = json.loads(done.stderr)
    assert code == 0
    return set(modules)


def test_listing_imports_no_concurrency_framework_no_http_library_and_no_websocket(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [])
    modules = imported(noid, "list")
    assert modules & (HEAVY | {"wsproto", "h11", "subprocess", "tomllib", "noid.core.model", "noid.core.wire"}) == set()
    assert "noid.client.calls.vms" in modules  # it did run


def test_the_version_imports_no_command(offline_noid: Any) -> None:
    modules = imported(offline_noid, "--version")
    assert modules & (HEAVY | {"wsproto", "noid.cli.vms", "noid.client.settings", "noid.core.model"}) == set()


def test_exec_imports_a_websocket_codec_and_no_concurrency_framework(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.end(0)))
    modules = imported(noid, "exec", "web", "--", "true")
    assert modules & HEAVY == set()
    assert "wsproto" in modules
