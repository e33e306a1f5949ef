"""What travels over an exec WebSocket, as bytes in and records out: no socket, no clock, no framework.

Shared by server and client. The format is the predecessor's (0.2), extended where it ignores what it does not know:

::

    1  client -> server  text    ExecRequest  {"command": [...], "tty": false, "env": ["K=V"], ...}
    2  both              binary  first byte is the channel: 1 stdout, 2 stderr, 3 stdin, 4 resize; the rest is data
    2  client -> server  text    {"detach": true}: when this client leaves, the process shall run on
    3  server -> client  text    {"process", "lineage", "pid", "offset", "stdin"?}: which process it is, before anything
                                 it wrote; to the client that speaks for it, how much input it has been given
    3  server -> client  text    {"stdin": n}: input before its byte n has arrived for good
    3  server -> client  text    {"detached": true}: it will run on, the client may leave
    4  server -> client  text    {"gap": {"start", "end"}}: bytes of its output that nobody has any more
    5  server -> client  text    ExecResult {"exit_code", "timed_out", "truncated", "signal"?} or {"error", "code"?}
    6  server -> client  close

Exactly one message of kind 5 ends every exec; a connection that ends without one has failed. ``stdin`` in the request
announces frames of channel 3; an empty one is the end of the input. Lone surrogates, which is how Python holds bytes
of an argument that are not UTF-8, survive as JSON escapes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from noid.core.model.processes import (
    LOG_BYTES,
    LOG_BYTES_MAX,
    LOG_BYTES_MIN,
    ExecRequest,
    Gap,
    TerminalSize,
    checked_argv,
    checked_env,
)
from noid.errors import InvalidRequest

if TYPE_CHECKING:
    from noid.core.model.guest_processes import ProcessExit

API_VERSION = 1
API_VERSION_HEADER = "X-Noid-Api-Version"

STDOUT = 1
STDERR = 2
STDIN = 3
RESIZE = 4

DETACH = '{"detach":true}'
"""The message of a client that wants to leave its process running; it stays until the answer `Detached`."""

CHUNK_BYTES = 65536
"""How much data a frame carries at most, by convention; receivers take any size up to their message limit."""

_SIZE = struct.Struct("!HH")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """How a command ended. *exit_code* is what a shell would show, None if it timed out or is unknown.

    *signal* is the signal that ended it, beside an *exit_code* of 128 plus its number.
    """

    exit_code: int | None
    timed_out: bool = False
    truncated: bool = False
    signal: int | None = None

    @classmethod
    def of(cls, exit_: ProcessExit) -> ExecResult:
        """Return the result that reports *exit_*."""
        return cls(exit_code=exit_.status, signal=exit_.signal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Which process one is attached to, and the *offset* in its output of the first byte that follows.

    *stdin*: how much input it has been given, by whomever; None if it takes none, or one does not speak for it.
    """

    process: str
    lineage: str
    pid: int
    offset: int
    stdin: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputArrived:
    """Input before byte *end* will never be asked for again."""

    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Detached:
    """The process runs on without this client: the answer to `DETACH`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecCall:
    """A request and what is to become of the process without its client.

    *resume*: when the connection is lost without a close frame, it shall wait for its client. *detached*: it runs on
    whatever its client does.
    """

    request: ExecRequest
    resume: bool = False
    detached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorResponse:
    """The command could not be run, or its fate is unknown. *code* is a `noid.errors` code; old servers send none."""

    error: str
    code: str | None = None


# --- binary messages ------------------------------------------------------------------------------------------------


def frame(channel: int, data: bytes) -> bytes:
    """Return *data* as a binary message of *channel*."""
    return bytes((channel,)) + data


def split_frame(message: bytes) -> tuple[int, bytes]:
    """Return channel and data of a binary message. An empty message is channel 0, which nobody listens to."""
    return (message[0], message[1:]) if message else (0, b"")


def resize_frame(columns: int, rows: int) -> bytes:
    """Return the message that says how large the terminal is: columns and rows, 16 bit each, big-endian."""
    return frame(RESIZE, _SIZE.pack(min(max(columns, 0), 0xFFFF), min(max(rows, 0), 0xFFFF)))


def parse_resize(data: bytes) -> tuple[int, int]:
    """Return columns and rows from the data of a resize message.

    Raises:
        InvalidRequest: it is not four bytes.
    """
    if len(data) != _SIZE.size:
        raise InvalidRequest(f"a resize message carries {_SIZE.size} bytes, columns and rows; this one {len(data)}.")
    columns, rows = _SIZE.unpack(data)
    return columns, rows


# --- text messages of consoles and logs, which clients that do not know them skip ------------------------------------


def dropped_to_json(count: int, why: str) -> str:
    """Return the message that says that the last *count* bytes of input were not delivered, and *why*."""
    return json.dumps({"dropped": {"bytes": count, "why": why}}, separators=(",", ":"))


def log_start_to_json(offset: int, lineage: str | None = None, now: int | None = None) -> str:
    """Return the message a log begins with: the offset of its first byte or gap, and in which life of the VM.

    *now* is the offset behind the last byte when it was asked for: what comes before that is history.
    """
    said = {"offset": offset, "lineage": lineage, "now": now}
    return json.dumps(
        {"log": {name: value for name, value in said.items() if value is not None}}, separators=(",", ":")
    )


def log_end_to_json(offset: int) -> str:
    """Return the message a log ends with: where to go on when there is more of it."""
    return json.dumps({"end": {"offset": offset}}, separators=(",", ":"))


# --- the request ----------------------------------------------------------------------------------------------------


def request_to_json(request: ExecRequest, *, resume: bool = False, detached: bool = False) -> str:
    """Return *request* as the first message of an exec, or as the body of ``POST .../exec``. It is pure ASCII.

    The predecessor's three fields are always there; extensions only where they say something.
    """
    fields: dict[str, Any] = {
        "command": list(request.argv),
        "tty": request.tty is not None,
        "env": [f"{key}={value}" for key, value in request.env.items()],
    }
    if request.cwd is not None:
        fields["cwd"] = request.cwd
    if request.user is not None:
        fields["user"] = request.user
    if request.stdin:
        fields["stdin"] = True
    if request.timeout_secs is not None:
        fields["timeout_secs"] = request.timeout_secs
    if request.tty is not None:
        fields |= {"columns": request.tty.columns, "rows": request.tty.rows}
    if request.log_bytes != LOG_BYTES:
        fields["log_bytes"] = request.log_bytes
    fields |= {name: True for name, wanted in (("resume", resume), ("detached", detached)) if wanted}
    return json.dumps(fields, separators=(",", ":"))


def call_from_json(text: str | bytes) -> ExecCall:
    """Return the request in *text*. Unknown fields are ignored; types are strict.

    Raises:
        InvalidRequest: says what is wrong with it.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"invalid exec request: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("invalid exec request: expected a JSON object with the field 'command'.")
    columns, rows = (_within(fields, name, default, 0, 0xFFFF) for name, default in (("columns", 80), ("rows", 24)))
    tty = TerminalSize(columns=columns, rows=rows) if _boolean(fields, "tty") else None
    request = ExecRequest(
        argv=checked_argv(_strings(fields.get("command"), "command")),
        env=checked_env(_strings(fields.get("env", []), "env")),
        cwd=_optional_string(fields, "cwd"),
        user=_optional_string(fields, "user"),
        stdin=_boolean(fields, "stdin"),
        timeout_secs=_timeout(fields.get("timeout_secs")),
        tty=tty,
        log_bytes=_within(fields, "log_bytes", LOG_BYTES, LOG_BYTES_MIN, LOG_BYTES_MAX),
    )
    return ExecCall(request=request, resume=_boolean(fields, "resume"), detached=_boolean(fields, "detached"))


def request_from_json(text: str | bytes) -> ExecRequest:
    """Return the request in *text*, whatever else it says. See `call_from_json`."""
    return call_from_json(text).request


def _boolean(fields: dict[str, Any], what: str) -> bool:
    value = fields.get(what, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"invalid exec request: {what!r} must be true or false.")
    return value


def _within(fields: dict[str, Any], what: str, default: int, least: int, most: int) -> int:
    value = fields.get(what, default)
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"invalid exec request: {what!r} must be an integer between {least} and {most}.")
    return value


def _strings(value: object, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"invalid exec request: {what!r} must be a list of strings.")
    return value


def _optional_string(fields: dict[str, Any], what: str) -> str | None:
    value = fields.get(what)
    if value is not None and (not isinstance(value, str) or not value or "\0" in value):
        raise InvalidRequest(f"invalid exec request: {what!r} must be a string, not empty and without NUL.")
    return value


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e9:  # NaN fails here too
        raise InvalidRequest("invalid exec request: 'timeout_secs' must be a number of seconds above 0.")
    return float(value)


# --- the end --------------------------------------------------------------------------------------------------------


Reply = ExecResult | ErrorResponse | Started | InputArrived | Gap | Detached


def reply_to_json(reply: Reply) -> str:
    """Return *reply* as the text message it is; the first two end an exec."""
    fields: dict[str, Any]
    if isinstance(reply, Started):
        fields = {"process": reply.process, "lineage": reply.lineage, "pid": reply.pid, "offset": reply.offset}
        if reply.stdin is not None:
            fields["stdin"] = reply.stdin
    elif isinstance(reply, InputArrived):
        fields = {"stdin": reply.end}
    elif isinstance(reply, Detached):
        fields = {"detached": True}
    elif isinstance(reply, Gap):
        fields = {"gap": {"start": reply.start, "end": reply.end}}
    elif isinstance(reply, ErrorResponse):
        fields = {"error": reply.error}
        if reply.code is not None:
            fields["code"] = reply.code
    else:
        fields = {"exit_code": reply.exit_code, "timed_out": reply.timed_out, "truncated": reply.truncated}
        if reply.signal is not None:
            fields["signal"] = reply.signal
    return json.dumps(fields, separators=(",", ":"))


def reply_from_json(text: str | bytes) -> Reply | None:
    """Return what a text message from the server says, or None for a kind this version does not know."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match fields:
        case {"timed_out": bool(timed_out), "truncated": bool(truncated), **rest}:
            return ExecResult(
                exit_code=_integer(rest.get("exit_code")),
                timed_out=timed_out,
                truncated=truncated,
                signal=_integer(rest.get("signal")),
            )
        case {"process": str(process), "lineage": str(lineage), "pid": int(pid), "offset": int(offset), **rest}:
            stdin = _integer(rest.get("stdin"))
            return Started(process=process, lineage=lineage, pid=pid, offset=offset, stdin=stdin)
        case {"stdin": int(end)}:
            return InputArrived(end=end)
        case {"detached": True}:
            return Detached()
        case {"gap": {"start": int(start), "end": int(end)}}:
            return Gap(start=start, end=end)
        case {"error": str(error), **rest}:
            code = rest.get("code")
            return ErrorResponse(error=error, code=code if isinstance(code, str) else None)
    return None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
