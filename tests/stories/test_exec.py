"""A command in a VM behaves as if it ran here."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def vm(shared_house: House) -> str:
    """A VM for commands."""
    return str(shared_house.create("exec-vm"))


@pytest.fixture
def noid(shared_house: House, vm: str) -> House:
    """The command line, whose VM stays for the next story."""
    return shared_house


def sh(noid: House, script: str, **options: Any) -> Any:
    """Run a shell script in the VM."""
    return noid("exec", "exec-vm", "--", "sh", "-c", script, **options)


def runs(noid: House, vm: str, command: str) -> bool:
    """Return whether a process with that command line runs in the VM."""
    return command in [" ".join(line.split()[2:]) for line in noid.guest(vm, "ps").splitlines()]


def test_exit_codes_and_signals_come_out_as_a_shell_shows_them(noid: House) -> None:
    for code in (0, 1, 42, 123, 255):
        assert sh(noid, f"exit {code}").code == code
    for signo in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        assert sh(noid, f"kill -{int(signo)} $$").code == 128 + signo
    assert noid("exec", "exec-vm", "--", "no-such-program").code == 127
    assert noid("exec", "exec-vm", "--", "/etc/passwd").code == 126
    told = noid("exec", "exec-vm", "--json", "--", "sh", "-c", "kill -9 $$")
    assert {key: json.loads(told.out)[key] for key in ("exit_code", "signal")} == {"exit_code": 137, "signal": 9}


def test_standard_output_and_error_stay_apart_and_binary(noid: House) -> None:
    done = sh(noid, r"printf '\000\377\n\200out'; printf '\000\376err' >&2")
    assert (done.out, done.err) == (b"\x00\xff\n\x80out", b"\x00\xfeerr")


def test_input_goes_in_unchanged_and_ends(noid: House) -> None:
    data = bytes(range(256)) * 4000
    done = noid("exec", "exec-vm", "-i", "--", "sh", "-c", "sha256sum; echo end", stdin=data)
    assert done.text.split() == [hashlib.sha256(data).hexdigest(), "-", "end"]
    assert noid("exec", "exec-vm", "--", "cat", stdin=b"a pipe is meant").out == b"a pipe is meant"
    assert noid("exec", "exec-vm", "--no-stdin", "--", "cat", stdin=b"nobody asked for this").out == b""


def test_ten_megabytes_of_output_arrive_whole(noid: House) -> None:
    done = sh(
        noid,
        "dd if=/dev/urandom of=/dev/shm/big bs=1M count=10 2>/dev/null; sha256sum </dev/shm/big >&2; cat /dev/shm/big",
    )
    assert len(done.out) == 10 << 20
    assert hashlib.sha256(done.out).hexdigest() == done.err.split()[0].decode()
    sh(noid, "rm /dev/shm/big")


def test_a_command_that_takes_too_long_is_ended_in_the_guest_too(noid: House) -> None:
    done = noid("exec", "exec-vm", "--timeout", "0.5", "--", "sleep", "7301")
    assert (done.code, done.err) == (124, b"exec timed out\n")
    noid.eventually(lambda: not runs(noid, "exec-vm", "sleep 7301"))


def test_ctrl_c_ends_the_process_in_the_guest(noid: House) -> None:
    with noid.start(
        "exec", "exec-vm", "--", "sh", "-c", "echo begun; exec sleep 7302", stdout=subprocess.PIPE
    ) as running:
        assert running.stdout.readline() == b"begun\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    noid.eventually(lambda: not runs(noid, "exec-vm", "sleep 7302"))


def test_what_no_program_can_be_given_is_refused(noid: House) -> None:
    assert noid("exec", "exec-vm", "--", "printf", "%s", "a\nb c\t'\"$x").out == b"a\nb c\t'\"$x"
    assert noid("exec", "exec-vm", "-e", "V=a\nb", "--", "sh", "-c", 'printf %s "$V"').out == b"a\nb"
    for bad in (["-e", "1X=y"], ["-e", "A\nB=c"]):
        assert noid("exec", "exec-vm", *bad, "--", "true").code == 2
    for bad in (["-u", "nobody-like-that"], ["-w", "/nowhere"]):
        assert noid("exec", "exec-vm", *bad, "--", "true").code == 125
    path = "/v1/vms/exec-vm/exec"
    for body, word in (
        ({"command": ["echo", "a\0b"]}, "NUL"),
        ({"command": ["true"], "env": ["A=\0"]}, "NUL"),
        ({"command": ["true"], "env": ["A\n=1"]}, "invalid environment variable name"),
        ({"command": []}, "empty"),
        ({"command": [""]}, "empty"),
        ({}, "command"),
        (b"{", "JSON"),
    ):
        status, said = noid.http("POST", path, body)
        assert status == 400, said
        assert said["code"] == "invalid"
        assert word in said["error"]


def test_the_guest_s_agent_answers_after_all_that(noid: House) -> None:
    assert sh(noid, "echo still here").out == b"still here\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_a_command_and_its_client_go_on_when_the_agent_ends_in_the_middle(house: House, how: signal.Signals) -> None:
    house.create("web")
    machines = house.machines()
    script = "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo done; exit 3"
    with house.start(
        "exec", "web", "--", "sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout.readline() == b"begun\n"
        house.end_agent(how)
        assert house.guest("web", "touch /tmp/go; echo alive") == "alive"
        assert running.wait(60) == 3
        assert running.stdout.read() == b"done\n"
    assert house.machines() == machines


def test_who_kills_everything_in_the_guest_is_told_at_once_and_the_next_command_works(shared_house: House) -> None:
    shared_house.create("suicidal")
    done = shared_house("exec", "suicidal", "-u", "root", "--", "sh", "-c", "kill -9 -1; sleep 100")
    assert done.code == 125
    later = shared_house("exec", "suicidal", "--", "true")
    assert later.code == 0, later.err.decode()  # the guest's init has started another agent
    assert shared_house("destroy", "suicidal").code == 0
