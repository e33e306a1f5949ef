"""Copying between this machine and VMs, and between VMs, as ``cp -a`` and ``docker cp`` do it.

A file goes to a name, or into a directory under its own name. A directory becomes a new one where nothing is; where a
directory is, it goes into it, or with ``/.`` at its end its contents do. Links named by the caller are followed, links
found below are copied as links.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from noid.client import files
from noid.client.files import Found, GuestPath, Put
from noid.client.link import Link
from noid.client.packing import PIECE_BYTES, Packing, is_sparse
from noid.client.settings import Endpoint
from noid.client.tarstream import TarReader
from noid.client.unpacking import Limits, Unpacking
from noid.client.waiting import Blocking, Waiting, finished
from noid.errors import Damaged, NoidError

PART = ".noid-part"
Place = GuestPath | str


@dataclass(slots=True, kw_only=True)
class Copied:
    """What was copied, also while it is. *sha256* is that of a single file. *left_out* has a line for each thing."""

    size: int = 0
    entries: int = 0
    sha256: str | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Copying:
    """One copy. *owners* are kept where that is allowed, *resume* goes on with what an earlier copy of a file left.

    *waiting* blocks, but may give up. *on_progress* is called with the bytes so far and, where it is known, how many it
    will be.
    """

    endpoint: Endpoint
    waiting: Waiting = field(default_factory=Blocking)
    owners: bool = False
    resume: bool = False
    limits: Limits = field(default_factory=Limits)
    on_progress: Callable[[int, int | None], None] = lambda _done, _total: None
    done: Copied = field(default_factory=Copied)
    _link: Link = field(init=False)

    def __post_init__(self) -> None:
        self._link = Link(self.endpoint, self.waiting)

    def into_guest(self, source: str, target: GuestPath) -> None:
        """Copy a local file or directory into a VM.

        Raises:
            NoidError: what could not be; a file is then there entirely or not at all, of a directory what came before.
        """
        try:
            status = Path(source).stat()
        except OSError as error:
            raise NoidError(f"cannot read {source}: {error.strerror}.") from error
        is_directory = stat.S_ISDIR(status.st_mode)
        if not is_directory and not stat.S_ISREG(status.st_mode):
            raise NoidError(f"{source} is neither a file nor a directory.")
        place = self._place_in_guest(source, target, is_directory=is_directory)
        packing = Packing(source, self.done.left_out.append)
        if is_directory:
            self._put_tree(place, self._counted(packing.pieces()))
        elif is_sparse(source):
            parent = replace(place, path=posixpath.dirname(place.path) or ".")
            pieces = packing.pieces(posixpath.basename(place.path))
            self._put_tree(parent, self._counted(pieces))
        else:
            self._upload(source, place)

    def out_of_guest(self, source: GuestPath, target: str) -> None:
        """Copy a file or directory of a VM to this machine.

        Raises:
            NoidError: what could not be; a file is then there entirely or as ``NAME.noid-part``.
        """
        found = self._look(source)
        is_directory = found.kind == "directory"
        path = self._place_here(source.path, target, is_directory=is_directory)
        if is_directory or found.is_sparse:
            self._unpack(source, path, is_directory=is_directory)
        else:
            self._download(source, path, found)

    def between_guests(self, source: GuestPath, target: GuestPath) -> None:
        """Copy a file or directory of a VM into a VM. The bytes pass through here."""
        found = self._look(source)
        is_directory = found.kind == "directory"
        place = self._place_in_guest(source.path, target, is_directory=is_directory)
        if is_directory or posixpath.basename(place.path) == posixpath.basename(source.path.rstrip("/")):
            parent = place if is_directory else replace(place, path=posixpath.dirname(place.path) or ".")
            with self._arriving(source, tar=True) as pieces:
                content = self._counted(pieces)
                self._put_tree(parent, content)
            return
        found = finished(files.look(self._link, source, with_sum=True))
        with self._arriving(source, tar=False) as pieces:
            put = finished(
                files.upload(
                    self._link,
                    place,
                    self._counted(pieces, found.size),
                    size=found.size,
                    mode=found.mode,
                    mtime_ns=found.mtime_ns,
                    sha256=found.sha256 or "",
                )
            )
        self._finish(put)
        self.done.sha256 = put.sha256

    def stream_into_guest(self, pieces: Iterable[bytes], target: GuestPath) -> None:
        """Write a tar stream into a directory of a VM."""
        self._put_tree(target, self._counted(pieces))

    def stream_out_of_guest(self, source: GuestPath, write: Callable[[bytes], None]) -> None:
        """Give a file or directory of a VM to *write* as a tar stream."""
        with self._arriving(source, tar=True) as pieces:
            for piece in self._counted(pieces):
                write(piece)

    # --- where to ---------------------------------------------------------------------------------------------------

    def _look(self, source: GuestPath) -> Found:
        found = finished(files.look(self._link, source))
        if found.kind == "missing":
            raise NoidError(f"{source}: there is no such file or directory.")
        if found.kind == "other":
            raise NoidError(f"{source} is neither a file nor a directory.")
        return found

    def _place_in_guest(self, source: str, target: GuestPath, *, is_directory: bool) -> GuestPath:
        kind = finished(files.look(self._link, target)).kind
        path = _resolved(source, target.path, str(target), kind, source_is_directory=is_directory)
        return replace(target, path=path)

    @staticmethod
    def _place_here(source: str, target: str, *, is_directory: bool) -> str:
        try:
            mode = Path(target).stat().st_mode
            kind = "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
        except FileNotFoundError:
            kind = "missing"
        except OSError as error:
            raise NoidError(f"cannot write {target}: {error.strerror}.") from error
        return _resolved(source, target, target, kind, source_is_directory=is_directory)

    # --- single files -----------------------------------------------------------------------------------------------

    def _upload(self, source: str, place: GuestPath) -> None:
        with Path(source).open("rb", buffering=0) as file:
            # Read twice: the guest is told beforehand what has to arrive, and takes nothing else for the file.
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            status = os.fstat(file.fileno())
            offset = self._part_in_guest(file.fileno(), replace(place, path=place.path + PART)) if self.resume else 0
            file.seek(offset)
            self.done.size = offset
            pieces = self._counted(iter(lambda: file.read(PIECE_BYTES), b""), status.st_size)
            put = finished(
                files.upload(
                    self._link,
                    place,
                    pieces,
                    size=status.st_size,
                    mode=stat.S_IMODE(status.st_mode),
                    mtime_ns=status.st_mtime_ns,
                    sha256=sha256,
                    offset=offset,
                )
            )
        self._finish(put)
        if put.sha256 != sha256:
            raise Damaged(f"{place} has the SHA-256 {put.sha256}, and {sha256} was sent. Copy it again.")
        self.done.sha256 = sha256

    def _part_in_guest(self, descriptor: int, part: GuestPath) -> int:
        """Return how much of an earlier copy can be used: all of it if it is a beginning of this file, or nothing."""
        found = finished(files.look(self._link, part))
        if found.kind != "file" or not 0 < found.size <= os.fstat(descriptor).st_size:
            return 0
        there = finished(files.look(self._link, part, with_sum=True)).sha256
        return found.size if there == _sum_of_first(descriptor, found.size) else 0

    def _download(self, source: GuestPath, path: str, found: Found) -> None:
        part = path + PART
        if Path(path).is_dir():
            raise NoidError(f"{path} is a directory; the file {source} cannot replace it.")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if self.resume else os.O_TRUNC)
        try:
            descriptor = os.open(part, flags, 0o600)
        except OSError as error:
            raise NoidError(f"cannot write {part}: {error.strerror}.") from error
        try:
            offset = self._part_here(descriptor, source, found)
            self.done.size = offset
            digest = _digest_of_first(descriptor, offset)
            os.ftruncate(descriptor, offset)
            os.lseek(descriptor, offset, os.SEEK_SET)
            if offset < found.size or not offset:
                with self._arriving(source, tar=False, offset=offset) as pieces:
                    for piece in self._counted(pieces, found.size):
                        digest.update(piece)
                        _write(descriptor, piece, part)
            self.done.sha256 = digest.hexdigest()
            after = finished(files.look(self._link, source, with_sum=offset > 0))
            if (after.size, after.mtime_ns) != (found.size, found.mtime_ns) or self.done.size != found.size:
                raise Damaged(f"{source} was changed while it was copied. Copy it again.")
            if after.sha256 not in (None, self.done.sha256):
                raise Damaged(f"{part} and what followed are not {source}: the SHA-256 differs. Copy it anew.")
            os.fchmod(descriptor, found.mode & 0o777)
            os.utime(descriptor, ns=(found.mtime_ns, found.mtime_ns))
            Path(part).rename(path)
            self.done.entries = 1
        finally:
            os.close(descriptor)

    def _part_here(self, descriptor: int, source: GuestPath, found: Found) -> int:
        size = os.fstat(descriptor).st_size
        if not 0 < size <= found.size:
            return 0
        there = finished(files.look(self._link, source, with_sum=True, length=size)).sha256
        return size if there == _sum_of_first(descriptor, size) else 0

    # --- trees ------------------------------------------------------------------------------------------------------

    def _unpack(self, source: GuestPath, path: str, *, is_directory: bool) -> None:
        directory = path if is_directory else posixpath.dirname(path) or "."
        try:
            if is_directory and not Path(path).is_dir():
                Path(path).mkdir()
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NoidError(f"cannot write {directory}: {error.strerror}.") from error
        unpacking = Unpacking(descriptor, self.limits, self.done.left_out.append, owners=self.owners)
        try:
            with self._arriving(source, tar=True) as pieces:
                stream = TarReader(self._counted(pieces))
                unpacking.run(stream, only_file=None if is_directory else os.fsencode(posixpath.basename(path)))
                self.done.left_out += stream.comments
        finally:
            os.close(descriptor)
            self.done.entries, self.done.size = unpacking.entries, unpacking.size

    # --- counting ---------------------------------------------------------------------------------------------------

    def _counted(self, pieces: Iterable[bytes], total: int | None = None) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self.done.size += len(piece)
            self.on_progress(self.done.size, total)

    @contextmanager
    def _arriving(self, source: GuestPath, *, tar: bool, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with closing(finished(files.download(self._link, source, tar=tar, offset=offset))) as answer:
            yield iter(lambda: finished(answer.piece()), b"")

    def _put_tree(self, place: GuestPath, content: Iterable[bytes]) -> None:
        self._finish(finished(files.upload_tree(self._link, place, content, owners=self.owners)))

    def _finish(self, put: Put) -> None:
        self.done.size, self.done.entries = put.size, put.entries
        self.done.left_out += put.left_out


def _resolved(source: str, target: str, shown: str, kind: str, *, source_is_directory: bool) -> str:
    """Return where *source* goes, given what *target* is."""
    name = posixpath.basename(source.rstrip("/"))
    contents_only = source.endswith("/.") or name in ("", ".", "..")
    if kind == "directory":
        return target if source_is_directory and contents_only else posixpath.join(target, name)
    if source_is_directory:
        if kind != "missing":
            raise NoidError(f"{shown} is there and no directory; a directory cannot replace it.")
        return target.rstrip("/") or "/"
    if target.endswith("/"):
        raise NoidError(
            f"{shown} is no directory. Make it first, or leave out the last slash to give the file that name."
        )
    return target


def _sum_of_first(descriptor: int, size: int) -> str:
    return _digest_of_first(descriptor, size).hexdigest()


def _digest_of_first(descriptor: int, size: int) -> hashlib._Hash:
    digest = hashlib.sha256()
    at = 0
    while at < size and (piece := os.pread(descriptor, min(PIECE_BYTES, size - at), at)):
        digest.update(piece)
        at += len(piece)
    return digest


def _write(descriptor: int, data: bytes, path: str) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise NoidError(f"cannot write {path}: {error.strerror}. What has come so far is there.") from error
