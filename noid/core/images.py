"""The images VMs boot from: kernel, initrd, root file system, in ``<data_dir>/images/<name>/``.

::

    image.json                 what `Images.add` was told, and the hashes of what it stored
    kernel                     bare, as a VMM takes it
    initrd.base                the user's own initrd, if any, then the modules a guest needs to find its disk
    initrd-<payload digest>    initrd.base, then the guest agent: assembled once per version of the agent
    rootfs.ext4                sparse

An image is published by rename, so a half-made one does not exist. Its files never change; what uses them holds links
or clones of its own, so removing an image hurts nobody.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from noid import hostfs
from noid.core.guestbuild import cpio, ext4
from noid.core.guestbuild.cache import locked
from noid.core.guestbuild.modules import Module, boot_modules, initrd_files
from noid.core.guestbuild.vmlinux import KernelFile, unwrapped
from noid.core.model.images import DEFAULT_READY, Image
from noid.core.model.names import checked_name
from noid.core.model.times import now
from noid.errors import BackendError, Conflict, Damaged, InvalidRequest, NotFound

logger = logging.getLogger(__name__)

_FORMAT = 1
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_HASH_BLOCK_BYTES = 1 << 16
_ZERO_BLOCK = bytes(_HASH_BLOCK_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What ``image.json`` holds. *sizes* and *hashes* (SHA-256) are by file name."""

    format: int
    architecture: str
    kernel_release: str
    cmdline: str
    user: str
    ready: tuple[str, ...]
    description: str
    created_at: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    agent: bool = True


class Images:
    """The images in one directory. Every method blocks; async callers use ``trio.to_thread.run_sync``.

    Args:
        directory: ``<data_dir>/images``; made by the first `add`.
        payload: What every initrd carries beside the image's own content, by path: the guest agent.
    """

    def __init__(self, directory: Path, payload: Mapping[str, bytes]) -> None:
        self.directory = directory
        self._payload = cpio.archive(payload)
        self._payload_digest = hashlib.sha256(self._payload).hexdigest()
        self._records: dict[str, tuple[tuple[int, ...], _Record]] = {}

    def names(self) -> list[str]:
        """Return the names of all images, damaged ones included."""
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if not entry.name.startswith("."))

    def list(self) -> list[Image]:
        """Return all images by name. A damaged one is logged and left out; `get` says what is wrong with it."""
        found: list[Image] = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except (Damaged, NotFound) as error:
                logger.warning("%s", error)
        return found

    def get(self, name: str) -> Image:
        """Return the image *name*. Reads one small file; the first call after an upgrade assembles the initrd.

        Raises:
            InvalidRequest: that cannot be a name.
            NotFound: there is none; says how to make one.
            Damaged: a file is missing, or has another size than it was stored with.
        """
        place = self.directory / checked_name(name, "image name")
        record = self._read(name, place)
        for file, size_bytes in record.sizes.items():
            try:
                found_bytes = (place / file).stat().st_size
            except FileNotFoundError:
                found_bytes = None
            if found_bytes != size_bytes:
                state = "missing" if found_bytes is None else f"{found_bytes} bytes long instead of {size_bytes}"
                raise Damaged(
                    f"image {name!r} is damaged: its file {file} is {state}. Running VMs are not touched. "
                    f"Remove it (noid-server image remove {name}) and build or import it again."
                )
        return Image(
            name=name,
            directory=place,
            kernel=place / "kernel",
            initrd=self._initrd(place, record),
            rootfs=place / "rootfs.ext4",
            digest=self._digest(record),
            architecture=record.architecture,
            kernel_release=record.kernel_release,
            cmdline=record.cmdline,
            agent=record.agent,
            user=record.user,
            ready=record.ready,
            description=record.description,
            created_at=datetime.fromisoformat(record.created_at),
        )

    def user(self, name: str) -> str:
        """Return who commands run as in VMs of the image *name* when nobody is named. As quick as a stat.

        Raises:
            NotFound: there is none.
            Damaged: what it says of itself cannot be read.
        """
        place = self.directory / checked_name(name, "image name")
        try:
            status = (place / "image.json").stat()
        except OSError:
            return self._read(name, place).user  # which says what is wrong
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._records.get(name)
        if known is None or known[0] != version:
            known = self._records[name] = (version, self._read(name, place))
        return known[1].user

    def add(
        self,
        name: str,
        *,
        kernel: Path,
        rootfs: Path,
        initrd: Path | None = None,
        modules: Path | None = None,
        agent: bool = True,
        user: str = "root",
        ready: tuple[str, ...] = DEFAULT_READY,
        cmdline: str = "",
        description: str = "",
        replace: bool = False,
    ) -> Image:
        """Make an image of copies of the files given, which can go away afterwards.

        Args:
            name: A legal name that no image has.
            kernel: ELF vmlinux, bzImage, or arm64 Image.
            rootfs: A raw ext4 file system.
            initrd: Unpacked before what noid puts into it, so noid's init is the one that runs. Any compression.
            modules: A directory with kernel modules at any depth, as ``/lib/modules/<release>``; the ones a guest
                needs to boot are taken. A kernel with virtio built in needs none.
            agent: Whether the guest agent goes into the initrd. Without it the image boots as it would anywhere, and
                needs a shell on its serial console.
            user: Who commands run as when the caller names nobody.
            ready: The command that ends when the guest has booted.
            cmdline: Extra kernel arguments.
            description: For whoever reads the list.
            replace: Put it in the place of an existing image of that name, at one instant.

        Raises:
            InvalidRequest: a file is not what it should be, or not for this machine; nothing was changed.
            Conflict: the name is taken.
            NoSpace: the disk is full; nothing was changed and nothing is left.
        """
        final = self.directory / checked_name(name, "image name")
        for file, what in ((kernel, "kernel"), (rootfs, "root file system"), (initrd, "initrd")):
            if file is not None and not file.is_file():
                raise InvalidRequest(f"the {what} {file} is {'no file' if file.exists() else 'not there'}.")
        if modules is not None and not modules.is_dir():
            raise InvalidRequest(f"the modules directory {modules} is not there.")
        with hostfs.os_errors(f"adding image {name!r}"):
            unpacked = _checked_kernel(kernel)
            ext4.check(rootfs)
            base = (cpio.padded(initrd.read_bytes()) if initrd else b"") + cpio.archive(
                initrd_files(_checked_modules(modules, unpacked))
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            with locked(self.directory / ".lock"):
                self._sweep()
                if final.exists() and not replace:
                    raise Conflict(
                        f"there is already an image {name!r}. Choose another name, or remove it first "
                        f"(noid-server image remove {name}); running VMs and checkpoints do not need it."
                    )
                partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=self.directory))
                try:
                    (partial / "kernel").write_bytes(unpacked.content)
                    (partial / "initrd.base").write_bytes(base)
                    hostfs.clone_file(rootfs, partial / "rootfs.ext4")
                    record = _Record(
                        format=_FORMAT,
                        architecture=unpacked.architecture,
                        kernel_release=unpacked.release,
                        cmdline=cmdline,
                        agent=agent,
                        user=user,
                        ready=tuple(ready),
                        description=description,
                        created_at=now().isoformat(),
                        sizes={file.name: file.stat().st_size for file in partial.iterdir()},
                        hashes={
                            "kernel": hashlib.sha256(unpacked.content).hexdigest(),
                            "initrd.base": hashlib.sha256(base).hexdigest(),
                            "rootfs.ext4": content_hash(partial / "rootfs.ext4"),
                        },
                    )
                    (partial / "image.json").write_text(json.dumps(dataclasses.asdict(record), indent=2) + "\n")
                    self._initrd(partial, record)
                    for file in partial.iterdir():
                        file.chmod(0o444)
                    partial.chmod(0o755)
                    self._publish(partial, final)
                finally:
                    hostfs.remove_tree(partial)  # published: gone already, or the image that was replaced
        return self.get(name)

    def remove(self, name: str) -> None:
        """Remove the image *name*. Running VMs, checkpoints and templates made from it do not notice.

        Raises:
            NotFound: there is none.
        """
        place = self.directory / checked_name(name, "image name")
        if not place.is_dir():
            raise self._not_found(name)
        with hostfs.os_errors(f"removing image {name!r}"), locked(self.directory / ".lock"):
            self._sweep()
            going = self.directory / f".{name}.removed.partial"
            try:
                place.rename(going)  # at once, so that nobody finds half of it
            except FileNotFoundError as error:
                raise self._not_found(name) from error
            hostfs.fsync_directory(self.directory)
            hostfs.remove_tree(going)

    def _sweep(self) -> None:
        """Remove what a killed `add` or `remove` left. Only under the lock: nobody is at work then."""
        for left in self.directory.glob(".*.partial"):
            hostfs.remove_tree(left)

    def _publish(self, partial: Path, final: Path) -> None:
        if not final.exists():
            hostfs.publish_directory(partial, final)
            return
        hostfs.fsync_tree(partial)
        libc = ctypes.CDLL(None, use_errno=True)
        names = (_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(final))
        if libc.renameat2(*names, _RENAME_EXCHANGE) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} (remove the old image first)", str(final))
        hostfs.fsync_directory(self.directory)

    def _read(self, name: str, place: Path) -> _Record:
        try:
            facts: dict[str, Any] = json.loads((place / "image.json").read_bytes())
            if facts.get("format") != _FORMAT:
                raise Damaged(
                    f"image {name!r} has format {facts.get('format')!r}, and this noid reads {_FORMAT}. "
                    "Build or import it again with this version."
                )
            return _Record(**{**facts, "ready": tuple(facts["ready"])})
        except FileNotFoundError as error:
            if place.is_dir():
                raise Damaged(
                    f"image {name!r} is damaged: its image.json is missing. Remove it "
                    f"(noid-server image remove {name}) and build or import it again."
                ) from error
            raise self._not_found(name) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(
                f"image {name!r} is damaged: its image.json cannot be read ({error}). Remove it "
                f"(noid-server image remove {name}) and build or import it again."
            ) from error
        except OSError as error:
            raise BackendError(f"image {name!r} cannot be read: {error}.") from error

    def _not_found(self, name: str) -> NotFound:
        have = ", ".join(self.names()) or "none"
        build = "noid-server image build" + ("" if name == "default" else f" --name {name}")
        return NotFound(
            f"there is no image {name!r} (there is: {have}). Make one with '{build}', or from files of your own with "
            f"'noid-server image import {name} --kernel FILE --rootfs FILE'."
        )

    def _initrd(self, place: Path, record: _Record) -> Path:
        """Return the initrd with the current payload, assembled if this is its first use; or the image's own alone."""
        if not record.agent:
            return place / "initrd.base"
        final = place / f"initrd-{self._payload_digest[:16]}"
        if final.exists():
            return final
        with hostfs.os_errors(f"assembling {final}"):
            fd, partial = tempfile.mkstemp(prefix=".initrd.", dir=place)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(cpio.padded((place / "initrd.base").read_bytes()) + self._payload)
                    file.flush()
                    os.fchmod(fd, 0o444)
                    os.fsync(fd)
                Path(partial).rename(final)  # two that do it at once write the same bytes
            finally:
                Path(partial).unlink(missing_ok=True)
        return final

    def _digest(self, record: _Record) -> str:
        facts = {
            "format": record.format,
            "architecture": record.architecture,
            "cmdline": record.cmdline,
            "user": record.user,
            "ready": record.ready,
            "hashes": dict(record.hashes),
            "payload": self._payload_digest if record.agent else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Return a SHA-256 of a sparse file's size and content that does not depend on which of its zeros are holes."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(fd).st_size
        digest.update(b"%d\n" % size_bytes)
        offset = 0
        while offset < size_bytes:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            end = os.lseek(fd, offset, os.SEEK_HOLE)
            offset -= offset % _HASH_BLOCK_BYTES
            while offset < end:
                block = os.pread(fd, _HASH_BLOCK_BYTES, offset)
                if block and block != _ZERO_BLOCK[: len(block)]:
                    digest.update(b"%d\n" % offset)
                    digest.update(block)
                offset += _HASH_BLOCK_BYTES
    finally:
        os.close(fd)
    return digest.hexdigest()


def _checked_kernel(path: Path) -> KernelFile:
    kernel = unwrapped(path.read_bytes(), f"the kernel {path}")
    host = platform.machine()
    if kernel.architecture != host:
        raise InvalidRequest(
            f"the kernel {path} is for {kernel.architecture}, and this host is {host}. Give one for {host}."
        )
    return kernel


def _checked_modules(directory: Path | None, kernel: KernelFile) -> list[Module]:
    if directory is None:
        return []
    chosen = boot_modules(
        (str(path) for path in directory.rglob("*") if path.is_file()), lambda p: Path(p).read_bytes()
    )
    for module in chosen:
        if module.release != kernel.release:
            raise InvalidRequest(
                f"the module {module.name} in {directory} is for kernel {module.release or 'unknown'}, but the "
                f"kernel is {kernel.release}. Give the modules that belong to it."
            )
    return chosen
