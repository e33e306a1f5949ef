"""Finds and reads the pages of a process that differ from the file it maps privately.

A page of a private file mapping that was written to is no longer the file's: the kernel marks it anonymous (or it has
been swapped out). Asking for these is what makes a checkpoint cost what changed and not what there is. Linux 6.7 and
later answers with one ioctl; before, one reads eight bytes per page.

Everything here blocks, and releases the interpreter lock where it takes long.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGESIZE")

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), linux/fs.h
_PM_SCAN_ARG = struct.Struct("=12Q")
_WALK_END_AT = 32
_PAGE_IS_FILE = 1 << 2
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_REGIONS_PER_CALL = 16384
_SPANS_PER_CALL = 1024  # IOV_MAX

_ENTRY_PRESENT = 1 << 63
_ENTRY_SWAPPED = 1 << 62
_ENTRY_FILE_OR_SHARED = 1 << 61
_ENTRIES_PER_READ = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_NO_SCAN = frozenset({errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class _IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A part of a file in an address space: addresses *start* to *end* are the file from *offset* on."""

    start: int
    end: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive changed bytes: at *address* in the process, at *offset* in the file."""

    address: int
    length: int
    offset: int


def private_mappings(pid: int, inode: int) -> list[Mapping]:
    """Return where process *pid* maps the file *inode* privately and writable.

    Found by inode alone: the file may have been renamed or unlinked since, and btrfs shows another device number in
    ``maps`` than in ``stat``. The caller compares the sum with the size it expects.

    Raises:
        OSError: there is no such process, or it may not be looked into.
    """
    mappings = []
    with Path(f"/proc/{pid}/maps").open() as lines:
        for line in lines:
            span, permissions, offset, _, number = line.split(None, 5)[:5]
            if int(number) == inode and permissions.startswith("rw") and permissions.endswith("p"):
                start, _, end = span.partition("-")
                mappings.append(Mapping(start=int(start, 16), end=int(end, 16), offset=int(offset, 16)))
    return mappings


def changed_runs(pid: int, mappings: list[Mapping]) -> list[Run]:
    """Return what of *mappings* process *pid* has written to. It must not run meanwhile, or the answer is a mixture.

    Raises:
        OSError: there is no such process, or it may not be looked into.
    """
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            return [run for mapping in mappings for run in scanned(fd, mapping)]
        except OSError as error:
            if error.errno not in _NO_SCAN:
                raise
        return [run for mapping in mappings for run in read(fd, mapping)]
    finally:
        os.close(fd)


def read_memory(pid: int, spans: Sequence[tuple[int, int]], buffer: memoryview) -> None:
    """Fill *buffer* with what process *pid* has at *spans*, (address, length) each, one after the other.

    A kernel call for a thousand spans, because changed pages lie scattered and the guest stands still meanwhile.

    Raises:
        OSError: it has nothing there, or may not be looked into.
    """
    filled = 0
    for first in range(0, len(spans), _SPANS_PER_CALL):
        part = spans[first : first + _SPANS_PER_CALL]
        length = sum(span[1] for span in part)
        count = _read_spans(pid, part, buffer[filled : filled + length])
        if count != length:
            # What a page fault or a limit cut short, and what some sandboxes forbid, the file gives, at a third of
            # the speed.
            _read_file(pid, part, buffer[filled : filled + length])
        filled += length


def _read_spans(pid: int, spans: Sequence[tuple[int, int]], buffer: memoryview) -> int:
    """Return how many bytes ``process_vm_readv`` gave; 0 where it is not allowed."""
    local = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    remote = array("Q", [number for span in spans for number in span])  # struct iovec: base, length
    here = _IoVec(ctypes.addressof(local), len(buffer))
    there = ctypes.c_void_p(remote.buffer_info()[0])
    count = int(_libc.process_vm_readv(pid, ctypes.byref(here), 1, there, len(spans), 0))
    if count < 0:
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EPERM):
            raise OSError(number, f"reading the memory of process {pid}: {os.strerror(number)}")
        return 0
    return count


def _read_file(pid: int, spans: Sequence[tuple[int, int]], buffer: memoryview) -> None:
    filled = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as file:
        for address, length in spans:
            done = 0
            while done < length:
                file.seek(address + done)
                count = file.readinto(buffer[filled + done : filled + length])
                if not count:
                    raise OSError(errno.EIO, f"the memory of process {pid} ended early; it may have died")
                done += count
            filled += length


def scanned(pagemap_fd: int, mapping: Mapping) -> Iterator[Run]:
    """Yield the changed runs of *mapping* by PAGEMAP_SCAN.

    Raises:
        OSError: with ``ENOTTY`` or the like where the kernel is older than 6.7.
    """
    regions = array("Q", bytes(8 * 3 * _REGIONS_PER_CALL))
    address, _ = regions.buffer_info()
    start = mapping.start
    while start < mapping.end:
        request = bytearray(
            _PM_SCAN_ARG.pack(
                _PM_SCAN_ARG.size,
                0,
                start,
                mapping.end,
                0,
                address,
                _REGIONS_PER_CALL,
                0,
                _PAGE_IS_FILE,  # inverted below: not the file's own page
                _PAGE_IS_FILE,
                _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,
                _PAGE_IS_FILE,
            )
        )
        found = fcntl.ioctl(pagemap_fd, _PAGEMAP_SCAN, request)
        for index in range(0, 3 * found, 3):
            first = regions[index]
            yield Run(address=first, length=regions[index + 1] - first, offset=mapping.offset + first - mapping.start)
        walked_to: int = struct.unpack_from("=Q", request, _WALK_END_AT)[0]
        if walked_to <= start:
            raise OSError(errno.EIO, "PAGEMAP_SCAN does not get on")
        start = walked_to


def read(pagemap_fd: int, mapping: Mapping) -> Iterator[Run]:
    """Yield the changed runs of *mapping* by reading its page table entries: any kernel, a few times slower."""
    page = mapping.start // PAGE_BYTES
    last = mapping.end // PAGE_BYTES
    run_start: int | None = None
    while page < last:
        entries = array("Q")
        entries.frombytes(os.pread(pagemap_fd, 8 * min(_ENTRIES_PER_READ, last - page), 8 * page))
        if not entries:
            raise OSError(errno.EIO, "the page map ended early")
        for entry in entries:
            changed = entry & (_ENTRY_PRESENT | _ENTRY_SWAPPED) and not entry & _ENTRY_FILE_OR_SHARED
            if changed and run_start is None:
                run_start = page
            elif not changed and run_start is not None:
                yield _run(mapping, run_start, page)
                run_start = None
            page += 1
    if run_start is not None:
        yield _run(mapping, run_start, last)


def _run(mapping: Mapping, first_page: int, end_page: int) -> Run:
    address = first_page * PAGE_BYTES
    return Run(
        address=address,
        length=(end_page - first_page) * PAGE_BYTES,
        offset=mapping.offset + address - mapping.start,
    )
