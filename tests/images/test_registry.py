"""The registry of images: what is added is there complete or not at all, never changes, and can always go away."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from noid.core.guestbuild import cpio
from noid.core.images import Images, content_hash
from noid.core.model.images import Image
from noid.errors import Conflict, Damaged, InvalidRequest, NoidError, NoSpace, NotFound
from noid.testing.guests import FAKE_RELEASE, fake_kernel, fake_module


def test_an_image_is_found_again_with_everything_it_was_given(images: Images, kernel: Path, disk: Path) -> None:
    added = images.add(
        "web", kernel=kernel, rootfs=disk, user="alice", ready=("true",), cmdline="a=b", description="for the web"
    )

    found = Images(images.directory, {"init": b"the agent"}).get("web")

    assert found == added
    assert (found.name, found.user, found.ready, found.cmdline) == ("web", "alice", ("true",), "a=b")
    assert (found.kernel_release, found.description) == (FAKE_RELEASE, "for the web")
    assert found.kernel.read_bytes() == kernel.read_bytes()
    assert found.rootfs.read_bytes() == disk.read_bytes()
    assert found.rootfs.stat().st_blocks * 512 < disk.stat().st_size
    assert images.list() == [found]
    assert {oct(file.stat().st_mode & 0o777) for file in found.directory.iterdir()} == {"0o444"}


def test_the_initrd_is_the_users_then_the_modules_then_the_agent(
    images: Images, kernel: Path, disk: Path, tmp_path: Path
) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"compressed by somebody")
    modules = tmp_path / "lib" / "modules"
    modules.mkdir(parents=True)
    (modules / "virtio_blk.ko").write_bytes(fake_module())

    image = images.add("web", kernel=kernel, rootfs=disk, initrd=initrd, modules=tmp_path / "lib")

    assert image.initrd.read_bytes() == (
        cpio.padded(b"compressed by somebody")
        + cpio.archive({"noid/modules/00-virtio_blk.ko": fake_module()})
        + cpio.archive({"init": b"the agent"})
    )


def test_a_new_agent_reaches_images_that_were_made_before_it(images: Images, kernel: Path, disk: Path) -> None:
    before = images.add("web", kernel=kernel, rootfs=disk)

    after = Images(images.directory, {"init": b"a newer agent"}).get("web")

    assert after.initrd.read_bytes().endswith(cpio.archive({"init": b"a newer agent"}))
    assert after.digest != before.digest
    assert images.get("web") == before
    assert before.initrd.exists()  # an agent that still runs goes on using it


def test_the_digest_tells_content_apart_and_no_more(images: Images, kernel: Path, disk: Path, tmp_path: Path) -> None:
    first = images.add("first", kernel=kernel, rootfs=disk)
    dense = tmp_path / "dense.ext4"
    dense.write_bytes(disk.read_bytes())  # the same content without holes
    same = images.add("same", kernel=kernel, rootfs=dense, description="other words")
    kernel.write_bytes(fake_kernel(filling=b"."))
    other_kernel = images.add("other-kernel", kernel=kernel, rootfs=disk)
    with dense.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    other_disk = images.add("other-disk", kernel=kernel, rootfs=dense)
    other_cmdline = images.add("other-cmdline", kernel=kernel, rootfs=dense, cmdline="quiet")

    assert first.digest == same.digest
    assert len({image.digest for image in (first, other_kernel, other_disk, other_cmdline)}) == 4


def test_zeros_hash_alike_whether_they_are_holes_or_not(tmp_path: Path) -> None:
    holes, zeros, moved = tmp_path / "holes", tmp_path / "zeros", tmp_path / "moved"
    zeros.write_bytes(bytes(1 << 20) + b"data" + bytes(1 << 20))
    with holes.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
        file.truncate((2 << 20) + 4)
    moved.write_bytes(bytes((1 << 20) + 1) + b"data" + bytes((1 << 20) - 1))
    assert content_hash(holes) == content_hash(zeros) != content_hash(moved)


def test_an_image_that_is_not_there_says_how_to_make_it(images: Images) -> None:
    with pytest.raises(NotFound, match=r"noid-server image build'.*image import default"):
        images.get("default")
    with pytest.raises(NotFound, match="image build --name web"):
        images.remove("web")
    with pytest.raises(InvalidRequest, match="image name"):
        images.get("../etc")


def test_a_name_is_given_once_unless_it_is_to_be_replaced(images: Images, kernel: Path, disk: Path) -> None:
    old = images.add("web", kernel=kernel, rootfs=disk)
    in_use = os.open(old.kernel, os.O_RDONLY)
    kernel.write_bytes(fake_kernel("6.99.0"))

    with pytest.raises(Conflict, match="already an image 'web'"):
        images.add("web", kernel=kernel, rootfs=disk)
    assert images.get("web") == old
    new = images.add("web", kernel=kernel, rootfs=disk, replace=True)

    assert new.kernel_release == "6.99.0"
    assert os.pread(in_use, 4, 0) == b"\x7fELF"
    os.close(in_use)
    assert [path.name for path in images.directory.iterdir() if path.is_dir()] == ["web"]


def test_who_commands_run_as_is_known_at_once_when_an_image_was_replaced_or_has_gone(
    images: Images, kernel: Path, disk: Path
) -> None:
    images.add("web", kernel=kernel, rootfs=disk, user="alice")
    assert [images.user("web"), images.user("web")] == ["alice", "alice"]

    Images(images.directory, {}).add("web", kernel=kernel, rootfs=disk, user="carol", replace=True)
    assert images.user("web") == "carol"

    Images(images.directory, {}).remove("web")
    with pytest.raises(NotFound, match="web"):
        images.user("web")


def test_of_two_adds_of_one_name_one_wins_and_nothing_is_harmed(images: Images, kernel: Path, disk: Path) -> None:
    results: list[Image | NoidError] = []

    def add() -> None:
        try:
            results.append(images.add("web", kernel=kernel, rootfs=disk))
        except NoidError as error:
            results.append(error)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 3 + ["Image"]
    assert images.get("web") in results


def test_a_removed_image_hurts_nobody_with_a_link(images: Images, kernel: Path, disk: Path, tmp_path: Path) -> None:
    image = images.add("web", kernel=kernel, rootfs=disk)
    (tmp_path / "mine").hardlink_to(image.rootfs)

    images.remove("web")

    assert (tmp_path / "mine").read_bytes() == disk.read_bytes()
    assert images.names() == []
    with pytest.raises(NotFound):
        images.get("web")
    images.add("web", kernel=kernel, rootfs=disk)


def test_what_a_killed_add_left_does_not_count_and_goes_away(images: Images, kernel: Path, disk: Path) -> None:
    images.directory.mkdir()
    left = images.directory / ".web.abcd.partial"
    left.mkdir()
    (left / "kernel").write_bytes(b"half")

    assert images.names() == []
    images.add("web", kernel=kernel, rootfs=disk)

    assert not left.exists()


@pytest.mark.parametrize("file", ["kernel", "initrd.base", "rootfs.ext4"])
def test_a_file_of_another_size_is_damage_and_is_named(images: Images, kernel: Path, disk: Path, file: str) -> None:
    image = images.add("web", kernel=kernel, rootfs=disk)
    images.add("sound", kernel=kernel, rootfs=disk)
    (image.directory / file).chmod(0o644)
    with (image.directory / file).open("ab") as handle:
        handle.write(b"x")

    with pytest.raises(Damaged, match=f"its file {file} is .* bytes long instead of"):
        images.get("web")
    (image.directory / file).unlink()
    with pytest.raises(Damaged, match=f"its file {file} is missing"):
        images.get("web")
    assert [found.name for found in images.list()] == ["sound"]
    assert images.names() == ["sound", "web"]
    images.remove("web")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', json.dumps({"format": 99})], ids=["empty", "cut", "list", "keys", "newer"]
)
def test_a_description_that_cannot_be_read_is_damage(images: Images, kernel: Path, disk: Path, text: str) -> None:
    image = images.add("web", kernel=kernel, rootfs=disk)
    (image.directory / "image.json").unlink()
    with pytest.raises(Damaged, match=r"image\.json is missing"):
        images.get("web")
    (image.directory / "image.json").write_text(text)
    with pytest.raises(Damaged, match=r"image 'web'"):
        images.get("web")


def test_a_root_file_system_that_is_none_is_refused(images: Images, kernel: Path, disk: Path, tmp_path: Path) -> None:
    def refused(content: bytes, words: str) -> None:
        path = tmp_path / "root"
        path.write_bytes(content)
        with pytest.raises(InvalidRequest, match=words):
            images.add("web", kernel=kernel, rootfs=path)

    refused(b"", "is empty")
    refused(bytes(4096), "is not ext4. Make one with")
    refused(b"QFI\xfb" + bytes(4096), "a qcow2 disk")
    refused(b"\x28\xb5\x2f\xfd" + bytes(4096), "zstd-compressed")
    refused(bytes(510) + b"\x55\xaa" + bytes(4096), "a whole disk with partitions")
    refused(disk.read_bytes()[:-4096], "is cut off: it needs 4194304 bytes and the file has 4190208")
    with pytest.raises(InvalidRequest, match="is not there"):
        images.add("web", kernel=kernel, rootfs=tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match="is no file"):
        images.add("web", kernel=tmp_path, rootfs=disk)
    assert images.names() == []


def test_a_kernel_for_another_machine_is_refused(images: Images, kernel: Path, disk: Path) -> None:
    foreign = "aarch64" if images.add("own", kernel=kernel, rootfs=disk).architecture == "x86_64" else "x86_64"
    kernel.write_bytes(fake_kernel(architecture=foreign))
    with pytest.raises(InvalidRequest, match=f"is for {foreign}, and this host is"):
        images.add("web", kernel=kernel, rootfs=disk)


def test_modules_of_another_kernel_are_refused(images: Images, kernel: Path, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "virtio_blk.ko").write_bytes(fake_module(release="5.10.0"))
    with pytest.raises(InvalidRequest, match=rf"virtio_blk .* for kernel 5\.10\.0, but the kernel is {FAKE_RELEASE}"):
        images.add("web", kernel=kernel, rootfs=disk, modules=tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that is gone after the test."""
    place = tmp_path / "small"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"mounting a small tmpfs is not possible here: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        assert libc.umount2(bytes(place), 2) == 0


def test_a_full_disk_leaves_nothing_behind(small_disk: Path, kernel: Path, disk: Path) -> None:
    kernel.write_bytes(fake_kernel(filling=os.urandom(2 << 20)))
    images = Images(small_disk / "images", {})

    with pytest.raises(NoSpace, match="adding image 'web' failed"):
        images.add("web", kernel=kernel, rootfs=disk)

    assert images.names() == []
    assert [path.name for path in images.directory.iterdir()] == [".lock"]
