"""The launcher: whoever it starts sees its room and nothing else, is nobody, and can become nobody else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from noid.vmmhost.enclosure import SYSTEM, Enclosure, Room
from noid.vmmhost.launcher import LAUNCHER
from noid.vmmhost.limits import Shape, limits_of

USER = (1900000007, 1900000000)

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason=f"{LAUNCHER.name} is not built")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(LAUNCHER), *arguments], capture_output=True, text=True, timeout=60, check=False)


def in_room(directory: Path, script: str, room: Room | None = None) -> str:
    enclosure = Enclosure(directory=directory, user=USER)
    enclosure.prepare(own=[], shared=[])
    argv = enclosure.command(["/usr/bin/python3", "-c", script], room or Room(read=SYSTEM, write=(directory,)))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@as_root
def test_a_process_in_a_room_is_a_user_of_its_own_and_can_do_nothing_about_it(tmp_path: Path) -> None:
    said = in_room(
        tmp_path,
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "print(os.getresuid(), os.getresgid(), os.getgroups())\n"
        "print([libc.prctl(23, n) for n in range(38)].count(0), libc.prctl(39, 0, 0, 0, 0))\n"
        "try: os.setuid(0)\n"
        "except PermissionError: print('refused')",
    )

    uid, gid = USER
    assert said.splitlines() == [f"{(uid,) * 3} {(gid,) * 3} []", "38 1", "refused"]


@as_root
def test_a_room_has_what_it_was_given_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "secret").write_text("of the host")
    said = in_room(
        tmp_path / "vm",
        f"import os\nprint(sorted(os.listdir('/')), os.listdir('/dev'), os.listdir({str(tmp_path)!r}))\n"
        "print(os.path.exists('/proc/1'), open('/dev/null', 'w').write('x'))\n"
        "for path in ('/usr/x', '/x'):\n"
        "    try: open(path, 'w')\n"
        "    except OSError as error: print(error.errno)",
        Room(read=SYSTEM, write=(tmp_path / "vm",), devices=("null",)),
    )

    shown, gone, *refusals = said.splitlines()
    assert shown.endswith("['null'] ['vm']")
    assert not {"etc/passwd", "home", "root", "proc", "sys", "run", "var"} & set(eval(shown.split("]")[0] + "]"))  # noqa: S307  # our own words
    assert gone == "False 1"
    assert refusals == ["30", "13"], "the system is read-only, and the root directory is not the process'"
    assert (tmp_path / "secret").read_text() == "of the host"


@as_root
def test_a_room_without_a_network_has_only_a_loopback_that_is_down(tmp_path: Path) -> None:
    script = "import socket\nprint([name for _, name in socket.if_nameindex()])"
    assert in_room(tmp_path, script) == "['lo']"
    connected = in_room(tmp_path, script, Room(read=SYSTEM, write=(tmp_path,), connected=True))
    here = subprocess.run(["/usr/bin/python3", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert connected == here.stdout.strip()


@as_root
def test_who_becomes_its_user_later_has_nothing_but_what_that_takes(tmp_path: Path) -> None:
    said = in_room(
        tmp_path,
        "import os\n"
        "open('/usr/bin/env').close()\n"
        f"os.setgid({USER[1]}); os.setuid({USER[0]})\n"
        "try: os.setuid(0)\n"
        "except PermissionError: print(os.getresuid())",
        Room(read=SYSTEM, write=(tmp_path,), becomes_user=True),
    )
    assert said == str((USER[0],) * 3)


def test_limits_need_no_root_and_hold_for_what_is_started(tmp_path: Path) -> None:
    limits = limits_of(Shape(cpus=2, mem_mib=100, disk_bytes=1 << 30), overhead_mib=64)
    enclosure = Enclosure(directory=tmp_path, limits=limits)
    script = "ulimit -c; ulimit -n; ulimit -f; grep NoNewPrivs /proc/self/status"
    done = subprocess.run(
        enclosure.command(["/bin/bash", "-c", script], Room()), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "4096", str(((1 << 40) + (2 << 30)) // 1024), "NoNewPrivs:", "1"]


def test_without_limits_and_user_a_program_is_started_by_nobody_else(tmp_path: Path) -> None:
    assert Enclosure(directory=tmp_path).command(["/x", "y"], Room()) == ["/x", "y"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--directory", "/nowhere", "--", "/bin/true"], "changing to /nowhere: No such file or directory"),
        (["--", "/nowhere"], "/nowhere: No such file or directory"),
        (["--limit", "7:x", "--", "/bin/true"], "7:x: not the numbers expected"),
        (["--limit", "7", "--", "/bin/true"], "7: not the numbers expected"),
        (["--wrong", "1", "--", "/bin/true"], "--wrong: no such option"),
        (["--user", "1:1", "--then", "1:1", "--", "/bin/true"], "--then: not together with --user"),
        (["--user"], "--user: needs a value"),
        ([], "--: no program is given"),
    ],
)
def test_what_fails_is_one_line_and_a_status_of_its_own(arguments: list[str], words: str) -> None:
    done = started(*arguments)
    assert (done.returncode, done.stderr) == (125, f"noid-launcher: {words}\n")


@as_root
@pytest.mark.parametrize("path", ["relative", "/nowhere"])
def test_a_room_with_something_missing_is_none(path: str) -> None:
    done = started("--room", "64", "--read", path, "--user", "7:7", "--", "/bin/true")
    assert done.returncode == 125
    assert path in done.stderr
