"""A full disk, no QEMU, a damaged database, files that are not what they should be: what people read then."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm


@pytest.fixture
def small_house(shared_house: House, data_dir: Path, tmp_path: Path) -> Iterator[House]:
    """A house on a small ext4 of its own. Its mount, like everything below `data_dir`, goes whatever happens."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    image, place = data_dir / "ext4.img", data_dir / "d"
    place.mkdir()
    with image.open("xb") as file:
        file.truncate(900 << 20)
    for words in (["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(place)]):
        done = subprocess.run(words, capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no small filesystem can be made: {done.stderr.decode()}")
    house = type(shared_house)(place, tmp_path)
    house.furnish(shared_house)
    house.settings("[pool]\nsize = 0\n")
    yield house
    house.empty()


@contextlib.contextmanager
def full(house: House) -> Iterator[None]:
    """Leave no block of the house's disk free."""
    filling = house.data_dir / "filling"
    with filling.open("wb") as file, contextlib.suppress(OSError):
        size = 1 << 20
        while size >= 512:
            try:
                os.write(file.fileno(), bytes(size))
            except OSError:
                size //= 2
    try:
        yield
    finally:
        filling.unlink()


def test_a_full_disk_fails_create_checkpoint_and_restore_and_harms_nothing(small_house: House) -> None:
    house = small_house
    house.create("web")
    house.guest("web", "echo kept > /dev/shm/word; dd if=/dev/urandom of=/dev/shm/big bs=1M count=8 2>/dev/null")
    checkpoint = house.checkpoint("web")
    machines = house.machines()
    with full(house):
        for words in (
            ("create", "new", "--mem", "96", "--image", "tiny"),
            ("checkpoint", "web"),
            ("restore", "web", checkpoint),
            ("restore", "web", checkpoint, "--as", "new"),
        ):
            said = house(*words).complaint
            assert said.startswith("server error (507): "), (words, said)
            assert house.states() == {"web": "running"}, words
            assert house.machines() == machines, words
            assert house.strays() == [], words
        assert [c["id"] for c in house("checkpoints", "web", "--json").json] == [checkpoint]
        # QEMU pauses a guest whose own disk cannot be written any more, rather than let it lose data.
        house("exec", "web", "--timeout", "2", "--", "sh", "-c", "dd if=/dev/urandom of=/root/big bs=1M count=8; sync")
    assert house.guest("web", "sync; cat /dev/shm/word") == "kept"  # with room again it goes on by itself
    house.ok("restore", "web", checkpoint, "--as", "new")
    assert house.guest("new", "cat /dev/shm/word") == "kept"
    house.checkpoint("web")
    with full(house):
        house.ok("destroy", "new")
    assert house.states() == {"web": "running"}


@pytest.mark.usefixtures("qemu")
def test_without_qemu_the_first_command_says_what_to_install(house: House) -> None:
    house.env["PATH"] = "/nonexistent"
    said = house("create", "web", "--mem", "96", "--image", "tiny").complaint
    assert "qemu-system" in said
    assert "apt" in said
    del house.env["PATH"]
    house.create("web")
    assert house.guest("web", "echo hello") == "hello"


def test_a_damaged_database_is_named_and_the_vms_run_on(house: House) -> None:
    house.create("web")
    house.guest("web", "echo kept > /dev/shm/word")
    machines = house.machines()
    house.end_agent()
    database = house.data_dir / "noid.db"
    for leftover in house.data_dir.glob("noid.db-*"):
        leftover.unlink()
    database.write_bytes(b"this is no database" * 500)
    said = house("list").complaint
    assert str(database) in said
    assert house.machines() == machines
    database.rename(house.data_dir / "damaged")  # what the message says to do
    assert house.states() == {"web": "running"}
    assert house.guest("web", "cat /dev/shm/word") == "kept"
    assert house.machines() == machines


def test_a_kernel_that_is_none_and_a_root_that_is_none_are_refused(house: House) -> None:
    nonsense = house.cwd / "nonsense"
    nonsense.write_bytes(b"#!/bin/sh\n" * 1000)
    tiny = house.layout.images / "tiny"
    for kernel, rootfs, what in ((nonsense, tiny / "rootfs.ext4", "kernel"), (tiny / "kernel", nonsense, "ext4")):
        done = house.server("image", "import", "odd", "--kernel", str(kernel), "--rootfs", str(rootfs))
        assert done.code == 1
        assert what in done.complaint
        assert str(nonsense) in done.complaint
    assert sorted(entry.name for entry in house.layout.images.iterdir() if not entry.name.startswith(".")) == ["tiny"]


def test_an_image_that_was_damaged_is_refused_with_its_name(house: House) -> None:
    house.server("image", "import", "odd", "--kernel", str(house.layout.images / "tiny" / "kernel"),
                 "--rootfs", str(house.layout.images / "tiny" / "rootfs.ext4"))  # fmt: skip
    (house.layout.images / "odd" / "kernel").unlink()
    said = house("create", "x", "--mem", "96", "--image", "odd").complaint
    assert said.startswith("server error (500): image 'odd' is damaged: its file kernel is missing.")
    assert house.states() == {}
