"""``noid-server`` as an admin types it: users, what goes wrong in one paragraph, and a life as a process."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import trio
import trio.lowlevel

from noid.server.command import main
from noid.testing.processes import marked_processes
from noid.testing.served import PROGRAM, SIMULATED
from noid.testing.simulated_agent import give_default_image, simulated_plugins

Server = Any  # see conftest.py
Served = Any
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data_dir: Path) -> Run:
    """Return a function that runs ``noid-server`` with its arguments; it returns exit code, stdout and stderr."""
    monkeypatch.setenv("NOID_DATA_DIR", str(data_dir))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))  # serve adds its own

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["noid-server", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """Return the one paragraph of a command that could not be carried out."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert re.fullmatch(r"(\S+Z INFO [^\n]+\n)*Error: [^\n]+\n", err), err
    return err.splitlines()[-1]


# --- users -----------------------------------------------------------------------------------------------------------


def test_the_same_under_the_names_of_the_other_manual(run: Run) -> None:
    code, token, told = run("user", "create", "alice")
    assert (code, len(token), told[:20]) == (0, 74, "User 'alice' created")
    code, other, _ = run("user", "rotate-token", "alice")
    assert (code, len(other), other == token) == (0, 74, False)
    assert run("user", "list") == run("list-users")
    code, text, _ = run("user", "create", "--help")
    assert (code, "noid-server user create alice > alice.token" in text) == (0, True)


def test_the_data_is_named_before_or_after_the_command(run: Run, data_dir: Path) -> None:
    elsewhere = str(data_dir / "elsewhere")
    run("--data-dir", elsewhere, "add-user", "alice")
    assert "alice" in run("list-users", "--data-dir", elsewhere)[1]
    assert run("list-users") == (0, "No users.\n", "")
    (data_dir / "other.toml").write_text(f"data_dir = '{elsewhere}'")
    assert "alice" in run("--config", str(data_dir / "other.toml"), "user", "list")[1]


def test_users_and_their_tokens(run: Run) -> None:
    assert run("list-users") == (0, "No users.\n", "")
    code, token, told = run("add-user", "alice")
    assert code == 0
    assert re.fullmatch(r"noid_tok_[0-9a-f]{64}\n", token)
    assert re.fullmatch(r"User 'alice' created \(id: [0-9a-f-]{36}\)\n", told)
    assert token not in told

    code, other, told = run("rotate-token", "alice")
    assert (code, told) == (0, "Token of user 'alice' replaced; the old one is invalid now.\n")
    assert re.fullmatch(r"noid_tok_[0-9a-f]{64}\n", other)
    assert other != token

    _, table, _ = run("list-users")
    assert [line.split()[1] for line in table.splitlines()] == ["NAME", "alice"]


def test_what_cannot_be_done_with_users_is_one_paragraph(run: Run) -> None:
    run("add-user", "alice")
    assert "'alice' already exists" in refused(run("add-user", "alice"))
    assert "'nobody-here'" in refused(run("rotate-token", "nobody-here"))
    assert "user name" in refused(run("add-user", "a b"))
    assert "user name" in refused(run("add-user", ""))
    assert "user name" in refused(run("add-user", "local:root"))


def test_an_admin_makes_lists_and_revokes_tokens_of_a_user(run: Run) -> None:
    run("add-user", "alice")
    code, token, told = run("token", "create", "alice", "--name", "ci", "--scope", "read", "--expires-in", "30d")
    assert code == 0
    assert re.fullmatch(r"noid_tok_[0-9a-f]{64}\n", token)
    assert re.fullmatch(r"Token 'ci' of user 'alice' allows read, until [-0-9]{10} [:0-9]{8} UTC\.\n", told)
    assert "has a token 'ci' already" in refused(run("token", "create", "alice", "--name", "ci"))
    _, table, _ = run("token", "list", "alice")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["default", "read,exec,manage"], ["ci", "read"]]
    _, listed, _ = run("token", "list", "alice", "--json")
    assert [info["scopes"] for info in json.loads(listed)] == [["read", "exec", "manage"], ["read"]]
    assert run("token", "revoke", "alice", "ci") == (0, "", "Token 'ci' of user 'alice' is invalid now.\n")
    assert "'ci' not found" in refused(run("token", "revoke", "alice", "ci"))
    assert "'bob' not found" in refused(run("token", "list", "bob"))
    assert run("token", "create", "alice", "--expires-in", "soon")[0] == 2


def test_what_admins_do_is_in_the_audit_log_and_can_be_picked_from_it(run: Run) -> None:
    run("add-user", "alice")
    run("token", "create", "alice", "--name", "ci")
    run("add-user", "alice")  # refused, so it changed nothing
    code, printed, _ = run("audit", "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert code == 0
    assert [(row["action"], row["target"]) for row in rows] == [
        ("noid-server add-user", "alice"),
        ("noid-server token create", "alice/ci"),
    ]
    assert all(row["user"].startswith("local:") for row in rows)
    _, table, _ = run("audit", "-n", "1", "--since", "1h")
    assert table.splitlines()[1:] == [table.splitlines()[-1]]
    assert table.endswith("noid-server token create alice/ci\n")
    assert run("audit", "--since", "2100-01-01")[1].count("\n") == 1
    assert run("audit", "--user", "bob")[1].count("\n") == 1
    code, _, complaint = run("audit", "--since", "yesterday")
    assert code == 2
    assert "'yesterday' is no moment. Write it as 2026-01-02, 2026-01-02T03:04 or 12h." in complaint


def test_an_admin_sees_and_changes_what_a_user_may_have(run: Run, data_dir: Path) -> None:
    (data_dir / "server.toml").write_text("[quota]\nvms = 5\n")
    run("add-user", "alice")
    assert run("quota", "alice", "--vms", "none", "--mem-mib", "4096")[0] == 0
    shown = json.loads(run("quota", "alice", "--json")[1])
    assert (shown["limits"]["vms"], shown["limits"]["mem_mib"]) == (None, 4096)
    assert shown["use"] == {"vms": 0, "vcpus": 0, "mem_mib": 0, "checkpoints": 0, "bytes": 0}
    _, table, _ = run("quota", "alice", "--vms", "default")
    assert [line.split() for line in table.splitlines()[1:4]] == [
        ["vms", "5", "0"],
        ["vcpus", "none", "0"],
        ["mem_mib", "4096", "0"],
    ]
    assert run("quota", "alice", "--vms", "-1")[0] == 2
    assert "'bob' not found" in refused(run("quota", "bob"))


async def test_a_user_is_removed_through_the_running_server_with_all_they_had(server: Server) -> None:
    token = await server.add_user("alice")
    made = await server.create("web", token=token)
    await server.create("web")
    await server.ask("POST", "/v1/vms/web/checkpoints", token=token)
    home = server.agent.services.layout.users / (await server.ask("GET", "/v1/whoami", token=token)).json()["user_id"]
    assert home.is_dir()
    processes = len(marked_processes(server.config.data_dir))

    command = [sys.executable, "-m", "noid.server", "remove-user", "alice", "--data-dir", str(server.config.data_dir)]
    done = await trio.run_process(command, capture_stderr=True)
    assert re.fullmatch(rb"User 'alice' removed, with 1 VM and 1 checkpoint: \d+\.\d MiB\.\n", done.stderr)
    assert len(marked_processes(server.config.data_dir)) == processes - 1
    assert not home.exists()
    assert [vm.id for vm in server.agent.services.store.all_vms()] != [made["id"]]
    assert (await server.refused("GET", "/v1/vms", token=token))[0] == 401
    assert [vm["name"] for vm in (await server.ask("GET", "/v1/vms")).json()] == ["web"]
    assert (await server.ask("GET", "/v1/vms", token=await server.add_user("alice"))).json() == []

    again = await trio.run_process([*command[:4], "nobody", *command[5:]], capture_stderr=True, check=False)
    assert (again.returncode, again.stderr) == (1, b"Error: user 'nobody' not found\n")


async def test_a_user_can_be_removed_while_their_vm_is_being_made(server: Server) -> None:
    token = await server.add_user("alice")
    answers: list[int] = []

    async def create() -> None:
        answers.append((await server.ask("POST", "/v1/vms", {"name": "web", "mem_mib": 128}, token=token)).status)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        while not server.agent.services.store.all_vms():  # noqa: ASYNC110  # nobody tells of a reservation
            await trio.lowlevel.checkpoint()
        assert (await server.ask("DELETE", "/v1/users/alice")).json()["vms"] == 1
    assert server.agent.services.store.all_vms() == []
    assert not marked_processes(server.config.data_dir)


async def test_nobody_is_removed_over_tcp_and_the_local_user_not_at_all(server: Server) -> None:
    token = await server.add_user("alice")
    status, code, text = await server.refused("DELETE", "/v1/users/alice", token=token)
    assert (status, code, "'admin'" in text) == (403, "scope", True)
    local = server.agent.local_user().name
    assert (await server.refused("DELETE", f"/v1/users/{local}"))[:2] == (400, "invalid")


def test_a_user_is_removed_without_a_running_server_too(
    run: Run, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("noid.core.plugins.Plugins", simulated_plugins)
    (data_dir / "server.toml").write_text(SIMULATED)
    run("add-user", "alice")
    assert run("user", "delete", "alice") == (0, "", "User 'alice' removed, with 0 VMs and 0 checkpoints: 0.0 MiB.\n")
    assert "alice" not in run("list-users")[1]
    assert "remove-user alice" in run("audit")[1]


async def test_a_user_added_beside_a_running_server_can_come_in_at_once(server: Server) -> None:
    command = [sys.executable, "-m", "noid.server", "add-user", "alice", "--data-dir", str(server.config.data_dir)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    answer = await server.ask("GET", "/v1/whoami", token=done.stdout.decode().strip())
    assert (answer.status, answer.json()["name"]) == (200, "alice")


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("listen = ", "is not valid TOML"),
        ("lisen = 1", "'lisen'"),
        ("listen = 7654", "listen"),
        ("local = true", "unknown key 'local'"),
        ('[backends]\nvmm = "nope"', "'nope'"),
        ("[plugins]\nvmm_qemu = 1", "must be a section"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_paragraph(run: Run, data_dir: Path, text: str, words: str) -> None:
    (data_dir / "server.toml").write_text(text)
    assert words in refused(run("serve"))


def test_a_configuration_that_is_not_there_is_one_paragraph(run: Run, data_dir: Path) -> None:
    assert "No such file" in refused(run("serve", "--config", str(data_dir / "nope.toml")))


def test_a_descriptor_that_is_not_open_is_one_paragraph(run: Run) -> None:
    assert "--ready-fd 999 is not an open file descriptor" in refused(run("serve", "--ready-fd", "999"))


def test_a_damaged_database_is_one_paragraph(run: Run, data_dir: Path) -> None:
    (data_dir / "noid.db").write_text("no database at all, but long enough to be looked at as one" * 20)
    assert str(data_dir / "noid.db") in refused(run("list-users"))


@pytest.mark.parametrize(
    "args", [("nope",), ("--nope",), ("user", "nope"), ("serve", "extra"), ("add-user",), ("serve", "--ready-fd", "x")]
)
def test_wrong_usage_is_2(run: Run, args: tuple[str, ...]) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: noid-server")


# --- before a start --------------------------------------------------------------------------------------------------


def test_a_configuration_is_checked_without_starting_anything(run: Run, data_dir: Path) -> None:
    (data_dir / "server.toml").write_text('listen = "0.0.0.0:7654"\nworkers = 3\n')
    code, out, err = run("check-config")
    assert code == 0
    assert [line.split(maxsplit=1)[0] for line in out.splitlines()] == ["configuration", "data", "listen", "backends"]
    assert str(data_dir / "server.toml") in out
    assert "http://0.0.0.0:7654" in out
    assert err.startswith("Note: workers = 3")
    assert [entry.name for entry in data_dir.iterdir()] == ["server.toml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('listen = "7654"', "must be host:port"),
        ('[tls]\ncertificate = "cert.pem"', "no key"),
        ('[backends]\nnetwork = "nope"', "no network backend 'nope'"),
        ('[backends]\nvmm = "nope"', "no vmm backend 'nope'"),
        ("[backends]\nexec = []", "exec is empty"),
        ("[plugins.vmm_qemuu]", "of no plugin"),
        ("[logging]\nlevel = 'loud'", "debug"),
    ],
)
def test_a_configuration_no_server_could_start_with_is_refused(run: Run, data_dir: Path, text: str, words: str) -> None:
    (data_dir / "server.toml").write_text(text)
    assert words in refused(run("check-config"))


def test_the_unit_for_systemd_names_this_program_and_the_configuration(run: Run, tmp_path: Path) -> None:
    _, elsewhere, _ = run("systemd-unit", "--data-dir", "/srv/noid")
    assert "serve --config /etc/noid/server.toml --data-dir /srv/noid\n" in elsewhere
    assert "\nReadWritePaths=/srv/noid\n" in elsewhere
    assert "StateDirectory" not in elsewhere
    (tmp_path / "other.toml").write_text('data_dir = "/srv/other"')
    assert "\nReadWritePaths=/srv/other\n" in run("systemd-unit", "--config", str(tmp_path / "other.toml"))[1]
    code, out, err = run("systemd-unit", "--config", str(tmp_path / "server.toml"))
    assert (code, err) == (0, "")
    assert "\nStateDirectory=noid\n" in out
    assert f"ExecStart={Path(sys.executable).with_name('noid-server')} serve --config {tmp_path}/server.toml\n" in out
    assert "@" not in out
    assert "KillMode=process\n" in out
    assert "\nReadWritePaths=/tmp\n" in out  # without it there is no place for temporary files
    if (systemd_analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "noid.service"
    unit.write_text(out.replace("User=noid\nGroup=noid\n", ""))
    done = subprocess.run([systemd_analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "DelegateSubgroup" not in line]  # known from 254 on
    assert "noid.service" not in "\n".join(complaints), done.stderr


# --- a life ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_server_says_that_it_is_ready_and_ends_when_asked(served: Served, signo: signal.Signals) -> None:
    process = served.start("--local")
    assert served.said == "ready\n"
    assert served.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    process.send_signal(signo)
    assert "VMs keep running" in served.end(process)
    assert process.returncode == 0
    assert not (served.data_dir / "run" / "agent.sock").exists()


def test_without_a_command_it_serves_and_says_which_file_it_took(served: Served, reserved_port: int) -> None:
    config = served.data_dir / "other.toml"
    config.write_text(
        f'[server]\nport = {reserved_port}\nworkers = 4\n[paths]\ndata_dir = "{served.data_dir}"\n'
        f'[logging]\nlevel = "info"\n{SIMULATED}'
    )
    command = [sys.executable, "-c", PROGRAM, "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    served.processes.append(process)
    assert process.stderr is not None
    said = list(iter_until(process.stderr, f"http://127.0.0.1:{reserved_port}"))
    assert any(f"configuration: {config}; data: {served.data_dir}" in line for line in said)
    assert any("[server] workers = 4 changes nothing" in line for line in said)
    assert served.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    process.terminate()
    served.end(process)
    assert process.returncode == 0


def iter_until(lines: IO[str], words: str) -> Iterator[str]:
    """Yield *lines* up to the one with *words*."""
    for line in lines:
        yield line
        if words in line:
            return


def test_a_second_signal_waits_for_no_request_and_vms_outlive_both(served: Served) -> None:
    give_default_image(served.data_dir)
    process = served.start("--local")
    body = b'{"name":"web","mem_mib":128}'
    made = served.ask(b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert made.startswith(b"HTTP/1.1 201")
    body = b'{"command":["sh","-c","echo started > /dev/shm/it; sleep 60"]}'
    head = b"POST /v1/vms/web/exec HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(served.data_dir / "run" / "agent.sock"))
        waiting.sendall(head + body)
        look = b'{"command":["cat","/dev/shm/it"]}'
        while b"started" not in served.ask(head.replace(b"%d" % len(body), b"%d" % len(look)) + look):
            pass
        process.send_signal(signal.SIGTERM)
        while (served.data_dir / "run" / "agent.sock").exists() and process.poll() is None:
            with contextlib.suppress(OSError):
                served.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                continue
            break  # it listens no more, so it has seen the first signal
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0, "the grace for requests is 10 s"
    assert len(marked_processes(served.data_dir)) == 1


def test_two_servers_of_one_directory_are_one_too_many(served: Served) -> None:
    served.start("--local")
    second = served.start("--local")
    assert served.said == ""
    assert f"\nError: another noid agent already runs on {served.data_dir}." in "\n" + served.end(second)
    assert second.returncode == 1
    assert served.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_port_in_use_is_one_paragraph_and_leaves_no_socket(served: Served) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (served.data_dir / "server.toml").write_text(f'listen = "127.0.0.1:{port}"\n{SIMULATED}')
        process = served.start()
        last = served.end(process).splitlines()[-1]
    assert last.startswith(f"Error: cannot listen on 127.0.0.1:{port}: Address already in use.")
    assert process.returncode == 1
    assert not (served.data_dir / "run" / "agent.sock").exists()
