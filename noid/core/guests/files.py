"""Files of a guest, out and in: what `Guest.transfer` says, understood and not believed.

The bytes are passed on as they come, a few hundred KiB of them at a time. What the guest says about them is bounded,
and checked where something here depends on it: a length that was announced is what arrives, or an error does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from noid.core.backends import Guest, Process
from noid.core.model.files import FileTransfer
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import Gap
from noid.core.waiting import plain_nursery
from noid.errors import BackendError, Conflict, Denied, DependencyDown, InvalidRequest, NoidError, NoSpace, NotFound

PATH_BYTES_MAX = 4095
LINE_BYTES_MAX = 1024
LEFT_OUT_BYTES_MAX = 65536
START_SECS = 60.0
RELEASE_SECS = 10.0

_HEAD = re.compile(
    r"(file|directory|other) (\d{1,19}) (\d{1,19}) ([0-7]{1,4}) (-?\d{1,19}) ([0-9a-f-]{1,80}) ([0-9a-f]{64}|-)"
)
_DONE = re.compile(r"done (\d{1,19}) (\d{1,19})")
_ERROR = re.compile(r"error (\d{1,5}) (.*)")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")

_CLASSES: dict[int, type[NoidError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EACCES: Denied,
    errno.EPERM: Denied,
    errno.EROFS: Denied,
    errno.EISDIR: Conflict,
    errno.ENODEV: Conflict,
    errno.EEXIST: Conflict,
    errno.ENOTEMPTY: Conflict,
    errno.ESTALE: Conflict,
    errno.ETXTBSY: Conflict,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EINVAL: InvalidRequest,
    errno.ENAMETOOLONG: InvalidRequest,
    errno.ELOOP: InvalidRequest,
    errno.EBADMSG: InvalidRequest,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """What a path of a guest is. *kind* is ``file``, ``directory`` or ``other``; links were followed.

    *allocated_bytes* is less than *size* for a file with holes. *tag* changes when the file does. *sha256* is in hex,
    of as much as was asked for, or None.
    """

    kind: str
    size: int
    allocated_bytes: int
    mode: int
    mtime_ns: int
    tag: str
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What has come into a guest. *left_out* has a line for each thing that has not, and is cut off if there are many.

    *sha256* is that of what was sent this time.
    """

    size: int
    entries: int
    sha256: str
    left_out: tuple[str, ...]


def checked_path(path: str) -> str:
    """Return *path* if a guest can have such a one.

    Raises:
        InvalidRequest: it is empty, too long, or contains a NUL.
    """
    if not path:
        raise InvalidRequest("the guest's path is empty.")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise InvalidRequest("the guest's path contains half a surrogate pair.") from error
    if size > PATH_BYTES_MAX:
        raise InvalidRequest(f"the guest's path has {size} bytes; at most {PATH_BYTES_MAX} are allowed.")
    if "\0" in path:
        raise InvalidRequest("the guest's path contains a NUL byte.")
    return path


class _Talk:
    """One end of a transfer: lines and bytes of the guest's, and at last how it ended."""

    def __init__(self, process: Process, path: str) -> None:
        self.process = process
        self.path = path
        self.exit: ProcessExit | None = None
        self._out = bytearray()
        self._err = bytearray()

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the guest said on stderr, a line for each thing it left out."""
        return tuple(_shown(line) for line in bytes(self._err).split(b"\n") if line)

    async def data(self) -> bytes:
        """Return what comes next on stdout, or nothing at its end."""
        if self._out:
            data = bytes(self._out)
            self._out.clear()
            return data
        while self.exit is None:
            match await self.process.receive():
                case OutputChunk(stream=1, data=data):
                    return data
                case OutputChunk(data=data):
                    self._err += data[: LEFT_OUT_BYTES_MAX - len(self._err)]
                case Gap():
                    raise self.broken("it lost a part of its own output")
                case ProcessExit() as exit_:
                    self.exit = exit_
        return b""

    async def line(self) -> str:
        """Return the next line on stdout.

        Raises:
            NoidError: the line says that the transfer failed, and why.
        """
        line = bytearray()
        while b"\n" not in line:
            data = await self.data()
            line += data
            if not data or len(line) > LINE_BYTES_MAX + (1 << 20):
                raise self.broken("it ended without saying how" if not data else "it does not say what it sends")
        text, _, rest = line.partition(b"\n")
        self._out += rest
        if len(text) > LINE_BYTES_MAX:
            raise self.broken("it does not say what it sends")
        if error := _ERROR.fullmatch(said := text.decode("utf-8", "replace")):
            raise _CLASSES.get(int(error[1]), BackendError)(f"the guest says: {_shown(error[2])}.")
        return said

    def broken(self, what: str) -> BackendError:
        """Return the error of a guest that does not do its part."""
        how = "" if self.exit is None else f" (status {self.exit.status})"
        said = f": {'; '.join(self.left_out[-3:])}" if self.left_out else ""
        return BackendError(f"the guest did not copy {_shown(self.path)!r}: {what}{how}{said}. The VM still runs.")


@contextlib.asynccontextmanager
async def _talk(guest: Guest, request: FileTransfer) -> AsyncIterator[_Talk]:
    try:
        with trio.fail_after(START_SECS):
            process = await guest.transfer(request)
    except trio.TooSlowError as error:
        raise DependencyDown(
            f"the guest did not start copying within {START_SECS:g} s. The VM still runs; it may be overloaded. Try "
            "again, or restore it from a checkpoint."
        ) from error
    try:
        yield _Talk(process, request.path)
    finally:
        with trio.move_on_after(RELEASE_SECS, shield=True), contextlib.suppress(NoidError):  # the guest may be gone
            await guest.release(process)


def _shown(text: str | bytes) -> str:
    """Return what a guest said so that it can be shown anywhere."""
    words = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return _UNPRINTABLE.sub("?", words.encode("utf-8", "replace").decode())


async def _status(talk: _Talk) -> FileStatus:
    head = _HEAD.fullmatch(await talk.line())
    if head is None:
        raise talk.broken("it does not say what it sends")
    kind, size, allocated, mode, mtime, tag, sha256 = head.groups()
    return FileStatus(
        kind=kind,
        size=int(size),
        allocated_bytes=int(allocated),
        mode=int(mode, 8),
        mtime_ns=int(mtime),
        tag=tag,
        sha256=None if sha256 == "-" else sha256,
    )


async def look(
    guest: Guest, path: str, *, user: str | None, with_sum: bool = False, length: int | None = None
) -> FileStatus:
    """Return what *path* is; *with_sum* with the SHA-256 of its first *length* bytes, or of all of it.

    Raises:
        NotFound, Denied: as the guest says.
        Conflict: a sum was asked of a directory or device.
        BackendError: the guest does not do its part.
    """
    form = "sum" if with_sum else "look"
    request = FileTransfer(incoming=False, form=form, path=checked_path(path), user=user, length=length)
    async with _talk(guest, request) as talk:
        status = await _status(talk)
        if with_sum and status.sha256 is None:
            raise talk.broken("it sent no sum")
        return status


@dataclass(slots=True, kw_only=True)
class Reading:
    """What goes out of a guest: *status* first, then *length* bytes, or a tar stream of unknown length (None)."""

    status: FileStatus
    length: int | None
    _talk: _Talk

    async def receive(self) -> bytes:
        """Return the next bytes, or nothing once all are there.

        Raises:
            BackendError: the guest has ended early, or sends more than it said.
        """
        data = await self._talk.data()
        if self.length is not None:
            self.length -= len(data)
            if self.length < 0:
                raise self._talk.broken("it sends more than it said")
        if data:
            return data
        status = None if self._talk.exit is None else self._talk.exit.status
        if self.length or status not in ((0,) if self.length is not None else (0, 1)):
            raise self._talk.broken("the file became shorter, or could not be read to its end")
        return b""


@contextlib.asynccontextmanager
async def reading(
    guest: Guest, path: str, *, user: str | None, tar: bool, offset: int = 0, length: int | None = None
) -> AsyncIterator[Reading]:
    """Yield what *path* is and then its bytes: *length* of them from *offset*, or with *tar* all below it as a stream.

    Raises: what `look` raises, and `Conflict` for a directory without *tar*.
    """
    form = "tar" if tar else "file"
    request = FileTransfer(incoming=False, form=form, path=checked_path(path), user=user, offset=offset, length=length)
    async with _talk(guest, request) as talk:
        status = await _status(talk)
        rest = max(status.size - offset, 0)
        yield Reading(status=status, length=None if tar else rest if length is None else min(length, rest), _talk=talk)


class Writing:
    """What goes into a guest. Left without `fill`, or in its middle, a file's beginning stays as a part."""

    def __init__(self, talk: _Talk, *, tar: bool) -> None:
        self._talk = talk
        self._tar = tar
        self._sum = hashlib.sha256()

    async def fill(self, pieces: AsyncIterator[bytes], agree: Callable[[str], None]) -> Written:
        """Send *pieces*, and at the end of a file ask *agree* with the SHA-256 of what was sent; return what became.

        While the guest does not take them, *pieces* is not asked for more. What goes wrong in the guest ends this at
        once. If *agree* or *pieces* raises, a file does not appear under its name; of a tree, what came before stays.

        Raises:
            NoidError: the guest's own: `NoSpace`, `Denied` and so on.
            BackendError: the guest does not do its part.
        """

        async def send() -> None:
            process = self._talk.process
            async for data in pieces:
                self._sum.update(data)
                await process.send_stdin(data)
            agree(self._sum.hexdigest())
            if not self._tar:
                await process.send_stdin(b"c")
            await process.close_stdin()

        async with plain_nursery() as nursery:
            nursery.start_soon(send)
            written = await self._outcome()
            nursery.cancel_scope.cancel()
        return written

    async def _outcome(self) -> Written:
        done = _DONE.fullmatch(await self._talk.line())
        if done is None or await self._talk.data():
            raise self._talk.broken("it does not say what it did")
        if self._talk.exit is None or self._talk.exit.status not in (0, 1):
            raise self._talk.broken("it ended in an unknown way")
        return Written(
            size=int(done[1]), entries=int(done[2]), sha256=self._sum.hexdigest(), left_out=self._talk.left_out
        )


@contextlib.asynccontextmanager
async def writing(guest: Guest, request: FileTransfer) -> AsyncIterator[Writing]:
    """Yield the way into *path*, once the guest is ready to write there.

    Raises: what `look` raises; `Conflict` if there is a directory in the place of a file, or nothing to go on with.
    """
    checked_path(request.path)
    async with _talk(guest, request) as talk:
        if await talk.line() != "ready":
            raise talk.broken("it is not ready")
        yield Writing(talk, tar=request.form == "tar")
