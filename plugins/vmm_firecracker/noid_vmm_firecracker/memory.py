"""What a machine's memory consists of: an image, and what was written since, in layers that Firecracker hands out.

A Diff holds what changed since the last snapshot, and Firecracker forgets at once that it did. So a layer is kept
until an image contains it, also when nobody wants its checkpoint any more: the next one needs it. Which image the next
Diff belongs to is known to the process that has taken the last; for one that comes after it, there is a hard link in
the VM's directory, which is only there while image and Diff meet without a layer in between. Where they do not, the
next snapshot is a Full one: slower, never wrong.

Layers, with the state of the devices, are files without a name, in memory where that has room for all of a guest's,
so that a pause does not wait for a disk, else in the VM's directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.errors import BackendError
from noid.hostfs import clone_file, os_errors

MEMORY_NAME = "memory"
STATE_NAME = "state"
BASE_NAME = "memory.base"
LAYERS_MAX = 4
_RESERVE_BYTES = 512 << 20
_CHUNK_BYTES = 4 << 20
_SWAPS = Path("/proc/swaps")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What changed between two snapshots, or, *whole*, all of memory: *fd* is a file with holes.

    *state_fd* is the state of the devices at the later one: a file in memory too, because Firecracker waits until what
    it has written is on the disk, and the guest with it.
    """

    fd: int
    state_fd: int
    whole: bool

    @property
    def path(self) -> Path:
        """Where another process of this user finds the memory."""
        return _path(self.fd)

    @property
    def state_path(self) -> Path:
        """Where it finds the state."""
        return _path(self.state_fd)

    def occupied_bytes(self) -> int:
        """Return how much memory it holds."""
        return os.fstat(self.fd).st_blocks * 512

    def copy(self) -> Layer:
        """Return one more descriptor of each."""
        return Layer(os.dup(self.fd), os.dup(self.state_fd), self.whole)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
        os.close(self.state_fd)


class Lineage:
    """The memory of one machine, in the VM's *directory*: see the module. Methods that block say so."""

    def __init__(self, directory: Path, size_bytes: int, *, tracked: bool = True) -> None:
        self._tracked = tracked
        self._base_path = directory / BASE_NAME
        self.size_bytes = size_bytes
        self._base_fd = -1
        self._layers: list[Layer] = []
        self._lost: list[Layer] = []
        self._blank: tuple[int, int] | None = None  # for the memory and the state of the next layer

    def begin(self, image: Path) -> None:
        """Take note that the machine has begun with *image*. Blocks for a moment.

        Raises:
            OSError: *image* and the VM's directory are not on one filesystem.
        """
        self._base_path.unlink(missing_ok=True)
        os.link(image, self._base_path)
        self.adopt()

    def adopt(self) -> None:
        """Take note of what the agent before has left."""
        with contextlib.suppress(FileNotFoundError):
            self._base_fd = os.open(self._base_path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def may_be_capturing(self) -> bool:
        """Whether the agent before may have died in a capture. Firecracker goes on with that, and answers nobody."""
        return not self._base_path.exists()

    @property
    def needs_full(self) -> bool:
        """Whether the next snapshot must hold all of memory.

        Where KVM does not note what is written, a Diff has the pages that are in the host's memory: those that were
        written and are in its swap space would be missing.
        """
        return (self._base_fd < 0 and not self._layers) or (not self._tracked and swaps())

    def prepare(self, beside: Path) -> Layer:
        """Make what the next `next_layer` is expected to return, which then takes microseconds. Blocks for a moment."""
        if self._blank is None:
            fd = _nameless(beside, self.size_bytes)
            try:
                self._blank = fd, os.memfd_create("noid-state", os.MFD_CLOEXEC)
            except OSError:
                os.close(fd)
                raise
        return Layer(*self._blank, self.needs_full)

    def next_layer(self, beside: Path, given: tuple[int, int] | None = None) -> Layer:
        """Return an empty layer for the snapshot that is about to be taken. Blocks for a moment, unless prepared.

        It consists of the empty files *given*, for memory and state, which are its own from now on, or of nameless ones
        in memory or *beside*. From here on a death of this process makes the next snapshot a Full one.
        """
        if len(self._layers) >= LAYERS_MAX:
            self.forget()
        if given is None:
            blank = self.prepare(beside)
            given, self._blank = (blank.fd, blank.state_fd), None
        layer = Layer(*given, self.needs_full)
        try:
            self._base_path.unlink(missing_ok=True)
            os.ftruncate(layer.fd, self.size_bytes)
        except OSError:
            layer.close()
            raise
        return layer

    def forget(self) -> None:
        """Whatever the last snapshot was, it is not known any more: the next one is a Full one."""
        for layer in self._layers:
            layer.close()
        self._layers.clear()
        if self._base_fd >= 0:
            os.close(self._base_fd)
            self._base_fd = -1

    def lose(self, layer: Layer) -> None:
        """Give up a *layer* that Firecracker was told to fill, and may fill yet.

        It opens it by the number of its descriptor, so nothing else may get that number before Firecracker is past it.
        """
        os.ftruncate(layer.fd, 0)
        self._lost.append(layer)

    def add(self, layer: Layer, into: Path) -> FirecrackerCapture:
        """Take in a *layer* that Firecracker has filled, and return the capture of this instant."""
        self._close_lost()
        if layer.whole:
            self.forget()
        self._layers.append(layer)
        base = -1 if self._base_fd < 0 else os.dup(self._base_fd)
        return FirecrackerCapture(self, base, list(self._layers), into)

    def built(self, image: Path, layers: list[Layer]) -> None:
        """Take note that *image* holds all up to the last of *layers*. Blocks for a moment."""
        if self._layers[: len(layers)] != layers:
            return  # forgotten meanwhile, or let go
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        if self._base_fd >= 0:
            os.close(self._base_fd)
        self._base_fd = fd
        for layer in layers:
            layer.close()
        del self._layers[: len(layers)]
        if not self._layers:
            with contextlib.suppress(OSError):  # the VM is gone, or only this process will know: a Full one then
                self._base_path.unlink(missing_ok=True)
                os.link(image, self._base_path)

    def close(self, *, is_over: bool) -> None:
        """Let go of it all. Unless Firecracker *is_over*, what was lost stays open until this process ends."""
        self.forget()
        for fd in self._blank or ():
            os.close(fd)
        self._blank = None
        if is_over:
            self._close_lost()
        self._lost.clear()

    def _close_lost(self) -> None:
        for layer in self._lost:
            layer.close()
        self._lost.clear()


class FirecrackerCapture:
    """The `Capture` of one machine: an image and the layers over it, held until `finish` or `discard`."""

    def __init__(self, lineage: Lineage, base_fd: int, layers: list[Layer], into: Path) -> None:
        self.changed_bytes = layers[-1].occupied_bytes()
        self._lineage = lineage
        self._base_fd = base_fd
        self._originals = layers
        self._layers = [layer.copy() for layer in layers]
        self._into = into
        self._over = False

    async def finish(self) -> None:
        """Build ``memory``, and write ``state``. See `noid.core.backends.Capture.finish`."""
        if self._over:
            raise BackendError("this capture was finished or discarded already; take another one.")
        self._over = True
        try:
            with os_errors("building the memory image of a checkpoint"):
                await trio.to_thread.run_sync(self._build)
                self._lineage.built(self._into / MEMORY_NAME, self._originals)
        finally:
            self._release()

    def discard(self) -> None:
        """Free what is held. What changed stays with the machine, for its next capture."""
        self._over = True
        self._release()

    def _release(self) -> None:
        for layer in self._layers:
            layer.close()
        self._layers.clear()
        if self._base_fd >= 0:
            os.close(self._base_fd)
            self._base_fd = -1

    def _build(self) -> None:
        _write_copy(self._layers[-1].state_fd, self._into / STATE_NAME)
        image = self._into / MEMORY_NAME
        if self._base_fd >= 0:
            # By descriptor: the VM, and with it the image's name, may have been destroyed meanwhile.
            clone_file(Path(f"/proc/self/fd/{self._base_fd}"), image)
        fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, os.fstat(self._layers[0].fd).st_size)
            for layer in self._layers:
                for start, end in _data(layer.fd):
                    _copy(layer.fd, fd, start, end)
        finally:
            os.close(fd)


def _nameless(beside: Path, size_bytes: int) -> int:
    """Return a file without a name: in memory, where there is room for *size_bytes*, else on the disk of *beside*."""
    if has_room(size_bytes):
        return os.memfd_create("noid-memory", os.MFD_CLOEXEC)
    try:
        return os.open(beside, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    path = beside / f"{MEMORY_NAME}.layer"  # an older filesystem
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


def has_room(size_bytes: int) -> bool:
    """Whether so much of a guest's memory may be held in the host's."""
    return _available_bytes() > size_bytes + _RESERVE_BYTES


def _path(fd: int) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{fd}")


def _write_copy(source: int, path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _copy(source, fd, 0, os.fstat(source).st_size)
    finally:
        os.close(fd)


def swaps() -> bool:
    """Whether this host has swap space, in use or not."""
    try:
        return len(_SWAPS.read_text().splitlines()) > 1
    except FileNotFoundError:  # a kernel without swapping
        return False


def _available_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """Yield what of a file is no hole."""
    end, size = 0, os.fstat(fd).st_size
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _copy(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        view = memoryview(os.pread(source, min(_CHUNK_BYTES, end - start), start))
        if not view:
            raise OSError(errno.EIO, "a layer of a guest's memory is too short")
        while view:
            written = os.pwrite(target, view, start)
            view, start = view[written:], start + written
