"""Checkpoints, and disks as a storage backend has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

LAYERS = "layers"
"""The format of disks that are put together in the guest: see `Volume`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A frozen VM: memory, devices, disk. It belongs to its owner and outlives its VM.

    *id* is 16 lowercase hex digits. *parent* is the checkpoint its VM was restored from, so history is a graph.
    """

    id: str
    owner: str
    vm_id: str
    vm_name: str
    label: str | None
    cpus: int
    mem_mib: int
    image: str
    parent: str | None
    created_at: datetime
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A VM's writable disk: *files* in *directory*, of which the VMM opens *top*. *format* is one of three.

    ``raw`` and ``qcow2`` are one disk, ``layers`` are two raw ones: the first of *files* is an image's root file system
    that every VM made from it reads and none writes, *top* a file system of its own over it. The VMM adds the first as
    a second disk, read-only, and names it to the guest's first program as ``noid.base=``: that puts them together.
    """

    directory: Path
    format: str
    top: str
    files: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file the VMM opens for writing."""
        return self.directory / self.top

    @property
    def base_path(self) -> Path | None:
        """The file of ``layers`` that is shared and only read. Other formats have none, or the VMM finds it itself."""
        return _base_path(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenDisk:
    """An immutable disk: *files* in *directory*, self-contained, of which *top* is the one to clone."""

    directory: Path
    format: str
    top: str
    files: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file that stands for the whole disk."""
        return self.directory / self.top

    @property
    def base_path(self) -> Path | None:
        """As `Volume.base_path`."""
        return _base_path(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """Bytes on the host: *unique* would be freed by deleting the thing, *shared* are used by others too."""

    unique_bytes: int
    shared_bytes: int


def _base_path(disk: Volume | FrozenDisk) -> Path | None:
    return disk.directory / disk.files[0] if disk.format == LAYERS else None
