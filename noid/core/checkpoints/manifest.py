"""A checkpoint's manifest: what it consists of, what it needs, and how damage or a foreign host is noticed.

``manifest.json`` is written last; a directory without a valid one is no checkpoint. It holds no absolute path and no
host name, so a checkpoint's directory can be moved. Beside it lies ``seal.json``: size, inode and modification time of
each file as noid left them. A restore compares the seal, which costs microseconds; where it differs (the directory was
moved, or somebody wrote to a file) the digest decides, and a file without one is refused.

Digests cover a file's length and its data extents, so holes cost nothing. A disk that is one raw file has none: hashing
it would cost every checkpoint seconds; its seal notices each write through the filesystem, and a copy of it is refused.
Layers are immutable, the raw one at the bottom too: each is read once and its digest handed on, so they can be copied.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from noid.core.model.storage import FrozenDisk
from noid.errors import Damaged, Incompatible, NotFound

FORMAT = 1
_NAME = "manifest.json"
_SEAL = "seal.json"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file: its length in bytes and, where it has one, the digest of its data."""

    size: int
    digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a frozen VM is. *fingerprint* is the VMM's; *disk_top* names the one of *files* that stands for the disk.

    *exec* names the exec backend that reached its guest; empty where that is not known.
    """

    id: str
    vm_id: str
    vm_name: str
    label: str | None
    parent: str | None
    created_at: datetime
    cpus: int
    mem_mib: int
    image: str
    image_digest: str
    kernel_release: str
    network: str
    fingerprint: Mapping[str, str]
    exec: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    disk_format: str = ""
    disk_top: str = ""
    disk_files: tuple[str, ...] = ()
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    def disk(self, directory: Path) -> FrozenDisk:
        """Return the disk, which lies in *directory*."""
        return FrozenDisk(
            directory=directory / "disk", format=self.disk_format, top=self.disk_top, files=self.disk_files
        )


def describe_files(directory: Path, disk: FrozenDisk, known: Mapping[str, FileFacts]) -> dict[str, FileFacts]:
    """Return the facts of everything in a checkpoint's *directory*. Reads memory and layers: call it in a thread.

    Immutable layers that are in *known* with the same size are not read again.
    """
    facts = {name: _facts(directory / name) for name in ("state", "memory")}
    for name in disk.files:
        path = f"disk/{name}"
        size = (directory / path).stat().st_size
        if disk.format == "raw":
            facts[path] = FileFacts(size=size, digest=None)
        elif path in known and known[path].size == size:
            facts[path] = known[path]
        else:
            facts[path] = _facts(directory / path)
    return facts


def with_files(manifest: Manifest, disk: FrozenDisk, files: Mapping[str, FileFacts]) -> Manifest:
    """Return *manifest* completed with its disk and the facts of its files."""
    return replace(manifest, disk_format=disk.format, disk_top=disk.top, disk_files=disk.files, files=files)


def write(directory: Path, manifest: Manifest) -> None:
    """Write manifest and seal into *directory*, everything else being there. The caller fsyncs and renames it."""
    (directory / _SEAL).write_text(json.dumps({name: _seal(directory / name) for name in manifest.files}))
    (directory / _NAME).write_text(_text(manifest))


def path_in(directory: Path) -> Path:
    """Return where the manifest of a checkpoint in *directory* is. Without one it is none."""
    return directory / _NAME


def amend(directory: Path, **changes: Any) -> None:
    """Replace fields of the manifest in *directory*, at one instant and durably. Not those about files: no seal.

    Raises:
        NotFound, Damaged: see `read`.
        OSError: the manifest is as it was.
    """
    manifest = replace(read(directory), **changes)
    partial = directory / f"{_NAME}.partial"
    with partial.open("w") as file:
        file.write(_text(manifest))
        file.flush()
        os.fsync(file.fileno())  # a name that a power cut leaves without content would be a lost checkpoint
    partial.rename(directory / _NAME)


def read(directory: Path) -> Manifest:
    """Read *directory*'s manifest.

    Raises:
        NotFound: there is none, so there is no checkpoint.
        Damaged: it is not what was written, or of a format this noid does not know.
    """
    path = directory / _NAME
    try:
        document = json.loads(path.read_text())
        body = document["manifest"]
        if document["digest"] != _json_digest(body):
            raise Damaged(f"{_NAME} of checkpoint {directory.name} was changed after it was written. {_LOST}")
        if body.pop("format") != FORMAT:
            raise Damaged(f"{_NAME} of checkpoint {directory.name} has a format of another noid version. Upgrade noid.")
        created_at = datetime.fromisoformat(body.pop("created_at"))
        files = {name: FileFacts(**facts) for name, facts in body.pop("files").items()}
        return _complete(Manifest(**_tuples(body), files=files, created_at=created_at))
    except FileNotFoundError as error:
        raise NotFound(f"checkpoint {directory.name!r} not found: it has no manifest") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{_NAME} of checkpoint {directory.name} cannot be read: {error}. {_LOST}") from error


def verify(directory: Path, manifest: Manifest, fingerprint: Mapping[str, str], disk_formats: frozenset[str]) -> None:
    """Let a restore pass if this host can continue it and no file has changed. May read files: use a thread.

    Raises:
        Incompatible: names the field that differs and both values.
        Damaged: names the file.
    """
    # In the VMM's own order: what it names first explains what follows.
    for what in (*fingerprint, *sorted(manifest.fingerprint.keys() - fingerprint.keys())):
        theirs, ours = manifest.fingerprint.get(what), fingerprint.get(what)
        if theirs != ours:
            raise Incompatible(
                f"checkpoint {manifest.id} cannot continue here: {what} was {theirs!r} when it was taken and is "
                f"{ours!r} on this host. Restore it where {what} is the same."
            )
    if manifest.disk_format not in disk_formats:
        raise Incompatible(
            f"checkpoint {manifest.id} cannot continue here: its disk_format is {manifest.disk_format!r} and the "
            f"storage backend takes {', '.join(sorted(disk_formats))}. Select another one in server.toml [backends]."
        )
    try:
        seal = json.loads((directory / _SEAL).read_text())
    except (OSError, ValueError):
        seal = None
    if not isinstance(seal, dict):
        seal = {}  # then the digests decide
    for name, facts in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != facts.size:
                raise Damaged(_changed(manifest.id, name, f"it has {size} bytes instead of {facts.size}"))
            if seal.get(name) == _seal(path):
                continue
            if facts.digest is None:
                raise Damaged(_changed(manifest.id, name, "it was written to, moved or replaced, and has no digest"))
            if data_digest(path) != facts.digest:
                raise Damaged(_changed(manifest.id, name, "its content differs from its digest"))
        except OSError as error:
            raise Damaged(_changed(manifest.id, name, error.strerror or repr(error))) from error


def data_digest(path: Path) -> str:
    """Return the digest of a file's length and data extents (BLAKE2b, 128 bits). Blocking; releases the GIL."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        buffer = bytearray(_BLOCK)
        view = memoryview(buffer)
        zeros = bytes(_BLOCK)
        offset = 0
        while offset < size:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole until the end
                    raise
                break
            offset -= offset % _BLOCK  # blocks at fixed offsets: the digest must not depend on where extents begin
            count = _fill(file.fileno(), view, offset)
            if view[:count] != zeros[:count]:  # a block of zeros equals a hole: copies may turn one into the other
                digest.update(offset.to_bytes(8, "little"))
                digest.update(view[:count])
            offset += _BLOCK
    return digest.hexdigest()


def _fill(fd: int, view: memoryview, offset: int) -> int:
    """Read from *offset* until *view* is full or the file ends, and return how many bytes there were."""
    count = 0
    while count < len(view) and (more := os.preadv(fd, [view[count:]], offset + count)):
        count += more
    return count


_LOST = "This checkpoint cannot be trusted any more; use another one or bring back its files from a copy."


def _complete(manifest: Manifest) -> Manifest:
    """Return *manifest* if it names everything a restore opens, and nothing outside its directory.

    Raises:
        ValueError: what is missing or does not belong there.
    """
    names = {"state", "memory", *(f"disk/{name}" for name in manifest.disk_files)}
    if manifest.files.keys() != names or manifest.disk_top not in manifest.disk_files:
        raise ValueError(f"it lists the files {', '.join(sorted(manifest.files))}, not {', '.join(sorted(names))}")
    if any("/" in name or name in ("", ".", "..") for name in manifest.disk_files):
        raise ValueError("a file of its disk lies elsewhere")
    return manifest


def _changed(checkpoint: str, name: str, how: str) -> str:
    return f"checkpoint {checkpoint} is damaged: {name}: {how}. {_LOST}"


def _text(manifest: Manifest) -> str:
    body = asdict(manifest) | {"format": FORMAT, "created_at": manifest.created_at.isoformat()}
    return json.dumps({"manifest": body, "digest": _json_digest(body)}, indent=1, sort_keys=True) + "\n"


def _facts(path: Path) -> FileFacts:
    return FileFacts(size=path.stat().st_size, digest=data_digest(path))


def _seal(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns]


def _json_digest(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tuples(body: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in body.items()}
