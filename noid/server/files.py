"""A VM's files over HTTP: ``GET`` and ``HEAD`` of a path, ``PUT`` of a file or a tree. Bodies are streams.

Nothing is kept here: what a client does not take the guest does not read, what the guest does not take the client does
not send. A download that fails in its middle ends the connection without an end mark; what could be said before is said
as a status.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn
from urllib.parse import parse_qs

import trio
from quart import Response, request
from quart.wrappers.response import ResponseBody

from noid.core.agent import Agent
from noid.core.backends import Guest
from noid.core.guests import files
from noid.core.guests.files import FileStatus, Reading
from noid.core.model.files import FileTransfer
from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.core.waiting import plain_nursery
from noid.errors import InvalidRequest, NoidError, NotFound, Unsupported
from noid.server.answers import json_reply
from noid.server.hardening import BrokenOff, Transport, upload
from noid.server.schemas.failures import GUEST
from noid.server.schemas.files import FROM, INTO, READ, READ_PART, TAR, UPLOAD, WRITTEN
from noid.server.schemas.vocabulary import text
from noid.server.table import Route
from noid.server.visit import current_user

logger = logging.getLogger(__name__)

BODY_SILENCE_SECS = 30.0
GONE_CHECK_SECS = 1.0

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
_MODE_MAX = 0o7777


class FileRoutes:
    """``/v1/vms/<name>/files?path=``."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        path = "/v1/vms/<name>/files"
        return [
            Route(
                method="GET", path=path, handler=self.get, scope=Scope.EXEC, head=True,
                query=FROM, headers={"Range?": text(), "If-Range?": text()},
                answers={200: READ, 206: READ_PART}, errors=GUEST | {416, 507},
            ),
            Route(
                method="PUT", path=path, handler=self.put, scope=Scope.EXEC,
                query=INTO, headers={"Repr-Digest?": text()},
                body=UPLOAD, answers={200: WRITTEN}, errors=GUEST | {507},
            ),
        ]  # fmt: skip

    async def get(self, name: str) -> Response:
        """Send a file; a directory, or with ``Accept: application/x-tar`` anything, as a tar stream.

        ``Range`` and ``If-Range`` are understood for files. What the path is, is in ``X-Noid-File``. HEAD sends that
        alone, and ``Accept: application/json`` asks for it as a body; with ``sum=1`` the digest is there too, of the
        first ``length`` bytes if that is given.
        """
        query = Query.of_request()
        accept = request.headers.get("Accept", "")
        if request.method == "HEAD" or accept == "application/json":
            async with self._guest(name, query) as (guest, user):
                return await self._look(guest, user, query)
        async with contextlib.AsyncExitStack() as stack:
            guest, user = await stack.enter_async_context(self._guest(name, query))
            wants_tar = TAR in accept
            if not wants_tar:
                wants_tar = (await files.look(guest, query.path, user=user)).kind == "directory"
            if wants_tar:
                opening = files.reading(guest, query.path, user=user, tar=True)
                reading = await stack.enter_async_context(opening)
                reply = Response(_Outgoing(reading, stack.pop_all()), content_type=TAR)
                return _described(reply, reading.status)
            return await self._part(guest, user, query.path, stack)

    async def _look(self, guest: Guest, user: str | None, query: Query) -> Response:
        try:
            status = await files.look(guest, query.path, user=user, with_sum=query.sum, length=query.length)
        except NotFound:
            if request.method == "HEAD":
                raise
            return json_reply({"kind": "missing"})
        about = _fields(status) | ({} if status.sha256 is None else {"sha256": status.sha256})
        return _described(Response(b"") if request.method == "HEAD" else json_reply(about), status)

    async def _part(self, guest: Guest, user: str | None, path: str, stack: contextlib.AsyncExitStack) -> Response:
        wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
        begin, end = (wanted[1], wanted[2]) if wanted else ("", "")
        condition = request.headers.get("If-Range")
        if begin == end == "" or condition is not None or not begin:
            # Only whoever knows the file can tell where its last bytes begin, or whether it is still the same one.
            status = await files.look(guest, path, user=user)
            if condition is not None and condition != _tag(status):
                begin = end = ""
            elif end and not begin:
                begin, end = str(max(status.size - int(end), 0)), ""
        is_part = bool(begin)
        first = int(begin or 0)
        length = int(end) + 1 - first if end else None
        if length is not None and length <= 0:
            is_part, first, length = False, 0, None  # RFC 9110: an invalid range is ignored
        opening = files.reading(guest, path, user=user, tar=False, offset=first, length=length)
        reading = await stack.enter_async_context(opening)
        status, sent = reading.status, reading.length or 0
        if is_part and not sent:
            reply = json_reply({"error": f"the file has {status.size} bytes.", "code": InvalidRequest.code}, 416)
            reply.headers["Content-Range"] = f"bytes */{status.size}"
            return reply
        reply = Response(_Outgoing(reading, stack.pop_all()), 206 if is_part else 200)
        reply.content_type = "application/octet-stream"
        reply.content_length = sent
        if is_part:
            reply.headers["Content-Range"] = f"bytes {first}-{first + sent - 1}/{status.size}"
        return _described(reply, status)

    async def put(self, name: str) -> Response:
        """Write a file, or with ``Content-Type: application/x-tar`` a tree into a directory: 200 and what was written.

        A file is written beside its name, as ``NAME.noid-part``, and put in its place when all of it is there and has
        the ``Repr-Digest`` of the request. What a broken transfer has left can be gone on with: ``offset``.
        """
        query = Query.of_request()
        is_tar = request.headers.get("Content-Type", "").partition(";")[0].strip() == TAR
        digest = _digest_of(request.headers.get("Repr-Digest"))
        size = 0 if is_tar else query.offset + _content_length()
        if query.offset and digest is None:
            raise InvalidRequest("going on at an offset takes a Repr-Digest header with the SHA-256 of the whole file.")

        def agree(sent: str) -> None:
            if digest is not None and not query.offset and not is_tar and sent != digest:
                raise InvalidRequest(
                    f"what arrived has the SHA-256 {sent}, and {digest} was announced. The guest's file is as it was; "
                    "what arrived is beside it, as NAME.noid-part."
                )

        async with self._guest(name, query) as (guest, user):
            transfer = FileTransfer(
                incoming=True,
                form="tar" if is_tar else "file",
                path=query.path,
                user=user,
                offset=query.offset,
                size=size,
                mode=query.mode,
                mtime_ns=query.mtime_ns,
                sha256=digest or "",
                owners=query.owners,
            )
            async with (
                files.writing(guest, transfer) as writing,
                contextlib.aclosing(upload().pieces(BODY_SILENCE_SECS)) as pieces,
                _while_client_is_there(),
            ):
                written = await writing.fill(pieces, agree)
        return json_reply(
            {
                "size": written.size,
                "entries": written.entries,
                "sha256": digest if query.offset else written.sha256,
                "left_out": written.left_out,
            }
        )

    @contextlib.asynccontextmanager
    async def _guest(self, name: str, query: Query) -> AsyncIterator[tuple[Guest, str | None]]:
        """Yield the guest and who copies there: whom the request names, or the image's user."""
        checked_name(name)
        user = current_user()
        async with self._agent.guests.reach(user, name) as guest:
            if "files" not in guest.features:
                raise Unsupported(self._agent.config.backends.exec[0], "copy files")
            yield guest, query.user or self._agent.guests.default_user(user, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The words after the question mark. Names are bytes to a guest: what is not UTF-8 is held as surrogates."""

    path: str
    user: str | None = None
    offset: int = 0
    length: int | None = None
    sum: bool = False
    mode: int | None = None
    mtime_ns: int | None = None
    owners: bool = False

    @classmethod
    def of_request(cls) -> Query:
        """Return the current request's.

        Raises:
            InvalidRequest: there is no path, or a number is none.
        """
        try:
            words = parse_qs(request.query_string.decode("latin-1"), errors="surrogateescape", max_num_fields=16)
        except ValueError as error:
            raise InvalidRequest("the query has too many fields.") from error
        last = {key: values[-1] for key, values in words.items()}
        mode = _number(last, "mode", 8)
        if mode is not None and mode > _MODE_MAX:
            raise InvalidRequest(f"mode is {mode:o}; it must be octal, up to {_MODE_MAX:o}.")
        return cls(
            path=files.checked_path(last.get("path", "")),
            user=last.get("user"),
            offset=_number(last, "offset") or 0,
            length=_number(last, "length"),
            sum=last.get("sum", "") in ("1", "true"),
            mode=mode,
            mtime_ns=_number(last, "mtime_ns", signed=True),
            owners=last.get("owners", "") in ("1", "true"),
        )


class _Outgoing(ResponseBody):
    """A response body that is a guest's output, which ends with it, whoever ends first."""

    def __init__(self, reading: Reading, holds: contextlib.AsyncExitStack) -> None:
        self._reading = reading
        self._holds = holds

    async def __aenter__(self) -> _Outgoing:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._holds.aclose()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:  # noqa: ASYNC900  # holds nothing that an end would have to free
        while True:
            try:
                data = await self._reading.receive()
            except NoidError as error:
                logger.warning("a download was broken off: %s", error)
                raise BrokenOff from error
            if not data:
                return
            yield data


@contextlib.asynccontextmanager
async def _while_client_is_there() -> AsyncIterator[None]:
    """Run the body and cancel the request if its client leaves: while its upload is not read, nothing else tells."""
    transport = Transport.of(request.scope)

    async def watch() -> None:
        while not transport.is_gone():  # noqa: ASYNC110  # nothing to wait for: unread input hides it
            await trio.sleep(GONE_CHECK_SECS)
        raise InvalidRequest("the client left in the middle of its upload.")

    async with plain_nursery() as nursery:
        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


def _described(reply: Response, status: FileStatus) -> Response:
    reply.headers["X-Noid-File"] = json.dumps(_fields(status))
    if status.kind == "file":
        reply.headers["ETag"] = _tag(status)
        reply.headers["Accept-Ranges"] = "bytes"
    if status.sha256 is not None:
        digest = base64.b64encode(bytes.fromhex(status.sha256)).decode()
        reply.headers["Repr-Digest"] = f"sha-256=:{digest}:"
    return reply


def _fields(status: FileStatus) -> dict[str, str | int]:
    return {
        "kind": status.kind,
        "size": status.size,
        "allocated_bytes": status.allocated_bytes,
        "mode": f"{status.mode:04o}",
        "mtime_ns": status.mtime_ns,
    }


def _tag(status: FileStatus) -> str:
    return f'"{status.tag}"'


def _number(words: dict[str, str], name: str, base: int = 10, *, signed: bool = False) -> int | None:
    text = words.get(name)
    if text is None:
        return None
    digits = text.removeprefix("-") if signed else text
    if len(digits) > 19 or not re.fullmatch("[0-7]+" if base == 8 else "[0-9]+", digits):
        _refuse(name, text)
    return int(text, base)


def _refuse(name: str, text: str) -> NoReturn:
    raise InvalidRequest(f"{name} is {text[:40]!a}, which is no number here.")


def _content_length() -> int:
    if request.content_length is None:
        raise InvalidRequest("a file's PUT takes a Content-Length. What has no known length can be sent as a tar.")
    return request.content_length


def _digest_of(header: str | None) -> str | None:
    """Return the SHA-256 in *header* (RFC 9530) in hex, or None if it has none."""
    found = _DIGEST.search(header or "")
    return base64.b64decode(found[1]).hex() if found else None
