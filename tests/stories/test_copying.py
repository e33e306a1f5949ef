"""``noid cp`` with a real guest at one end or both: what goes in comes out as it was, and nothing is left half done."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

BIG = 32 << 20  # long enough to be interrupted, and less than what is free on the tiny image's disk
SENT = 12 << 20  # of that, before the interruption; the interpreter's own files are in it
FREE, TOO_MUCH = 8 << 10, 16 << 20  # KiB that are left free in the full guest, and the bytes that do not fit
PART = ".noid-part"
PATIENCE_SECS = 60
ODD = b"odd \n\xff\xc3\xa4 *"


@pytest.fixture(scope="module")
def pair(shared_house: House) -> Any:
    """Two VMs for all of these, as they leave nothing behind that could be in another's way."""
    names = shared_house.create("one"), shared_house.create("two")
    yield names
    for name in names:
        shared_house.ok("destroy", name)


def furnish(tree: Path) -> None:
    """Make a tree of everything a copy has to keep."""
    (tree / "sub").mkdir(parents=True)
    (tree / "sub").chmod(0o750)
    (tree / "empty").mkdir()
    (tree / "nothing").touch()
    (tree / "full-blocks").write_bytes(os.urandom(8192))
    (tree / "program").write_bytes(b"#!/bin/sh\n")
    (tree / "program").chmod(0o751)
    (tree / "link").symlink_to("program")
    (tree / "sub" / "up").symlink_to("../nothing")
    (tree / "sub" / "twin").hardlink_to(tree / "program")
    Path(os.fsdecode(os.fsencode(tree) + b"/" + ODD)).write_text("odd")
    with (tree / "hole").open("wb") as file:
        file.seek(6 << 20)
        file.write(b"after the hole")
        file.truncate(9 << 20)
    os.utime(tree / "program", ns=(1_000_000_000_123_456_789, 1_000_000_000_123_456_789))
    os.utime(tree / "sub", ns=(5_000_000_000, 5_000_000_000))


def seen(tree: Path) -> dict[bytes, tuple[object, ...]]:
    """Return all that is to know about *tree*, by path."""
    about: dict[bytes, tuple[object, ...]] = {}
    for path in tree.rglob("*"):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = path.read_bytes()
        links = 1 if path.is_dir() else status.st_nlink
        about[os.fsencode(path.relative_to(tree))] = (status.st_mode, status.st_mtime_ns, links, content)
    return about


def test_a_tree_comes_back_from_two_vms_as_it_was(shared_house: House, pair: tuple[str, str], tmp_path: Path) -> None:
    noid, (one, two) = shared_house, pair
    tree, back = tmp_path / "tree", tmp_path / "back"
    furnish(tree)
    noid.guest(one, "mkdir /srv")
    noid.ok("cp", str(tree), f"{one}:/srv")
    assert noid.guest(one, "cat /srv/tree/link; stat -c %a /srv/tree/sub; du -k /srv/tree/hole | cut -f1") == (
        "#!/bin/sh\n750\n4"
    )
    noid.ok("cp", f"{one}:/srv/tree", f"{two}:/tree")
    noid.ok("cp", f"{two}:/tree", str(back))
    assert seen(back) == seen(tree)
    assert ODD in seen(back)
    assert (back / "hole").stat().st_blocks * 512 < 1 << 20
    noid.ok("cp", f"{one}:/srv/tree/.", str(back))
    assert seen(back) == seen(tree)

    noid.ok("cp", str(tree / "program"), f"{one}:/srv/tree/sub")
    noid.ok("cp", f"{one}:/srv/tree/sub/program", f"{two}:/renamed")
    noid.ok("cp", f"{two}:/renamed", str(tmp_path / "renamed"))
    one_file, renamed = (tree / "program").stat(), (tmp_path / "renamed").stat()
    assert (renamed.st_mode, renamed.st_mtime_ns) == (one_file.st_mode, one_file.st_mtime_ns)
    assert (tmp_path / "renamed").read_bytes() == b"#!/bin/sh\n"


def test_a_dash_is_a_tar_stream_either_way(shared_house: House, pair: tuple[str, str], tmp_path: Path) -> None:
    noid, (one, _) = shared_house, pair
    furnish(tmp_path / "tree")
    stream = subprocess.run(["tar", "c", "-C", tmp_path / "tree", "."], capture_output=True, check=True).stdout
    noid.ok("cp", "-", f"{one}:/srv/piped", stdin=stream)
    done = noid("cp", f"{one}:/srv/piped", "-")
    assert (done.code, done.err) == (0, b"")
    (tmp_path / "back").mkdir()
    subprocess.run(["tar", "x", "-S", "-C", tmp_path / "back"], input=done.out, check=True)
    # GNU tar keeps whole seconds, so the times are no news here.
    without_times = [
        {path: (mode, links, content) for path, (mode, _, links, content) in seen(tmp_path / place).items()}
        for place in ("tree", "back")
    ]
    assert without_times[0] == without_times[1]
    with tarfile.open(fileobj=BytesIO(noid("cp", f"{one}:/srv/piped/program", "-").out)) as archive:
        assert archive.getnames() == ["program"]


def test_a_full_guest_is_said_to_be_full_and_goes_on(
    shared_house: House, pair: tuple[str, str], tmp_path: Path
) -> None:
    noid, (_, two) = shared_house, pair
    (tmp_path / "trees").mkdir()
    with (tmp_path / "trees" / "file").open("wb") as file:
        file.write(bytes(TOO_MUCH))
    noid.guest(two, f"fallocate -l $(($(df -k / | awk 'END {{print $4}}') - {FREE}))k /filler")
    for source, target, left in (("trees/file", "/full", f"/full{PART}"), ("trees", "/fuller", "/fuller")):
        complaint = noid("cp", str(tmp_path / source), f"{two}:{target}").complaint
        assert "(507)" in complaint
        assert "No space left on device" in complaint
        assert noid.guest(two, f"find / -xdev \\( -name file -o -name full \\); rm -r {left}") == ""
    noid.guest(two, "rm /filler")
    noid.ok("cp", str(tmp_path / "trees"), f"{two}:/fuller")
    assert noid.guest(two, "stat -c %s /fuller/file") == str(TOO_MUCH)


@pytest.mark.parametrize("direction", ["in", "out"])
def test_an_interrupted_copy_leaves_a_part_and_is_resumed(
    shared_house: House, pair: tuple[str, str], tmp_path: Path, direction: str
) -> None:
    noid, (one, _) = shared_house, pair
    here, name = tmp_path / "big", f"big-{direction}"
    data = os.urandom(1 << 20) * (BIG >> 20)
    if direction == "in":
        here.write_bytes(data)
        words = (str(here), f"{one}:/{name}")
    else:
        noid.guest(one, f"head -c {BIG} /dev/urandom > /{name}")
        words = (f"{one}:/{name}", str(here))
    interrupted(noid, *words)
    if direction == "in":
        assert noid.guest(one, f"ls -d /{name}*") == f"/{name}{PART}"
        have = int(noid.guest(one, f"stat -c %s /{name}{PART}"))
    else:
        assert [path.name for path in tmp_path.iterdir()] == [f"big{PART}"]
        have = (tmp_path / f"big{PART}").stat().st_size
    assert 0 < have < BIG

    noid.ok("cp", "--resume", *words)
    assert noid.guest(one, f"ls -d /{name}*; sha256sum < /{name}; rm /{name}").split()[:2] == [
        f"/{name}",
        hashlib.sha256(here.read_bytes()).hexdigest(),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def interrupted(noid: House, *words: str) -> None:
    """Press Ctrl+C in the middle: when the file was read for its sum and part of it again, or some of it has come."""
    part = Path(words[1] + PART)
    with noid.start("cp", *words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as typed:
        counters = Path(f"/proc/{typed.pid}/io")
        until = time.monotonic() + PATIENCE_SECS
        while int(counters.read_text().split()[1]) < BIG + SENT and not (part.exists() and part.stat().st_size > SENT):
            assert typed.poll() is None, "it was faster than could be seen"
            assert time.monotonic() < until
            time.sleep(0.002)  # between two looks at a program that must not notice
        typed.send_signal(signal.SIGINT)
        assert typed.wait(PATIENCE_SECS) == 130


def test_a_hostile_tree_stays_in_the_directory_it_was_copied_to(
    shared_house: House, pair: tuple[str, str], tmp_path: Path
) -> None:
    noid, (one, _) = shared_house, pair
    outside, target = tmp_path / "outside", tmp_path / "in" / "side"
    outside.mkdir()
    target.parent.mkdir()
    noid.guest(
        one,
        f"mkdir -p /evil/dir; cd /evil; ln -s {outside} absolute; ln -s ../../outside relative; ln -s dir inside; "
        "mkfifo pipe; mknod device c 1 3; echo x > dir/file; chmod 4755 dir/file",
    )
    done = noid("cp", f"{one}:/evil", str(target))
    assert done.code == 1
    left_out = done.err.decode().splitlines()
    assert len(left_out) == 4
    for name in ("absolute", "relative", "pipe", "device"):
        assert any(line.startswith(f"left out: {name}: ") for line in left_out), (name, left_out)
    assert sorted(path.name for path in target.iterdir()) == ["dir", "inside"]
    assert (target / "dir" / "file").stat().st_mode & 0o7777 == 0o755

    # Nor does it leave by a link that is there already.
    (target / "dir" / "file").unlink()
    (target / "dir").rmdir()
    (target / "dir").symlink_to(outside)
    assert noid("cp", f"{one}:/evil/.", str(target)).code == 1
    assert list(outside.iterdir()) == []
