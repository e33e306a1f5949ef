"""The command line, the server and the core together, on simulated VMs: what a user types and what comes of it."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECS = 30.0
SERVER = """
import sys, pathlib, trio
from noid.core.opening import open_agent
from noid.server.serve import serve
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

data_dir = pathlib.Path(sys.argv[1])
if not (data_dir / "noid.db").exists():
    give_default_image(data_dir)

async def main():
    config = simulated_config(data_dir)
    async with open_agent(config, simulated_plugins()) as agent:
        await serve(agent, config, ready=lambda: print("ready", flush=True))

trio.run(main)
"""


class RealServer:
    """The server's process, which can be killed and started again."""

    def __init__(self, data_dir: Path, env: dict[str, str]) -> None:
        self._data_dir = data_dir
        self._env = env
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._data_dir / "agent.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(self._data_dir)], env=self._env, stdout=subprocess.PIPE, stderr=log
            )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            self._end(process)
            raise AssertionError((self._data_dir / "agent.log").read_text())
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        process.wait(PATIENCE_SECS)
        assert process.stdout is not None
        process.stdout.close()

    def send_signal(self, signo: signal.Signals) -> None:
        self.process.send_signal(signo)

    def is_killed_and_another_started(self) -> None:
        self.process.kill()
        self._end(self.process)
        self.process = self._start()

    def close(self) -> None:
        self._end(self.process)


@pytest.fixture
def server(offline_noid: Any, data_dir: Path) -> Iterator[RealServer]:
    server = RealServer(data_dir, offline_noid.env)
    offline_noid.env["NOID_DATA_DIR"] = str(data_dir)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def noid(offline_noid: Any, server: Any) -> Any:
    return offline_noid


def ok(done: subprocess.CompletedProcess[bytes]) -> str:
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def test_a_vm_is_made_frozen_copied_put_back_and_removed(noid: Any) -> None:
    assert ok(noid("list")) == "No VMs found.\n"
    assert ok(noid("create", "web", "--mem", "256")) == "VM 'web' created (state: running)\n"
    assert ok(noid("use", "web")) == "Active VM set to 'web'\n"
    assert ok(noid("exec", "--", "sh", "-c", "echo before > /root/file")) == ""

    made = ok(noid("checkpoint", "--label", "clean"))
    found = re.fullmatch(r"Checkpoint '([0-9a-f]{16})' created \(label: clean\)\n", made)
    assert found
    checkpoint = found[1]
    assert f"| {checkpoint} | clean |" in ok(noid("checkpoints"))

    assert ok(noid("exec", "--", "sh", "-c", "echo after > /root/file")) == ""
    assert ok(noid("restore", "web", checkpoint, "--as", "copy")) == (
        f"VM 'copy' restored from checkpoint '{checkpoint}'\n"
    )
    assert ok(noid("exec", "copy", "--", "cat", "/root/file")) == "before\n"
    assert ok(noid("exec", "web", "--", "cat", "/root/file")) == "after\n"
    assert ok(noid("restore", checkpoint)) == f"VM 'web' restored from checkpoint '{checkpoint}'\n"
    assert ok(noid("exec", "web", "--", "cat", "/root/file")) == "before\n"

    assert [vm["name"] for vm in json.loads(ok(noid("list", "--json")))] == ["web", "copy"]
    assert "Memory:  256 MiB\n" in ok(noid("info"))
    for name in ("web", "copy"):
        assert ok(noid("destroy", name)) == f"VM '{name}' destroyed\n"
    assert ok(noid("list")) == "No VMs found.\n"


def test_vms_and_checkpoints_are_found_by_the_words_their_owner_put_on_them(noid: Any) -> None:
    invented = ok(noid("create", "-q", "--mem", "256", "--label", "tier=front", "--use")).strip()
    assert re.fullmatch("[a-z]+-[a-z]+", invented)
    assert ok(noid("rename", "web")) == f"VM '{invented}' renamed to 'web'\nActive VM set to 'web'\n"
    assert ok(noid("label", "team=infra", "tier-")) == "team=infra\n"
    assert ok(noid("list", "-q", "--label", "team=infra")) == "web\n"
    assert ok(noid("list", "--label", "tier")) == "No VMs found.\n"

    first, second = (ok(noid("checkpoint", "-q", "--label", label)).strip() for label in ("golden", "nightly"))
    assert ok(noid("restore", "golden")) == f"VM 'web' restored from checkpoint '{first}'\n"
    assert ok(noid("create", "copy", "--from", second[:8])) == "VM 'copy' created (state: running)\n"
    assert "is of VM 'web', not of 'copy'" in noid("restore", "copy", first).stderr.decode()
    ok(noid("use", "copy"))
    assert "and this directory's VM is 'copy'" in noid("restore", "golden").stderr.decode()
    assert ok(noid("label", "--checkpoint", "web/nightly", "keep=yes")) == "keep=yes\n"
    assert ok(noid("checkpoints", "--all", "--label", "keep", "-q")) == f"{second}\n"
    assert ok(noid("rm", "golden", second[:8])) == f"Checkpoint '{first}' removed\nCheckpoint '{second}' removed\n"
    assert ok(noid("checkpoints", "--all")) == "No checkpoints found.\n"


def test_a_command_runs_as_if_it_were_here(noid: Any) -> None:
    ok(noid("create", "web", "--mem", "256"))
    data = bytes(range(256)) * 2000
    assert noid("exec", "web", "-i", "--", "cat", stdin=data).stdout == data
    assert noid("exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 42").returncode == 42
    done = noid("exec", "web", "--json", "--", "sh", "-c", "echo out; echo err >&2")
    assert json.loads(done.stdout) == {
        "exit_code": 0,
        "signal": None,
        "timed_out": False,
        "truncated": False,
        "stdout": "out\n",
        "stderr": "err\n",
    }
    assert ok(noid("exec", "web", "-e", "GREETING=hello world", "--", "env")).splitlines().count("GREETING=hello world")
    assert ok(noid("exec", "web", "-w", "/tmp", "--", "pwd")) == "/tmp\n"
    assert noid("exec", "web", "--", "no-such-program").returncode == 127
    assert noid("exec", "web", "--timeout", "0.2", "--", "sleep", "60").returncode == 124
    assert noid("exec", "web", "-u", "nobody-like-that", "--", "true").returncode == 125


def test_what_cannot_be_is_said_in_one_paragraph(noid: Any) -> None:
    ok(noid("create", "web", "--mem", "256"))

    def refused(*args: str) -> str:
        done = noid(*args)
        assert (done.returncode, done.stdout) == (1, b"")
        text = str(done.stderr.decode())
        assert text.startswith("Error: ")
        assert text.count("\n") == 1
        return text

    assert "server error (409)" in refused("create", "web", "--mem", "256")
    assert "server error (400)" in refused("create", "x", "--cpus", "0")
    assert "server error (400)" in refused("create", "x", "--mem", "1")
    assert "server error (404)" in refused("create", "x", "--mem", "256", "--image", "nope")
    assert "server error (404)" in refused("info", "nope")
    assert "server error (404)" in refused("destroy", "nope")
    assert "server error (404)" in refused("restore", "web", "0123456789abcdef")
    assert "server error (404)" in refused("checkpoint", "nope")


def test_the_server_going_down_in_the_middle_of_a_command_is_125(noid: Any, server: Any) -> None:
    ok(noid("create", "web", "--mem", "256"))
    with noid.start("exec", "web", "--", "sh", "-c", "echo begun; sleep 60", stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"begun\n"
        server.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_SECS) == 125


def test_input_and_output_go_on_where_they_were_when_the_server_is_killed(
    noid: Any, server: Any, data_dir: Path
) -> None:
    ok(noid("create", "web", "--mem", "256"))
    noid.env["NOID_URL"] = f"unix://{data_dir}/run/agent.sock"  # a client that starts no agent of its own meanwhile
    data = random.Random(1).randbytes(3_000_000)  # noqa: S311  # that it can be told apart is enough
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        with noid.start("exec", "web", "-i", "--", "cat", stdin=file, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            received = running.stdout.read(700_000)
            server.is_killed_and_another_started()
            received += running.stdout.read(1_200_000)
            server.is_killed_and_another_started()
            received += running.stdout.read()
            assert running.wait(PATIENCE_SECS) == 0
    assert len(received) == len(data)
    assert received == data


def test_a_command_with_a_terminal_is_left_gone_back_to_and_interrupted(person: Any, noid: Any) -> None:
    ok(noid("create", "web", "--mem", "256"))
    with person(noid, "exec", "web", "-t", "--", "stty", "size") as someone:
        someone.sees(b"30 100\r\n")
        assert someone.running.wait(PATIENCE_SECS) == 0

    with person(noid, "exec", "web", "-t", "--", "ticker") as someone:
        someone.sees(b"\n")
        someone.types(b"\x10\x11")
        someone.sees(b"Detached; it runs on. Go back with: noid attach web ")
        process = someone.sees(b"\r\n").decode()
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()
    [found] = json.loads(ok(noid("ps", "web", "--json")))
    assert (found["id"], found["state"]) == (process, "running")

    with person(noid, "attach", "web", process, "-t") as someone:
        someone.sees(b"\n")
        someone.types(b"\x03")
        assert someone.running.wait(PATIENCE_SECS) == 128 + signal.SIGINT
        assert someone.has_the_terminal_back()


def test_an_interrupt_is_the_command_s_and_a_second_one_ours(noid: Any) -> None:
    ok(noid("create", "web", "--mem", "256"))
    for signo in (signal.SIGINT, signal.SIGTERM):
        with noid.start("exec", "web", "--json", "-n", "--", "sleep", "60", stdout=subprocess.PIPE) as running:
            eventually(lambda: [each["state"] for each in json.loads(ok(noid("ps", "web", "--json")))] == ["running"])
            running.send_signal(signo)
            assert running.wait(PATIENCE_SECS) == 128 + signo
            assert json.loads(running.stdout.read())["signal"] == signo  # it got the signal itself, and we its end

    script = "trap '' INT; echo begun; sleep 60"
    with noid.start("exec", "web", "-n", "--", "sh", "-c", script, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"begun\n"
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.5)
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE_SECS) == 130
    eventually(lambda: ok(noid("ps", "web", "-q")) == "")


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECS
    while not what():
        assert time.monotonic() < deadline
