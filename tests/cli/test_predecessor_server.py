"""``noid`` with a server of the predecessor, 0.2.31: what that can do looks as it did; what it cannot is said."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import noid.sync
from noid.cli import main
from noid.cli.main import COMMANDS
from noid.client import predecessor
from noid.client.errors import ServerTooOld
from noid.server.serve import all_routes
from noid.testing.predecessor_server import PredecessorServer, predecessor_server

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CREATED = "2026-01-02 03:04:05"
ID = "0123456789abcdef"

WORKS = {
    "create new --cpus 2": "VM 'new' created (state: running)\n",
    "destroy web": "VM 'web' destroyed\n",
    "destroy nope": "VM 'nope' destroyed\n",
    "list": (
        "+------+---------+------+-----------+---------------------+\n"
        "| name | state   | cpus | mem (MiB) | created             |\n"
        "+------+---------+------+-----------+---------------------+\n"
        f"| web  | running | 1    | 2048      | {CREATED} |\n"
        "+------+---------+------+-----------+---------------------+\n"
        f"| old  | dead    | 1    | 2048      | {CREATED} |\n"
        "+------+---------+------+-----------+---------------------+\n"
    ),
    "info web": f"Name:    web\nState:   running\nCPUs:    1\nMemory:  2048 MiB\nCreated: {CREATED}\n",
    "whoami": "User: alice\nID:   {id}\n",
    "current": "Server: {url}\nActive VM: (none — run `noid use <name>`)\n",
    "use web": "Active VM set to 'web'\n",
    "auth setup --url {url} --token {token}": (
        "Configuration saved to {home}/.noid/config.toml.\nServer: {url}\nAuthenticated as 'alice' (id: {id})\n"
    ),
    "exec web -e A=1 -- sh -c 'echo $A; echo two >&2'": "1\ntwo",
    "exec --name web -- true": "",
    "checkpoint web --label new": "Checkpoint '{hex16}' created (label: new)\n",
    "checkpoint web": "Checkpoint '{hex16}' created\n",
    "checkpoints web": (
        "+------------------+--------+---------------------+\n"
        "| id               | label  | created             |\n"
        "+------------------+--------+---------------------+\n"
        f"| {ID} | before | {CREATED} |\n"
        "+------------------+--------+---------------------+\n"
    ),
    "checkpoints nope": "No checkpoints for VM 'nope'.\n",
    "checkpoints --all -q": f"{ID}\n",
    f"restore web {ID} --as copy": f"VM 'copy' restored from checkpoint '{ID}'\n",
    "restore web before --as copy": f"VM 'copy' restored from checkpoint '{ID}'\n",
    "restore 0123 --as copy": f"VM 'copy' restored from checkpoint '{ID}'\n",
    f"create copy --from {ID}": "VM 'copy' created (state: running)\n",
    "run -- echo gone": "gone",
    "fork web --as copy": "VM 'copy' forked from 'web'\n",
    "wait web --for running": "VM 'web' is running\n",
    "wait web --for exec": "VM 'web' answers\n",
    "api GET /v1/vms/web": (f'{{"name":"web","state":"running","cpus":1,"mem_mib":2048,"created_at":"{CREATED}"}}'),
    "console web --readonly --history 0": None,
    "version": None,
}
"""What commands print that work: byte by byte what the predecessor's client printed, where it had the command."""

CANNOT = {
    "stop web": "stop VMs",
    "start web": "start VMs",
    "reboot web": "reboot VMs",
    "pause web": "pause VMs",
    "resume web": "resume VMs",
    "rename web www": "rename or label VMs",
    "label web tier=front": "rename or label VMs",
    f"restore web {ID}": "put a VM back in place",
    f"rm {ID}": "remove checkpoints",
    "create new --image other": "choose images",
    "run --image other -- true": "choose images",
    "exec web -u root -- true": "run a command as another user",
    "exec web -w /srv -- true": "run a command in another directory",
    "exec web --timeout 5 -- true": "end a command after a time of yours",
    "exec web -i -- cat": "give a command input",
    "exec web -d -- true": "keep track of processes",
    "ps web": "keep track of processes",
    "attach web 8f0a12bc": "keep track of processes",
    "wait web 8f0a12bc": "keep track of processes",
    "kill web 8f0a12bc": "keep track of processes",
    "logs web": "show logs",
    "cp web:/etc/hosts hosts": "copy files",
    "port-forward web 8080:80": "forward ports",
    "open web 8080": "forward ports",
    "events": "tell of events",
    "operations": "keep track of operations",
    "quota": "tell quotas",
}
"""What that server cannot do, by command: one line says so."""

ASKS_NOBODY = {"bench", "completion", "config", "update", "doctor"}
"""Commands that are no matter of the server's, and one that lasts."""


@pytest.fixture(scope="module")
def server() -> Iterator[PredecessorServer]:
    with predecessor_server() as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(server: PredecessorServer, offline_noid: Any) -> None:
    server.forget_everything()
    server.has_vm("web", created_at=CREATED)
    server.has_vm("old", "dead", created_at=CREATED)
    server.has_checkpoint("web", "before", ID, created_at=CREATED)
    offline_noid.env |= {"NOID_URL": server.url, "NOID_TOKEN": server.token}


def filled(text: str, noid: Any, server: PredecessorServer) -> str:
    for name, value in (("url", server.url), ("token", server.token), ("home", noid.home), ("id", server.user_id)):
        text = text.replace(f"{{{name}}}", str(value))
    return text


@pytest.fixture
def typed(
    offline_noid: Any, fresh: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line in this process, as a process for each would take half a minute: code, stdout, stderr."""
    for name, value in offline_noid.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(offline_noid.cwd)

    def run(line: str) -> tuple[int, str, str]:
        code = main.run(shlex.split(line))
        sys.stdout.flush()
        stdout, stderr = capfd.readouterr()
        return code, stdout, stderr

    return run


@pytest.mark.parametrize("line", [line for line, output in WORKS.items() if output is not None])
def test_what_it_can_do_looks_as_it_always_did(
    offline_noid: Any, server: PredecessorServer, typed: Callable[[str], tuple[int, str, str]], line: str
) -> None:
    code, stdout, stderr = typed(filled(line, offline_noid, server))
    assert code == 0, stderr
    wanted = re.escape(filled(WORKS[line] or "", offline_noid, server)).replace(r"\{hex16\}", "[0-9a-f]{16}")
    assert re.fullmatch(wanted, stdout)


@pytest.mark.parametrize("line", CANNOT)
def test_what_it_cannot_do_is_said_in_one_line(
    server: PredecessorServer, typed: Callable[[str], tuple[int, str, str]], line: str
) -> None:
    before = dict(server.vms), dict(server.checkpoints)
    code, stdout, said = typed(line)
    assert code == (125 if line.split()[0] in ("exec", "run", "attach", "wait") else 1), said
    assert stdout == ""
    assert said.startswith(f"Error: the server at {server.url} (0.2.31) cannot {CANNOT[line]}")
    assert said.count("\n") == 1
    assert "(501). Nothing was done." in said
    assert (server.vms, server.checkpoints) == before


def test_every_command_is_tried_and_the_page_says_what_comes_of_it() -> None:
    tried = {shlex.split(line)[0] for line in (*WORKS, *CANNOT)}
    assert set(COMMANDS) <= tried | ASKS_NOBODY
    text = PAGE.read_text().partition("## With a server of 0.2")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `noid ([^|]+)` \| ([^|]+) \|$", text, re.MULTILINE))
    works = {re.sub(r"{(\w+)}", lambda found: found[1].upper(), line): "works" for line in WORKS}
    assert rows == works | {line: f"cannot {deed}" for line, deed in CANNOT.items()}


def test_every_route_it_does_not_know_has_words_for_what_it_cannot_do() -> None:
    known = {
        *(("GET", path) for path in ("/healthz", "/version", "/v1/whoami", "/v1/capabilities", "/v1/vms")),
        *(("GET", f"/v1/vms/<name>{rest}") for rest in ("", "/exec", "/console", "/checkpoints")),
        *(("WS", f"/v1/vms/<name>{rest}") for rest in ("/exec", "/console")),
        *(("POST", f"/v1/vms{rest}") for rest in ("", "/<name>/exec", "/<name>/checkpoints", "/<name>/restore")),
        ("DELETE", "/v1/vms/<name>"),
    }
    for route in all_routes(Mock(), Mock(), Mock()):
        path = re.sub(r"<\w+>", "x", route.path)
        deed = predecessor.cannot("GET" if route.method == "WS" else route.method, path)
        assert (deed is None) == ((route.method, route.path) in known), (route.method, route.path)


# --- what its exec does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuses_websockets", [False, True], ids=["websocket", "post"])
@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("echo out; exit 3", 3, b"out"),
        ("printf no-newline; exit 3", 3, b"no-newline"),
        ("printf no-newline", 0, b"no-newline"),
        ("printf 'NOID_EXEC_'; exit 255", 255, b"NOID_EXEC_"),
        ("exit 9", 9, b""),
        ("no-such-program", 127, b"bash: line 1: no-such-program: command not found"),
        ("kill -9 $$", 137, b""),
        ("head -c 200000 /dev/zero | tr '\\0' x; exit 1", 1, b"x" * 200000),
    ],
)
def test_exit_codes_come_out_also_where_it_lost_them(
    server: PredecessorServer, refuses_websockets: bool, command: str, code: int, output: bytes
) -> None:
    server.refuses_websockets = refuses_websockets
    done = noid.sync.Client(server.url, token=server.token).vm("web").run(["bash", "-c", command])
    assert (done.exit_code, done.stdout) == (code, output)


def test_where_it_has_no_session_left_the_command_runs_once_all_the_same(
    offline_noid: Any, server: PredecessorServer, tmp_path: Path
) -> None:
    server.refuses_websockets = True
    done = offline_noid("exec", "web", "--", "sh", "-c", f"echo run >> {tmp_path}/runs")
    assert (done.returncode, (tmp_path / "runs").read_text()) == (0, "run\n")
    assert [asked.path for asked in server.asked if asked.method == "POST"] == ["/v1/vms/web/exec"]
    assert b"cannot run a command as another user" in offline_noid("exec", "web", "-u", "root", "--", "true").stderr


def test_a_command_that_takes_too_long_there_is_124_and_one_without_a_result_125(
    offline_noid: Any, server: PredecessorServer
) -> None:
    server.exec_timeout_secs = 0.2
    done = offline_noid("exec", "web", "--", "sleep", "1")
    assert (done.returncode, done.stderr) == (124, b"exec timed out\n")
    server.drops_output = True
    done = offline_noid("exec", "web", "--", "true")
    assert done.returncode == 125
    assert b"closed the connection. The command may have ended or not" in done.stderr


@pytest.mark.parametrize("command", ["exec", "console"])
def test_a_vm_that_is_dead_or_not_there_is_not_asked_for_what_it_would_never_answer(
    offline_noid: Any, server: PredecessorServer, command: str
) -> None:
    words = ["--", "true"] if command == "exec" else []
    code = 125 if command == "exec" else 1
    done = offline_noid(command, "old", *words)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.startswith(b"Error: VM 'old' does not run: it is dead")
    done = offline_noid(command, "wbe", *words)
    assert (done.returncode, done.stdout) == (code, b"")
    assert b"VM 'wbe' not found. Did you mean 'web'?" in done.stderr


def test_input_nobody_said_i_for_is_left_alone_and_told_of(offline_noid: Any, server: PredecessorServer) -> None:
    done = offline_noid("exec", "web", "--", "echo", "yes", stdin=b"something")
    assert (done.returncode, done.stdout) == (0, b"yes")
    assert done.stderr == b"Standard input was left alone: that server cannot give a command input.\n"
    assert offline_noid("exec", "web", "-q", "--", "true", stdin=b"something").stderr == b""


def test_a_console_that_is_fed_by_a_pipe_types_and_shows(offline_noid: Any, server: PredecessorServer) -> None:
    done = offline_noid("console", "web", stdin=b"echo $((6 * 7))\n")
    assert done.returncode == 0
    assert b"42" in done.stdout


def test_an_expired_token_a_name_that_is_taken_and_a_shape_that_cannot_be_are_said_in_its_words(
    offline_noid: Any, server: PredecessorServer
) -> None:
    done = offline_noid("create", "web")
    assert (done.returncode, done.stderr) == (1, b"Error: server error (409): VM 'web' already exists\n")
    done = offline_noid("create", "new", "--cpus", "99")
    assert (done.returncode, done.stderr) == (1, b"Error: server error (500): failed to set machine config\n")
    done = offline_noid("list", NOID_TOKEN="noid_tok_" + "0" * 64)
    assert (done.returncode, b"server error (401): invalid token. It may have expired" in done.stderr) == (1, True)


def test_labels_that_it_does_not_keep_are_told_of_and_choose_nothing(
    offline_noid: Any, server: PredecessorServer
) -> None:
    done = offline_noid("create", "new", "--label", "a=b")
    assert (done.returncode, done.stdout) == (0, b"VM 'new' created (state: running)\n")
    assert b"keeps no labels" in done.stderr
    assert offline_noid("list", "--label", "a").returncode == 1
    assert offline_noid("label", "web").returncode == 1


# --- the SDK --------------------------------------------------------------------------------------------------------


def test_the_sdk_talks_to_it_too(server: PredecessorServer) -> None:
    with noid.sync.Client(server.url, token=server.token) as client:
        vm = client.create("sdk")
        done = vm.run(["sh", "-c", "printf x; exit 3"])
        assert (done.exit_code, done.stdout) == (3, b"x")
        assert vm.checkpoint(label="l").label == "l"
        with pytest.raises(ServerTooOld, match=r"\(0\.2\.31\) cannot stop VMs"):
            vm.stop()
        with pytest.raises(ServerTooOld, match="cannot run a command as another user"):
            vm.run(["true"], user="root")
        vm.destroy()
    assert "sdk" not in server.vms


async def test_so_does_its_asynchronous_face(server: PredecessorServer) -> None:
    async with noid.Client(server.url, token=server.token) as client:
        vm = await client.create("sdk")
        assert (await vm.run(["echo", "hi"])).text == "hi"
        with pytest.raises(ServerTooOld, match="cannot rename"):
            await vm.rename("other")
        await vm.destroy()
