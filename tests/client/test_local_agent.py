"""Without any configuration there is an agent: started by the first command, used by all, and honest when it fails."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from noid.client import local
from noid.core import paths
from noid.testing.processes import end

ROOT = Path(__file__).parents[2]
PATIENCE_SECS = 60.0

pytestmark = [
    pytest.mark.skipif(
        shutil.which("qemu-system-x86_64") is None, reason="needs QEMU: qemu-system-x86_64 is not on PATH"
    ),
    pytest.mark.skipif(
        "vmm_qemu" not in entry_points(group="noid").names, reason="needs noid to be installed: no plugin is announced"
    ),
]


def noid(data_dir: Path, *args: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {"HOME": "/nowhere", "PATH": os.environ["PATH"], "PYTHONPATH": path, "NOID_DATA_DIR": str(data_dir)}
    return subprocess.Popen(
        [sys.executable, "-m", "noid.cli.main", *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def said(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=PATIENCE_SECS)
    return process.returncode, out, err


def agent_pid(data_dir: Path) -> int:
    """The process that listens on the data directory's socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(paths.socket_path(data_dir)))
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def end_agent(data_dir: Path) -> None:
    try:
        pid = agent_pid(data_dir)
    except (FileNotFoundError, ConnectionRefusedError):
        return
    end(pid, signal.SIGTERM, PATIENCE_SECS)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A data directory; the agent that a test starts there is ended."""
    directory = tmp_path / "d"
    yield directory
    end_agent(directory)


def test_commands_that_start_at_once_start_one_agent_and_all_work(home: Path) -> None:
    running = [noid(home, "list") for _ in range(4)]
    assert [said(process) for process in running] == [(0, b"No VMs found.\n", b"")] * 4
    first = agent_pid(home)
    assert said(noid(home, "list")) == (0, b"No VMs found.\n", b"")
    assert agent_pid(home) == first
    log = (home / "agent.log").read_text()
    assert log.count(" serving ") == 1
    assert "Error" not in log  # no second one was even tried
    assert os.getsid(first) == first  # closing the terminal does not end it
    assert Path(f"/proc/{first}/cwd").readlink() == Path("/")


def test_an_agent_that_was_killed_is_started_again_past_its_stale_socket(home: Path) -> None:
    assert said(noid(home, "list"))[0] == 0
    end(agent_pid(home), signal.SIGKILL, PATIENCE_SECS)
    assert paths.socket_path(home).exists()
    assert said(noid(home, "list")) == (0, b"No VMs found.\n", b"")


@pytest.mark.parametrize(
    ("command", "code", "word"),
    [
        (("list",), 0, b"No VMs found."),
        (("exec", "web", "--", "true"), 125, b"VM 'web' not found"),
        (("cp", "web:/etc/hostname", "-"), 1, b"VM 'web' not found"),
        (("destroy", "web", "-y"), 1, b"VM 'web' not found"),
    ],
)
def test_a_command_that_an_ending_agent_never_heard_is_put_to_the_next_one(
    home: Path, command: tuple[str, ...], code: int, word: bytes
) -> None:
    run = paths.private_directory(paths.run_dir(home))
    with socket.socket(socket.AF_UNIX) as ending:
        ending.bind(str(run / paths.socket_path(home).name))
        ending.listen()
        asking = noid(home, *command)
        assert select.select([ending], [], [], PATIENCE_SECS)[0]  # it is in the queue, where nobody will take it
    found, out, err = said(asking)
    assert (found, word in out + err) == (code, True), err
    assert agent_pid(home)


def test_a_data_directory_with_a_long_name_works_too(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    try:
        assert said(noid(directory, "list")) == (0, b"No VMs found.\n", b"")
        assert paths.socket_path(directory).parent.parent == Path(f"/tmp/noid-{os.geteuid()}")
    finally:
        end_agent(directory)
        shutil.rmtree(paths.run_dir(directory))


def test_an_agent_that_cannot_start_is_quoted(home: Path) -> None:
    home.mkdir()
    (home / "server.toml").write_text("[backends]\nvmm = 'bochs'\n")
    code, out, err = said(noid(home, "list"))
    assert (code, out) == (1, b"")
    text = err.decode()
    assert text.startswith("Error: the local agent cannot start (status 1).")
    assert "bochs" in text
    assert "agent.log" in text
    assert "Traceback" not in text
    assert said(noid(home, "exec", "web", "--", "true"))[0] == 125


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = said(noid(tmp_path / "file" / "data", "list"))
    assert code == 1
    assert b"cannot use" in err
    assert b"NOID_DATA_DIR" in err


def test_an_agent_without_room_for_its_log_is_not_a_riddle(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "agent.log").touch()
    assert "It wrote nothing to" in local._last_lines(home / "agent.log", 0)
    full = os.statvfs_result((4096, 4096, 1000, 0, 0, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert f"The disk of {home} is full: free space there" in local._last_lines(home / "agent.log", 0)
