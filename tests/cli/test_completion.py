"""Words completed in real shells, from a server that answers, one that does not, and none at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

PATIENCE_SECS = 20.0
AT_MOST_SECS = 0.1
ID = "0123456789abcdef"


def vm(name: str) -> dict[str, Any]:
    return {"name": name, "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}


def checkpoint(label: str | None) -> dict[str, Any]:
    return {"id": ID, "vm_name": "web", "label": label, "created_at": "2026-01-02 03:04:05"}


@pytest.fixture
def noid(noid: Any, tmp_path: Path) -> Any:
    """With the program on the PATH, as shells find it."""
    program = tmp_path / "bin" / "noid"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom noid.cli.start import main\nmain()\n")
    program.chmod(0o755)
    noid.env["PATH"] = f"{program.parent}:{noid.env['PATH']}"
    return noid


def completed(noid: Any, line: str, **env: str) -> list[str]:
    """The words that noid offers a bash for the last word of *line*, once it has asked the server."""
    offered(noid, line, **env)
    wait_for_children(noid)
    return offered(noid, line, **env)


def wait_for_children(noid: Any) -> None:
    """Wait until nobody asks the server any more: each holds a lock while it does."""
    for lock in noid.home.glob(".cache/noid/completion/*.lock"):
        deadline = time.monotonic() + PATIENCE_SECS
        with lock.open() as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline
                    select.select([], [], [], 0.01)


def offered(noid: Any, line: str, **env: str) -> list[str]:
    """The words that noid offers at once."""
    asked = {"_NOID_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(
        ["noid"], env=noid.env | asked | env, cwd=noid.cwd, capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [entry.partition(",")[2].partition("\t")[0] for entry in done.stdout.splitlines() if entry]


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing (apt-get install {name})")
    return found


# --- what is offered -------------------------------------------------------------------------------------------------


def test_commands_and_options_are_offered_without_a_server(noid: Any, agent: Any) -> None:
    assert completed(noid, "noid che") == ["checkpoint", "checkpoints"]
    assert completed(noid, "noid auth s") == ["setup", "switch"]
    assert completed(noid, "noid exec --det") == ["--detach-keys", "--detach"]
    assert completed(noid, "noid list --js") == ["--json"]
    assert completed(noid, "noid config set u") == ["update.url"]
    assert completed(noid, "noid kill -s U") == ["USR1", "USR2"]
    assert agent.requests == []


def test_vms_are_offered_where_one_is_meant_and_each_once(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web"), vm("work"), vm("db")])
    assert completed(noid, "noid exec w") == ["web", "work"]
    assert completed(noid, "noid stop web ") == ["work", "db"]
    assert completed(noid, "noid info --name d") == ["db"]
    assert completed(noid, "noid create w") == []
    assert completed(noid, "noid exec web -- w") == []
    assert agent.requests[-1].headers["authorization"].startswith("Bearer noid_tok_")


def test_checkpoints_are_offered_by_id_and_label_of_the_vm_that_is_meant(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web")])
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [checkpoint("clean")])
    assert completed(noid, "noid restore web ") == [ID, "clean"]
    assert completed(noid, "noid restore web 01") == [ID]
    noid("use", "web")
    assert completed(noid, "noid restore ") == ["web", ID, "clean"]


def test_processes_of_the_vm_are_offered(noid: Any, agent: Any) -> None:
    process = {"id": "8f0a12bc", "pid": 7, "command": ["vi"], "state": "running", "exit_code": None, "origin": "x"}
    agent.answers("GET", "/v1/vms/web/processes", 200, [process | {"started_at": None}])
    assert completed(noid, "noid attach web ") == ["8f0a12bc"]


def test_servers_are_offered_by_name(noid: Any, agent: Any) -> None:
    noid("auth", "setup", "--url", agent.url, "--as", "work")
    assert completed(noid, "noid auth switch ") == ["work", "local"]
    assert completed(noid, "noid list --server w") == ["work"]


@pytest.mark.parametrize("label", ["$(touch owned)", "*", "a b", "a\nplain,b", "-rf", "\x1b[2J", "`x`", "ä"])
def test_what_a_shell_could_take_for_something_else_is_not_offered(noid: Any, agent: Any, label: str) -> None:
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [checkpoint(label)])
    assert completed(noid, "noid restore web ") == [ID]


def test_another_token_sees_nothing_of_what_the_first_one_saw(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web")])
    assert completed(noid, "noid exec ") == ["web"]
    agent.answers("GET", "/v1/vms", 401, {"error": "invalid token"})
    assert completed(noid, "noid exec ", NOID_TOKEN="another") == []
    (directory,) = noid.home.glob(".cache/noid/completion")
    assert directory.stat().st_mode & 0o77 == 0
    assert "noid_tok_" not in "".join(entry.name + entry.read_text() for entry in directory.iterdir())


def test_no_agent_is_started_for_a_tab_and_a_broken_file_is_no_noise(noid: Any) -> None:
    del noid.env["NOID_URL"]
    assert completed(noid, "noid exec ") == []
    assert not (noid.home / ".noid").exists()
    (noid.home / ".noid").mkdir()
    (noid.home / ".noid" / "config.toml").write_text("[server\n")
    assert completed(noid, "noid exec ") == []


def test_a_home_that_cannot_be_written_completes_what_needs_no_server(noid: Any, agent: Any) -> None:
    (noid.home / ".cache").write_text("no directory")
    assert completed(noid, "noid exec ") == []
    assert completed(noid, "noid che") == ["checkpoint", "checkpoints"]


def test_completing_imports_nothing_heavy(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web")])
    begin = "import sys, os; os._exit = sys.exit; from noid.cli.start import main"
    program = f"{begin}\ntry: main()\nfinally: print(*sys.modules)"
    asked = {"_NOID_COMPLETE": "bash_complete", "COMP_WORDS": "noid info ", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=noid.env | asked, capture_output=True, text=True, check=False
    )
    modules = set(done.stdout.split())
    assert "noid.cli.completing" in modules
    assert modules & {"trio", "ssl", "subprocess", "importlib.metadata", "http.client", "tomllib", "wsproto"} == set()


# --- a server that does not answer -----------------------------------------------------------------------------------


class Hung:
    """Accepts connections, as the kernel does, and says nothing. Until it is closed."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepted: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def asked(self) -> int:
        """How many connections there are."""
        self._listener.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                self._accepted.append(self._listener.accept()[0])
        return len(self._accepted)

    def close(self) -> None:
        for sock in (self._listener, *self._accepted):
            sock.close()


@pytest.fixture
def hung(noid: Any) -> Iterator[Hung]:
    server = Hung()
    noid.env["NOID_URL"] = server.url
    yield server
    server.close()
    wait_for_children(noid)  # who asked has noticed


def secs(noid: Any, line: str) -> float:
    began = time.perf_counter()
    offered(noid, line)
    return time.perf_counter() - began


def test_a_server_that_hangs_holds_a_shell_up_for_less_than_a_tenth_of_a_second(noid: Any, hung: Hung) -> None:
    seen = []
    for number in range(40):  # each a question of its own, so each waits; other work on this machine makes some longer
        seen.append(secs(noid, f"noid attach vm-{number} ") - secs(noid, "noid attach --det"))
        if seen[-1] < AT_MOST_SECS:
            break
    assert min(seen) < AT_MOST_SECS


def test_while_somebody_asks_a_server_that_hangs_nobody_else_does(noid: Any, hung: Hung) -> None:
    for _ in range(4):
        assert offered(noid, "noid attach web ") == []
    assert hung.asked() == 1


def test_what_is_known_is_offered_while_the_server_hangs(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web")])
    assert completed(noid, "noid exec ") == ["web"]
    (kept,) = noid.home.glob(".cache/noid/completion/*.json")
    os.utime(kept, (0, time.time() - 3600))
    held = socket.create_connection(agent.listener.getsockname())  # the scripted agent serves one after the other
    with contextlib.closing(held):
        assert offered(noid, "noid exec ") == ["web"]
    deadline = time.monotonic() + PATIENCE_SECS
    while time.time() - kept.stat().st_mtime > 60:  # who asked goes on without us, and brings the news
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)
    assert json.loads(kept.read_text()) == [["web", "running"]]


# --- real shells -----------------------------------------------------------------------------------------------------


class Typist:
    """Somebody at a terminal with a shell."""

    def __init__(self, noid: Any, argv: list[str]) -> None:
        self.terminal, theirs = pty.openpty()
        env = noid.env | {"TERM": "dumb", "PS1": "ready> "}
        self.running = subprocess.Popen(
            argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=noid.cwd, start_new_session=True
        )
        os.close(theirs)
        self.seen = b""

    def types(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def sees(self, wanted: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_SECS
        while wanted not in self.seen:
            assert select.select([self.terminal], [], [], max(deadline - time.monotonic(), 0))[0], self.seen
            self.seen += os.read(self.terminal, 4096)
        self.seen = self.seen.partition(wanted)[2]

    def close(self) -> None:
        self.running.kill()
        self.running.wait(PATIENCE_SECS)
        os.close(self.terminal)


def test_a_tab_in_bash(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web-server")])
    assert completed(noid, "noid info ") == ["web-server"]  # so that it is known, however busy this machine is
    with contextlib.closing(Typist(noid, [shell("bash"), "--norc", "--noprofile", "-i"])) as someone:
        someone.types('bind "set enable-bracketed-paste off"; eval "$(noid completion bash)"; echo is $?\n')
        someone.sees(b"is 0")
        someone.types("echo noid; noid info w\t")
        someone.sees(b"noid info web-server ")


def test_a_tab_in_zsh(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web-server")])
    assert completed(noid, "noid info ") == ["web-server"]  # so that it is known, however busy this machine is
    with contextlib.closing(Typist(noid, [shell("zsh"), "-f", "-i"])) as someone:
        someone.types('autoload -U compinit; compinit -D -u; eval "$(noid completion zsh)"; echo is $?\n')
        someone.sees(b"is 0")
        someone.types("noid info w\t")
        someone.sees(b"web-server")


def test_a_completion_in_fish(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web-server")])
    assert completed(noid, "noid info ") == ["web-server"]  # so that it is known, however busy this machine is
    script = 'noid completion fish | source; complete -C "noid info w"'
    done = subprocess.run([shell("fish"), "--no-config", "-c", script], env=noid.env, capture_output=True, check=False)
    assert done.stdout == b"web-server\trunning\n", done.stderr


def test_the_script_says_how_it_is_installed(noid: Any) -> None:
    for name in ("bash", "zsh", "fish"):
        text = noid("completion", name).stdout.decode()
        assert f"noid completion {name}" in "".join(text.splitlines(keepends=True)[:3])
    assert noid("completion", "tcsh").returncode == 2


def test_what_has_words_of_its_own_is_a_parameter_that_exists() -> None:
    from noid.cli.completing import SOURCES
    from noid.cli.main import cli

    for path, name in SOURCES:
        command: Any = cli
        for word in path.split():
            command = command.get_command(click.Context(command), word)
        assert name in {parameter.name for parameter in command.params}, f"{path}: {name}"


def test_a_place_to_copy_to_is_a_local_path_or_a_vm_and_a_path_in_it(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [vm("web"), vm("db")])
    listing = {"stdout": "lib/\nlog/\nlock\nla la\n", "exit_code": 0, "timed_out": False, "truncated": False}
    agent.answers("POST", "/v1/vms/web/exec", 200, listing)
    assert completed(noid, "noid cp ") == ["", "web:", "db:"]  # the first one lets the shell offer its files
    assert completed(noid, "noid cp ./w") == ["./w"]
    assert completed(noid, "noid cp web :") == ["/"]  # as bash cuts it
    assert completed(noid, "noid cp file web : /var/l") == ["/var/lib/", "/var/log/", "/var/lock"]
    assert completed(noid, "noid cp web : /var/lo") == ["/var/log/", "/var/lock"]
    asked = [request.json["command"] for request in agent.requests if request.method == "POST"]
    assert set(map(tuple, asked)) == {("ls", "-1Ap", "--", "/var/")}
    agent.answers("POST", "/v1/vms/db/exec", 409, {"error": "VM 'db' is stopped", "code": "conflict"})
    assert completed(noid, "noid cp file db : /var/l") == []


def test_a_path_in_a_vm_is_whole_for_shells_that_leave_words_whole(noid: Any, agent: Any) -> None:
    listing = {"stdout": "lib/\n", "exit_code": 0, "timed_out": False, "truncated": False}
    agent.answers("POST", "/v1/vms/web/exec", 200, listing)
    env = {"_NOID_COMPLETE": "zsh_complete"}
    offered(noid, "noid cp web:/var/l", **env)
    wait_for_children(noid)
    asked = {"COMP_WORDS": "noid cp web:/var/l", "COMP_CWORD": "2"}
    done = subprocess.run(
        ["noid"], env=noid.env | asked | env, cwd=noid.cwd, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[:2] == ["plain", "web:/var/lib/"]
