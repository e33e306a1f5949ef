"""Finding and reading what a process changed, in a real mapping of this very process."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from noid_vmm_qemu import pagemap
from noid_vmm_qemu.capture import ChangedPages
from noid_vmm_qemu.pagemap import PAGE_BYTES, Mapping, changed_runs, private_mappings, read, scanned

from noid.hostfs import clone_file

PAGES = 4096


@dataclass
class Guest:
    """A file of random bytes and our private mapping of it, in the role of a guest's memory."""

    path: Path
    memory: mmap.mmap

    @property
    def mappings(self) -> list[Mapping]:
        return private_mappings(os.getpid(), self.path.stat().st_ino)

    def write(self, page: int, pages: int = 1) -> None:
        self.memory[page * PAGE_BYTES : (page + pages) * PAGE_BYTES] = os.urandom(pages * PAGE_BYTES)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(1 << 20) * (PAGES * PAGE_BYTES >> 20))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    with memory:
        yield Guest(path, memory)


def pages_of(runs: list[pagemap.Run]) -> set[int]:
    return {page for run in runs for page in range(run.offset // PAGE_BYTES, (run.offset + run.length) // PAGE_BYTES)}


def test_what_was_never_written_is_not_found_even_if_it_was_read(guest: Guest) -> None:
    assert guest.memory[::PAGE_BYTES]

    assert changed_runs(os.getpid(), guest.mappings) == []


def test_each_written_page_is_found_and_neighbours_are_one_run(guest: Guest) -> None:
    guest.write(0)
    guest.write(7, pages=3)
    guest.write(PAGES - 1)

    runs = changed_runs(os.getpid(), guest.mappings)

    assert [(run.offset // PAGE_BYTES, run.length // PAGE_BYTES) for run in runs] == [(0, 1), (7, 3), (PAGES - 1, 1)]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_the_new_way_and_the_old_way_find_the_same_pages(guest: Guest, share: float) -> None:
    written = {page for page in range(PAGES) if random.random() < share}  # noqa: S311  no secret
    for page in written:
        guest.write(page)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        old = [run for mapping in guest.mappings for run in read(fd, mapping)]
        try:
            new = [run for mapping in guest.mappings for run in scanned(fd, mapping)]
        except OSError as error:
            pytest.skip(f"this kernel is older than 6.7: {error}")
    finally:
        os.close(fd)

    assert pages_of(old) == written
    assert pages_of(new) == written


def test_a_scan_that_fills_its_buffer_goes_on_where_it_stopped(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_REGIONS_PER_CALL", 7)
    monkeypatch.setattr(pagemap, "_ENTRIES_PER_READ", 13)
    written = set(range(0, PAGES, 3)) | {PAGES - 1}
    for page in written:
        guest.write(page)

    assert pages_of(changed_runs(os.getpid(), guest.mappings)) == written
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        assert pages_of([run for mapping in guest.mappings for run in read(fd, mapping)]) == written
    finally:
        os.close(fd)


def test_a_mapping_is_found_after_its_file_was_renamed_and_unlinked(guest: Guest, tmp_path: Path) -> None:
    inode = guest.path.stat().st_ino
    guest.path.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").unlink()

    mappings = private_mappings(os.getpid(), inode)

    assert sum(mapping.end - mapping.start for mapping in mappings) == PAGES * PAGE_BYTES


@pytest.mark.parametrize("held_bytes_max", [0, PAGE_BYTES, 100 * PAGE_BYTES + 1, 1 << 30])
def test_parent_and_changed_pages_together_are_the_memory_however_little_of_it_is_held(
    guest: Guest, tmp_path: Path, held_bytes_max: int
) -> None:
    for page, pages in ((0, 1), (10, 50), (1000, 2000), (PAGES - 1, 1)):
        guest.write(page, pages)
    expected = bytes(guest.memory)
    (into := tmp_path / "into").mkdir()

    pages_held = ChangedPages(
        os.getpid(), changed_runs(os.getpid(), guest.mappings), into / "spill", held_bytes_max=held_bytes_max
    )
    guest.write(0, PAGES)  # the guest runs on; what was taken must not change
    clone_file(guest.path, into / "memory")
    with (into / "memory").open("r+b") as image:
        pages_held.write_to(image.fileno())
    pages_held.close()

    assert pages_held.total_bytes == 2052 * PAGE_BYTES
    assert (into / "memory").read_bytes() == expected
    assert [entry.name for entry in into.iterdir()] == ["memory"]


@pytest.mark.parametrize(("reserved_pages", "used"), [(60, True), (51, True), (50, False)])
def test_memory_made_ready_before_the_pause_holds_the_changed_pages_if_it_is_large_enough(
    guest: Guest, tmp_path: Path, reserved_pages: int, used: bool
) -> None:
    guest.write(3)
    guest.write(10, 50)
    expected = bytes(guest.memory)
    reserve = mmap.mmap(-1, reserved_pages * PAGE_BYTES)

    pages_held = ChangedPages(
        os.getpid(), changed_runs(os.getpid(), guest.mappings), tmp_path / "spill", reserve=reserve
    )
    assert (reserve[:PAGE_BYTES] == expected[3 * PAGE_BYTES : 4 * PAGE_BYTES]) is used
    clone_file(guest.path, tmp_path / "image")
    with (tmp_path / "image").open("r+b") as image:
        pages_held.write_to(image.fileno())
    pages_held.close()

    assert (tmp_path / "image").read_bytes() == expected


def test_memory_is_read_through_proc_where_the_direct_way_is_forbidden(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.write(5, pages=3)
    (run,) = changed_runs(os.getpid(), guest.mappings)

    class Forbidding:
        def process_vm_readv(self, *_: object) -> int:
            pagemap.ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(pagemap, "_libc", Forbidding())
    buffer = bytearray(run.length)
    pagemap.read_memory(os.getpid(), [(run.address, len(buffer))], memoryview(buffer))

    assert buffer == guest.memory[5 * PAGE_BYTES : 8 * PAGE_BYTES]


def test_reading_what_is_not_there_says_so() -> None:
    with pytest.raises(OSError, match="reading the memory"):
        pagemap.read_memory(os.getpid(), [(4096, 4096)], memoryview(bytearray(4096)))
