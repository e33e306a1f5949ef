"""File operations for disk images, on the filesystems they are for."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noid.errors import BackendError, NoidError, NoSpace
from noid.hostextents import extent_bytes
from noid.hostfs import (
    clone_file,
    filesystem_name,
    free_bytes,
    fsync_tree,
    os_errors,
    publish_directory,
    reflink,
    reflink_works,
    remove_tree,
    sparse_copy,
)
from noid.testing.loop_filesystem import loop_filesystem

MIB = 1 << 20
Filesystem = Callable[[str], Path]
every_filesystem = pytest.mark.parametrize("kind", ["ext4", "btrfs", "xfs"])
shares_blocks = pytest.mark.parametrize("kind", ["btrfs", "xfs"])


def sparse_file(path: Path, size_bytes: int, extents: dict[int, bytes]) -> Path:
    with path.open("xb") as file:
        for offset, data in extents.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size_bytes)
        os.fsync(file.fileno())
    return path


@every_filesystem
def test_a_filesystem_is_called_by_its_name(filesystem: Filesystem, kind: str) -> None:
    assert filesystem_name(filesystem(kind)) == kind


def test_memory_is_a_filesystem_and_what_does_not_exist_is_none() -> None:
    assert filesystem_name(Path("/dev/shm")) == "tmpfs"
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        filesystem_name(Path("/nowhere"))


@shares_blocks
def test_a_reflink_shares_every_block_until_one_side_is_written(filesystem: Filesystem, kind: str) -> None:
    place = filesystem(kind)
    source = sparse_file(place / "source", 16 * MIB, {0: b"a" * MIB, 8 * MIB: b"b" * MIB})
    assert reflink_works(place)
    assert reflink(source, place / "target")
    assert (place / "target").read_bytes() == source.read_bytes()
    assert extent_bytes(place / "target") == (0, 2 * MIB)
    with (place / "target").open("r+b") as file:
        file.write(b"c" * MIB)
    assert extent_bytes(place / "target") == (MIB, MIB)
    assert source.read_bytes()[:1] == b"a"


def test_where_blocks_cannot_be_shared_a_reflink_leaves_nothing(filesystem: Filesystem) -> None:
    place = filesystem("ext4")
    source = sparse_file(place / "source", MIB, {0: b"a"})
    assert not reflink_works(place)
    assert not reflink(source, place / "target")
    assert not (place / "target").exists()


def test_between_two_filesystems_a_clone_is_a_copy(filesystem: Filesystem) -> None:
    source = sparse_file(filesystem("btrfs") / "source", 16 * MIB, {8 * MIB: b"b" * MIB})
    target = filesystem("xfs") / "target"
    assert not reflink(source, target)
    assert clone_file(source, target) == MIB
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("copy", [reflink, sparse_copy, clone_file])
def test_a_copy_never_overwrites(filesystem: Filesystem, copy: Callable[[Path, Path], object]) -> None:
    place = filesystem("btrfs")
    source = sparse_file(place / "source", MIB, {0: b"a"})
    (place / "target").write_text("precious")
    with pytest.raises(FileExistsError):
        copy(source, place / "target")
    assert (place / "target").read_text() == "precious"


@every_filesystem
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size_bytes=st.integers(0, 4 * MIB),
    extents=st.dictionaries(st.integers(0, 4 * MIB), st.binary(min_size=1, max_size=9000), max_size=5),
)
def test_a_sparse_copy_reads_the_same_and_is_as_sparse(
    filesystem: Filesystem, kind: str, size_bytes: int, extents: dict[int, bytes]
) -> None:
    place = filesystem(kind)
    source = sparse_file(place / "source", size_bytes, extents)
    copied_bytes = sparse_copy(source, place / "target")
    assert (place / "target").read_bytes() == source.read_bytes()
    assert copied_bytes <= sum(len(data) + 2 * 4096 for data in extents.values())
    assert sum(extent_bytes(place / "target")) <= sum(extent_bytes(source)) + 4096


def test_a_copy_of_a_hole_copies_nothing(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source", 1 << 40, {})
    assert sparse_copy(source, tmp_path / "target") == 0
    assert (tmp_path / "target").stat().st_size == 1 << 40


def test_a_copy_can_be_ended_between_two_pieces_and_leaves_nothing(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source", 200 * MIB, {0: b"a" * 4096, 190 * MIB: b"b" * 4096})
    calls = []

    def stop_at_the_second() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparse_copy(source, tmp_path / "target", stop_at_the_second)
    assert not (tmp_path / "target").exists()


@every_filesystem
def test_the_extents_of_a_fragmented_file_are_all_counted(filesystem: Filesystem, kind: str) -> None:
    blocks = {2 * number * 4096: b"x" * 4096 for number in range(1500)}
    source = sparse_file(filesystem(kind) / "source", 16 * MIB, blocks)
    unique_bytes, shared_bytes = extent_bytes(source)
    assert 1500 * 4096 <= unique_bytes <= 16 * MIB  # xfs fills the gaps between early writes
    assert shared_bytes == 0


def test_a_full_disk_is_said_with_its_place_and_nothing_is_left(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source", 32 * MIB, {0: b"a" * 32 * MIB})
    with loop_filesystem("ext4", tmp_path, size_mib=16) as place:
        before = free_bytes(place)
        full = f"copying failed: the disk of {place} is full; free space"
        with pytest.raises(NoSpace, match=full) as raised, os_errors("copying"):
            clone_file(source, place / "target")
        assert isinstance(raised.value.__cause__, OSError)
        assert list(place.iterdir()) == []
        assert free_bytes(place) == before


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, BackendError), (errno.EACCES, BackendError)],
)
def test_system_errors_become_ours_with_the_systems_words(number: int, error: type[NoidError]) -> None:
    with pytest.raises(error, match="freezing the disk failed") as raised, os_errors("freezing the disk"):
        raise OSError(number, os.strerror(number))
    assert isinstance(raised.value.__cause__, OSError)


def test_published_is_all_of_a_directory_under_its_new_name(tmp_path: Path) -> None:
    (tmp_path / "new.partial" / "disk").mkdir(parents=True)
    (tmp_path / "new.partial" / "disk" / "file").write_text("content")
    (tmp_path / "new.partial" / "dangling").symlink_to("/nowhere")
    publish_directory(tmp_path / "new.partial", tmp_path / "new")
    assert (tmp_path / "new" / "disk" / "file").read_text() == "content"
    assert not (tmp_path / "new.partial").exists()


def test_publishing_never_replaces_what_is_there(tmp_path: Path) -> None:
    for name in ("new.partial", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish_directory(tmp_path / "new.partial", tmp_path / "new")
    assert (tmp_path / "new" / "file").read_text() == "new"
    assert (tmp_path / "new.partial" / "file").read_text() == "new.partial"


def test_syncing_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path / "gone")


def test_removing_a_tree_stops_at_links_and_can_be_repeated(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("stays")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("goes")
    (tree / "a" / "out").symlink_to(outside)
    (tree / "to-file").symlink_to(outside / "precious")
    remove_tree(tree)
    remove_tree(tree)
    assert not tree.exists()
    assert (outside / "precious").read_text() == "stays"


def test_removing_a_link_to_a_directory_removes_the_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    remove_tree(tmp_path / "link")
    assert (tmp_path / "outside").is_dir()
    assert not (tmp_path / "link").is_symlink()


def test_a_tree_may_be_removed_by_several_at_once(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / "tree" / f"d{number % 20}" / f"e{number}").mkdir(parents=True)
    errors: list[BaseException] = []

    def remove() -> None:
        try:
            remove_tree(tmp_path / "tree")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "tree").iterdir())
    assert errors == []
