"""What a checkpoint takes from a paused machine's memory, and how the memory image is built from it afterwards.

The changed pages are thought of as one sequence of bytes, run after run. Its beginning is held in memory, what is over
`HELD_BYTES_MAX` goes to a file beside the image: a freshly booted guest may have changed gigabytes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import trio

from noid.errors import BackendError
from noid.hostfs import clone_file, os_errors
from noid_vmm_qemu.pagemap import Run, changed_runs, private_mappings, read_memory

HELD_BYTES_MAX = 128 << 20
RESERVE_BYTES = 16 << 20
MEMORY_NAME = "memory"
STATE_NAME = "state"
SPILL_NAME = "memory.spill"
_CHUNK_BYTES = 4 << 20


class ChangedPages:
    """The changed pages of one process at one instant. Blocks throughout; made and used in worker threads."""

    def __init__(
        self,
        pid: int,
        runs: list[Run],
        spill_path: Path,
        held_bytes_max: int = HELD_BYTES_MAX,
        reserve: mmap.mmap | None = None,
    ) -> None:
        self.runs = runs
        self.total_bytes = sum(run.length for run in runs)
        self._held_bytes = min(self.total_bytes, held_bytes_max)
        self._held: mmap.mmap | None = None
        self._spill_fd: int | None = None
        try:
            if reserve is not None and 0 < self._held_bytes <= len(reserve):
                self._held = reserve
            elif self._held_bytes:
                self._held = mmap.mmap(-1, self._held_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with contextlib.suppress(OSError):  # a kernel without huge pages only takes longer
                    self._held.madvise(mmap.MADV_HUGEPAGE)  # a fault per page would take longer than the copying
            self._read(pid, spill_path)
        except BaseException:
            self.close()
            raise

    def write_to(self, image_fd: int) -> None:
        """Put every changed page where it belongs in the image."""
        position = 0
        view = memoryview(self._held) if self._held is not None else memoryview(b"")
        with view:
            for run in self.runs:
                for done, length in _chunks(run.length):
                    _write_at(image_fd, self._bytes(view, position, length), run.offset + done)
                    position += length

    def close(self) -> None:
        """Free memory and spill file. Closing twice does nothing."""
        if self._held is not None:
            self._held.close()
            self._held = None
        if self._spill_fd is not None:
            os.close(self._spill_fd)  # the file has no name any more, so this frees it
            self._spill_fd = None

    def _read(self, pid: int, spill_path: Path) -> None:
        held, rest = _split([(run.address, run.length) for run in self.runs], self._held_bytes)
        if self._held is not None:
            with memoryview(self._held)[: self._held_bytes] as view:
                read_memory(pid, held, view)
        for address, span in rest:
            for done, length in _chunks(span):
                self._spill(pid, address + done, length, spill_path)

    def _spill(self, pid: int, address: int, length: int, path: Path) -> None:
        if self._spill_fd is None:
            self._spill_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()  # nobody else needs it, and so nobody has to remove it
        buffer = memoryview(bytearray(length))
        read_memory(pid, [(address, length)], buffer)
        while buffer:
            buffer = buffer[os.write(self._spill_fd, buffer) :]

    def _bytes(self, view: memoryview, position: int, length: int) -> bytes | memoryview:
        kept = max(0, min(length, self._held_bytes - position))
        if kept == length:
            return view[position : position + length]
        data = bytearray(view[position : position + kept])
        assert self._spill_fd is not None  # noqa: S101  what was not kept was spilled
        offset = position + kept - self._held_bytes
        while len(data) < length:
            part = os.pread(self._spill_fd, length - len(data), offset)
            if not part:
                raise OSError(errno.EIO, "the file of spilled memory pages is too short")
            data += part
            offset += len(part)
        return bytes(data)


class QemuCapture:
    """The `Capture` of one machine. Holds memory until `finish` or `discard`."""

    def __init__(self, pages: ChangedPages, parent_fd: int, into: Path) -> None:
        self.changed_bytes = pages.total_bytes
        self._pages = pages
        self._parent_fd = parent_fd
        self._into = into
        self._finished = False

    async def finish(self) -> None:
        """Build ``memory`` from the parent image and what changed. See `noid.core.backends.Capture.finish`."""
        if self._finished or self._parent_fd < 0:
            raise BackendError("this capture was finished or discarded already; take another one.")
        self._finished = True
        try:
            with os_errors("building the memory image of a checkpoint"):
                await trio.to_thread.run_sync(self._build)
        finally:
            self.discard()

    def discard(self) -> None:
        """Free what is held. See `noid.core.backends.Capture.discard`."""
        self._pages.close()
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
            self._parent_fd = -1

    def _build(self) -> None:
        image = self._into / MEMORY_NAME
        # By descriptor: the VM, and with it the parent's name, may have been destroyed meanwhile.
        clone_file(Path(f"/proc/self/fd/{self._parent_fd}"), image)
        image_fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._pages.write_to(image_fd)
        finally:
            os.close(image_fd)


def reserve_memory() -> mmap.mmap:
    """Return memory for the changed pages of an ordinary checkpoint, present already. Blocks.

    The kernel may have to make room for large pages first, which takes longer than everything else in a pause.
    """
    memory = mmap.mmap(-1, RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages only takes longer
        memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, RESERVE_BYTES, mmap.PAGESIZE):
        memory[offset] = 0
    return memory


def take(pid: int, parent: Path, mem_mib: int, into: Path, reserve: mmap.mmap | None = None) -> QemuCapture:
    """Take hold of what process *pid* has changed of its *parent* image. Blocks; the process must be paused.

    *reserve* is used where it is large enough.

    Raises:
        BackendError: the process does not map *parent* as expected.
        OSError: reading or spilling failed; nothing is left.
    """
    parent_fd = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mappings = private_mappings(pid, os.fstat(parent_fd).st_ino)
        mapped_bytes = sum(mapping.end - mapping.start for mapping in mappings)
        if mapped_bytes != mem_mib << 20:
            raise BackendError(
                f"process {pid} maps {mapped_bytes} bytes of {parent}, not the {mem_mib} MiB of its VM, so its memory "
                "cannot be captured. The VM goes on."
            )
        pages = ChangedPages(pid, changed_runs(pid, mappings), into / SPILL_NAME, reserve=reserve)
    except BaseException:
        os.close(parent_fd)
        raise
    return QemuCapture(pages, parent_fd, into)


def _split(spans: list[tuple[int, int]], size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the first *size* bytes of *spans* (address, length), and the others."""
    first: list[tuple[int, int]] = []
    for index, (address, length) in enumerate(spans):
        if length > size:
            begun = [(address, size)] if size else []
            return first + begun, [(address + size, length - size), *spans[index + 1 :]]
        first.append((address, length))
        size -= length
    return first, []


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    for done in range(0, length, _CHUNK_BYTES):
        yield done, min(_CHUNK_BYTES, length - done)


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count
