"""The disk of a simulated VM: a JSON document inside the volume file, so that reflinks, copies and layers are real.

The document lies `DOCUMENT_AT` bytes into the file, behind anything a test image or an empty qcow2 layer holds; what
is before it is never read but for the backing file name in a qcow2 header. Every write counts up *sequence*, which the
guest also keeps in memory: a memory and a disk that were not frozen in one instant are found out at restore, where a
real guest would corrupt its file system weeks later.

Standard library only: this runs inside the simulated VMM process.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import struct
from pathlib import Path
from typing import Any

DOCUMENT_AT = 8 << 20
_MAGIC = b"noid-simulated-disk\0"
_HEAD = struct.Struct(f">{len(_MAGIC)}sQ")
_QCOW2 = struct.Struct(">4sIQI")  # magic, version, offset and length of the backing file's name
_DELETED = None


class SimulatedDisk:
    """Files by absolute path, on a chain of layers of which the first is written. Open files are locked as QEMU does.

    Not *locked*, they are as Firecracker leaves them: whoever opens them must see to it. With a *base*, it is a disk
    in layers: *path* lies over it, and begins as a file system in which no document is.

    Raises:
        OSError: a layer is missing, unreadable, or locked by another machine.
        ValueError: a layer's document is damaged.
    """

    def __init__(self, path: str, *, locked: bool = True, base: str | None = None) -> None:
        self.path = path
        self._layers: list[_Layer] = []
        name: str | None = path
        while name is not None:
            layer = _Layer(name, writable=not self._layers, locked=locked, formatted=base is not None)
            self._layers.append(layer)
            name = layer.backing
        if base is not None:
            self._layers.append(_Layer(base, writable=False, locked=locked))

    @property
    def sequence(self) -> int:
        """How often the disk was written since it was made."""
        return next((layer.sequence for layer in self._layers if layer.sequence is not None), 0)

    def names(self) -> set[str]:
        """The paths of all files."""
        found: set[str] = set()
        for layer in reversed(self._layers):
            for name, data in layer.files.items():
                (found.discard if data is _DELETED else found.add)(name)
        return found

    def read(self, name: str) -> bytes | None:
        """Return the content of *name*, or None."""
        for layer in self._layers:
            if name in layer.files:
                data = layer.files[name]
                return None if data is None else base64.b64decode(data)
        return None

    def write(self, name: str, data: bytes | None) -> None:
        """Replace the content of *name*; None removes it."""
        self._layers[0].files[name] = _DELETED if data is None else base64.b64encode(data).decode()
        self._layers[0].store(self.sequence + 1)

    def flush(self) -> None:
        """Reach the medium."""
        os.fsync(self._layers[0].fd)

    def pivot(self, new_top: str) -> None:
        """Write to *new_top* from now on; its backing file must be the present top. On error nothing has changed."""
        layer = _Layer(new_top, writable=True)
        old = self._layers[0]
        if layer.backing is None or not Path(layer.backing).samefile(old.path):
            os.close(layer.fd)
            raise ValueError(f"{new_top} lies over {layer.backing}, not over {old.path}, which the machine writes to")
        fcntl.flock(old.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._layers.insert(0, layer)
        self.path = new_top


class _Layer:
    """One file of the chain. *sequence* is None while nothing was ever written to it."""

    def __init__(self, path: str, *, writable: bool, locked: bool = True, formatted: bool = False) -> None:
        self.path = path
        self._formatted = formatted
        self.fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if locked:
                fcntl.flock(self.fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            self.backing = self._backing()
            self.sequence: int | None = None
            self.files: dict[str, str | None] = {}
            self._load()
        except BlockingIOError as error:
            os.close(self.fd)
            kind = "write" if writable else "shared"
            raise OSError(error.errno, f'Failed to get "{kind}" lock: another machine uses the disk', path) from error
        except BaseException:
            os.close(self.fd)
            raise

    def _backing(self) -> str | None:
        head = os.pread(self.fd, _QCOW2.size, 0)
        if len(head) < _QCOW2.size:
            return None
        magic, _version, offset, length = _QCOW2.unpack(head)
        if magic != b"QFI\xfb" or not offset:
            return None
        return str(Path(self.path).parent / os.fsdecode(os.pread(self.fd, length, offset)))

    def _load(self) -> None:
        head = os.pread(self.fd, _HEAD.size, DOCUMENT_AT)
        if len(head) < _HEAD.size or not any(head):
            return
        magic, length = _HEAD.unpack(head)
        if magic != _MAGIC and self._formatted:
            return
        text = os.pread(self.fd, length, DOCUMENT_AT + _HEAD.size)
        if magic != _MAGIC or len(text) != length:
            raise ValueError(f"{self.path} does not hold a disk this simulator wrote")
        document: dict[str, Any] = json.loads(text)
        self.sequence, self.files = document["sequence"], document["files"]

    def store(self, sequence: int) -> None:
        self.sequence = sequence
        text = json.dumps({"sequence": sequence, "files": self.files}).encode()
        block = _HEAD.pack(_MAGIC, len(text)) + text
        written = os.pwrite(self.fd, block, DOCUMENT_AT)  # one call, so that kill -9 leaves the old or the new
        if written != len(block):
            raise OSError(28, "No space left on device", self.path)
