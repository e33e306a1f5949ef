"""Chains of disk layers as files in one directory: their names, and an empty qcow2 layer as bytes. No processes.

A chain is a raw base and qcow2 layers above it, named ``disk-<depth>-<8 hex>``: the depth orders them, the hex keeps
layers of different VMs apart, and both stay the same in every directory a layer is linked into, because the layer above
holds the name in its header::

    disk-0000-5e0c1a2b.raw      the base: a hard link to the image's root filesystem
    disk-0001-91d3f00c.qcow2    frozen: linked in the VM that wrote it, in its checkpoints and in their clones
    disk-0002-c4a7be10.qcow2    the top: the highest depth; the only one that is ever written

An empty layer is written here and not by ``qemu-img create``: that costs a process (5 ms and more on a busy host) on
the path of every clone, for 100 bytes. docs/interop/qcow2.txt of QEMU is the specification.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from noid.errors import Damaged

_NAME = re.compile(r"disk-(\d{4})-([0-9a-f]{8})\.(raw|qcow2)")

_CLUSTER_BITS = 16
_CLUSTER_BYTES = 1 << _CLUSTER_BITS
_L1_REACH_BYTES = _CLUSTER_BYTES // 8 * _CLUSTER_BYTES  # guest bytes one L1 entry stands for
_MAGIC = b"QFI\xfb"
# magic, version, backing name (offset, length), cluster_bits, size, encryption, L1 (entries, offset), refcount table
# (offset, clusters), snapshots (count, offset), features (incompatible, compatible, autoclear), refcount_order, length
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_REFCOUNT_ORDER = 4  # 16 bits each


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Layer:
    """One file of a chain, as its name tells."""

    depth: int
    name: str

    @property
    def format(self) -> str:
        """``raw`` for a base, ``qcow2`` for everything above."""
        return self.name.rpartition(".")[2]


def layer_of(name: str) -> Layer | None:
    """Return what *name* says, or None if it is no layer's name."""
    match = _NAME.fullmatch(name)
    return Layer(depth=int(match[1]), name=name) if match else None


def layers_in(directory: Path) -> list[Layer]:
    """Return every layer file in *directory*, by depth; an absent directory has none."""
    try:
        names = os.listdir(directory)  # noqa: PTH208  names, not paths
    except FileNotFoundError:
        return []
    return sorted(layer for name in names if (layer := layer_of(name)))


def checked_chain(layers: Iterable[Layer], directory: Path) -> list[Layer]:
    """Return *layers*, deepest first, if they are one complete chain.

    Raises:
        Damaged: there is none, one is missing or one is too many; says which.
    """
    chain = sorted(layers)
    if not chain:
        raise Damaged(
            f"there is no disk layer in {directory}: it was removed, or made by another storage backend than "
            "'overlay'. See [backends] storage in server.toml."
        )
    for depth, layer in enumerate(chain):
        if layer.depth > depth:
            raise Damaged(f"the disk in {directory} lacks its layer {depth}, which {layer.name} lies upon.")
        if layer.depth < depth:
            raise Damaged(
                f"the disk in {directory} has two layers {layer.depth}: {chain[depth - 1].name}, {layer.name}."
            )
        if (layer.format == "raw") is not (depth == 0):
            raise Damaged(f"the disk in {directory} has a {layer.format} layer at depth {depth}: {layer.name}.")
    return chain


def base_name(image: Path) -> str:
    """Return the name of *image* as a base: the same for the same file, without reading it."""
    facts = image.stat()
    identity = f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns}".encode()
    return f"disk-0000-{hashlib.blake2s(identity, digest_size=4).hexdigest()}.raw"


def new_name(depth: int) -> str:
    """Return a name nothing else has for a layer at *depth*."""
    return f"disk-{depth:04}-{secrets.token_hex(4)}.qcow2"


def virtual_bytes(path: Path) -> int:
    """Return how large the guest sees the disk whose top is *path*.

    Raises:
        Damaged: it is named qcow2 and is not.
    """
    if path.suffix != ".qcow2":
        return path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise Damaged(f"{path} is not a qcow2 file.")
    size: int = _HEADER.unpack(head)[5]
    return size


def write_empty_layer(path: Path, backing: Layer, size_bytes: int) -> None:
    """Make the new file *path*, a layer that holds nothing, over *backing* in the same directory.

    Raises:
        FileExistsError: *path* exists.
        OSError: no *path* is left.
    """
    size_bytes = -(-size_bytes // 512) * 512  # qcow2 counts sectors
    l1_entries = max(1, -(-size_bytes // _L1_REACH_BYTES))
    l1_clusters = -(-l1_entries * 8 // _CLUSTER_BYTES)
    backing_name = backing.name.encode()
    backing_format = backing.format.encode()
    extensions = (
        _EXTENSION.pack(_BACKING_FORMAT, len(backing_format))
        + backing_format.ljust(-(-len(backing_format) // 8) * 8, b"\0")
        + _EXTENSION.pack(0, 0)
    )
    # Cluster 0 header and backing name, 1 refcount table, 2 its only block, 3 and up the L1 table: zeros, so a hole.
    header = _HEADER.pack(
        _MAGIC, 3, _HEADER.size + len(extensions), len(backing_name), _CLUSTER_BITS, size_bytes, 0,
        l1_entries, 3 * _CLUSTER_BYTES, _CLUSTER_BYTES, 1, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER.size,
    )  # fmt: skip
    clusters = 3 + l1_clusters
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, clusters * _CLUSTER_BYTES)
        for block, cluster in (
            (header + extensions + backing_name, 0),
            (struct.pack(">Q", 2 * _CLUSTER_BYTES), 1),
            (struct.pack(">H", 1) * clusters, 2),
        ):
            os.pwrite(fd, block, cluster * _CLUSTER_BYTES)
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    finally:
        os.close(fd)
