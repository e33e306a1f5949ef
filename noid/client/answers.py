"""What the agent answers: dictionaries whose guaranteed keys are named here.

Newer agents send more, older ones only these, and ``--json`` prints what came.
"""

# Without `from __future__ import annotations`: as strings, TypedDict could not tell which keys are required.
from typing import Any, NotRequired, TypedDict


class ReceiptItem(TypedDict):
    """One thing that makes a VM its own: ``done``, ``failed`` or ``not_possible``. Servers before 0.3.0 say nothing."""

    name: str
    status: str
    before: str
    after: str
    detail: str
    required: NotRequired[bool]


class VmInfo(TypedDict):
    """A VM. Times are UTC, ``YYYY-MM-DD HH:MM:SS``. *timings* are seconds by phase, in answers to changes.

    *ended* says how its last machine ended, *how* in the answer to a stop what that took; *responding* is None while it
    is not known whether the guest answers. *generation* grows with every change; servers before 0.3.0 do not tell it,
    nor *labels*.
    """

    name: str
    state: str
    cpus: int
    mem_mib: int
    created_at: str
    image: NotRequired[str]
    busy: NotRequired[str | None]
    receipt: NotRequired[list[ReceiptItem] | None]
    timings: NotRequired[dict[str, float]]
    ended: NotRequired[str | None]
    responding: NotRequired[bool | None]
    unresponsive_since: NotRequired[str | None]
    how: NotRequired[str]
    generation: NotRequired[int]
    labels: NotRequired[dict[str, str]]


class CheckpointInfo(TypedDict):
    """A checkpoint. *id* is 16 lowercase hex digits."""

    id: str
    vm_name: str
    label: str | None
    created_at: str
    labels: NotRequired[dict[str, str]]
    timings: NotRequired[dict[str, float]]


class ExecInfo(TypedDict):
    """How a command that was waited for has ended. *stdout* has stderr in it."""

    stdout: str
    exit_code: int | None
    timed_out: bool
    truncated: bool


class ProcessInfo(TypedDict):
    """A process of a VM. *id* is 8 hex digits, *state* running, exited or lost."""

    id: str
    pid: int
    command: list[str]
    state: str
    exit_code: int | None
    origin: str
    started_at: str | None


class Quota(TypedDict):
    """What the caller may have of each resource, None for no limit, and has."""

    limits: dict[str, int | None]
    use: dict[str, int]


class OperationInfo(TypedDict):
    """An operation. *state* is running, succeeded, failed or cancelled, *step* where it is or failed; UTC, RFC 3339."""

    id: str
    kind: str
    vm: str
    state: str
    step: str | None
    started_at: str
    ended_at: str | None
    error: NotRequired[dict[str, Any] | None]
    timings: NotRequired[dict[str, float]]


class Identity(TypedDict):
    """Who the agent says the caller is. *token* is the name of the token, None for the local user."""

    user_id: str
    name: str
    token: NotRequired[str | None]
    scopes: NotRequired[list[str]]


class ServerVersion(TypedDict):
    """Which noid-server answers."""

    version: str
    api_version: int
