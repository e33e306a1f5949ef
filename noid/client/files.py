"""Files of a VM over HTTP: what a path is, its bytes, and putting files and trees there."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import quote

from noid.client import http
from noid.client.calls.call import Reply
from noid.client.errors import ConnectionFailed
from noid.client.link import Link

TAR = "application/x-tar"
_NANOS_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPath:
    """A path in a VM, seen as *user* sees it; None is the image's user."""

    vm: str
    path: str
    user: str | None = None

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.vm}:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a path is: *kind* is ``file``, ``directory``, ``other`` or ``missing``. Links were followed."""

    kind: str
    size: int = 0
    allocated_bytes: int = 0
    mode: int = 0
    mtime_ns: int = 0
    sha256: str | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is a file with so many holes that they are worth keeping."""
        return self.kind == "file" and self.size - self.allocated_bytes >= 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """What has come into a VM. *left_out* has a line for each thing that has not."""

    size: int
    entries: int
    sha256: str
    left_out: tuple[str, ...]


async def look(link: Link, place: GuestPath, *, with_sum: bool = False, length: int | None = None) -> Found:
    """Return what *place* is; *with_sum* with the SHA-256 of its first *length* bytes, or of all.

    Raises:
        ServerError: there is no such VM, it does not run, or the guest refuses to tell.
    """
    query = {"sum": "1"} if with_sum else {}
    if length is not None:
        query["length"] = str(length)
    url = _url(place, query)
    with closing(await link.ask(lambda: http.exchange(link.endpoint, link.waiting, "GET", url, {}))) as answer:
        reply = await answer.reply()
    if reply.status != 200:
        raise await link.refused("GET", url, reply)
    return _found(link, reply)


async def download(link: Link, place: GuestPath, *, tar: bool, offset: int = 0) -> http.Exchange:
    """Return what has the bytes of *place*, piece by piece: of the file from *offset* on, or with *tar* a tar stream.

    Raises:
        ServerError: the guest refuses, or the VM is not there.
        ConnectionFailed: the connection ended before all of it was there; also where the guest gave up.
    """
    headers = {"Accept": TAR if tar else "application/octet-stream"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    answer = await link.ask(lambda: http.exchange(link.endpoint, link.waiting, "GET", _url(place), headers))
    try:
        if answer.status not in (200, 206) or (answer.status == 206) != (offset > 0):
            raise await link.refused("GET", _url(place), await answer.reply())
    except BaseException:
        answer.close()
        raise
    return answer


async def upload(
    link: Link,
    place: GuestPath,
    content: Iterable[bytes],
    *,
    size: int,
    mode: int | None,
    mtime_ns: int | None,
    sha256: str,
    offset: int = 0,
) -> Put:
    """Make *place* a file of *size* bytes whose digest is *sha256*; *content* is what follows the first *offset* ones.

    Raises:
        ServerError: the guest refuses, or what arrived is not what was announced.
        ConnectionFailed: nobody knows; the file is there entirely or as it was before.
    """
    if mtime_ns is not None:
        mtime_ns = max(-_NANOS_MAX, min(mtime_ns, _NANOS_MAX))  # before 1677 and after 2262: the nearest there is
    query = {"mode": None if mode is None else f"{mode:o}", "mtime_ns": mtime_ns, "offset": offset or None}
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size - offset),
        "Repr-Digest": f"sha-256=:{b64encode(bytes.fromhex(sha256)).decode()}:",
    }
    texts = {key: str(value) for key, value in query.items() if value is not None}
    return await _put(link, _url(place, texts), headers, content)


async def upload_tree(link: Link, place: GuestPath, content: Iterable[bytes], *, owners: bool) -> Put:
    """Write the tar stream *content* into the directory *place*, which is made if it is missing.

    Raises:
        ServerError: the guest refuses, or cannot go on; the text says what it has written.
    """
    headers = {"Content-Type": TAR, "Transfer-Encoding": "chunked"}
    return await _put(link, _url(place, {"owners": "1"} if owners else {}), headers, content)


async def _put(link: Link, url: str, headers: dict[str, str], content: Iterable[bytes]) -> Put:
    with closing(await http.exchange(link.endpoint, link.waiting, "PUT", url, headers, content)) as answer:
        reply = await answer.reply()
    if reply.status != 200:
        raise await link.refused("PUT", url, reply)
    match _decoded(link, reply):
        case {"size": int(size), "entries": int(entries), "sha256": str(sha256), "left_out": list(left_out)}:
            lines = tuple(str(line) for line in left_out)
            return Put(size=size, entries=entries, sha256=sha256, left_out=lines)
    raise _nonsense(link)


def _url(place: GuestPath, query: dict[str, str] | None = None) -> str:
    words = {"path": os.fsencode(place.path)} | {key: value.encode() for key, value in (query or {}).items()}
    if place.user is not None:
        words["user"] = os.fsencode(place.user)
    return f"/v1/vms/{place.vm}/files?" + "&".join(f"{key}={quote(value, safe='/')}" for key, value in words.items())


def _found(link: Link, reply: Reply) -> Found:
    match _decoded(link, reply):
        case {"kind": "missing"}:
            return Found(kind="missing")
        case {
            "kind": str(kind),
            "size": int(size),
            "allocated_bytes": int(allocated),
            "mode": str(mode),
            "mtime_ns": int(mtime),
            **rest,
        } if mode.isdigit():
            sha256 = rest.get("sha256")
            return Found(
                kind=kind,
                size=size,
                allocated_bytes=allocated,
                mode=int(mode, 8),
                mtime_ns=mtime,
                sha256=sha256 if isinstance(sha256, str) else None,
            )
    raise _nonsense(link)


def _decoded(link: Link, reply: Reply) -> object:
    try:
        return reply.json()
    except (ValueError, RecursionError) as error:
        raise _nonsense(link) from error


def _nonsense(link: Link) -> ConnectionFailed:
    return ConnectionFailed(
        f"{link.endpoint.address} answered something noid-server would not. Is it older than this noid?"
    )
