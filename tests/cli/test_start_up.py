"""What a command must not import: starting fast is a feature, and imports are what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

HEAVY = {"trio", "trio_websocket", "httpx", "rich", "importlib.metadata", "http.client", "ssl", "asyncio", "pluggy"}
PROGRAM = """
import sys, json
from noid.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(noid: Any, *args: str, code: int = 0) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], env=noid.env, cwd=noid.cwd, capture_output=True, check=True, timeout=20
    )
    ended, modules = json.loads(done.stderr.splitlines()[-1])
    assert ended == code
    return set(modules)


def test_listing_imports_no_concurrency_framework_no_http_library_and_no_websocket(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [])
    modules = imported(noid, "list")
    assert modules & (HEAVY | {"wsproto", "h11", "subprocess", "tomllib", "noid.core.model", "noid.core.wire"}) == set()
    assert "noid.client.calls.vms" in modules  # it did run


def test_listing_what_one_s_own_agent_has_imports_only_what_that_needs(offline_noid: Any, own_agent: Any) -> None:
    own_agent.answers("GET", "/v1/vms", 200, [])
    modules = imported(offline_noid, "list")
    unneeded = {"pathlib", "urllib.parse", "noid.client.servers", "noid.client.local", "noid.cli.labels", "noid.sdk"}
    assert modules & (HEAVY | unneeded) == set()
    assert "noid.client.settings" in modules  # it did ask


@pytest.mark.parametrize("args", [["--help"], ["help", "list"], ["list", "--help"], ["no-such-command"]])
def test_help_and_mistakes_import_no_command_but_the_one_meant(offline_noid: Any, args: list[str]) -> None:
    modules = imported(offline_noid, *args, code=2 if args == ["no-such-command"] else 0)
    assert modules & ((HEAVY - {"importlib.metadata"}) | {"wsproto", "noid.cli.vms", "noid.client.link"}) == set()


def test_completing_a_command_s_name_imports_none(offline_noid: Any) -> None:
    program = (
        "import sys, json, click\n"
        "from click.shell_completion import ShellComplete\n"
        "from noid.cli.main import cli\n"
        "found = ShellComplete(cli, {}, 'noid', '').get_completions([], 'check')\n"
        "print(json.dumps([[item.value for item in found], sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=offline_noid.env, capture_output=True, check=True, timeout=20
    )
    found, modules = json.loads(done.stdout)
    assert found == ["checkpoint", "checkpoints"]
    assert set(modules) & (HEAVY | {"noid.cli.checkpoints"}) == set()


def test_the_version_imports_no_command(offline_noid: Any) -> None:
    modules = imported(offline_noid, "--version")
    assert modules & (HEAVY | {"wsproto", "noid.cli.vms", "noid.client.settings", "noid.core.model"}) == set()


def test_exec_imports_nothing_that_a_command_without_terminal_and_input_does_not_use(
    offline_noid: Any, own_agent: Any
) -> None:
    own_agent.runs(lambda exchange: (exchange.request(), exchange.end(0)))
    modules = imported(offline_noid, "exec", "web", "--", "true")
    of_models = {"files", "guest_processes", "images", "storage", "times", "users", "vms"}
    unneeded = {f"noid.core.model.{name}" for name in of_models} | {
        "difflib", "pathlib", "random", "secrets", "subprocess", "tomllib", "urllib.parse",
        "noid.cli.console", "noid.cli.screen", "noid.cli.suggestions", "noid.client.local", "noid.client.predecessor",
        "noid.client.serial_output", "noid.client.servers", "noid.sdk", "noid.sync",
    }  # fmt: skip
    assert modules & (HEAVY | unneeded) == set()
    assert "wsproto" in modules  # it did run


def test_exec_on_a_server_imports_a_websocket_codec_and_no_concurrency_framework(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.end(0)))
    modules = imported(noid, "exec", "web", "--", "true")
    assert modules & (HEAVY | {"noid.sdk", "noid.sync", "noid.client.predecessor"}) == set()
