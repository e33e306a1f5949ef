"""Servers of before 0.3.0: what they cannot do, and what of theirs has to be read differently.

They answer unknown routes with 404 ``not found`` and no code, and every WebSocket below a VM with a 101, without the
version that noid-server since 0.3.0 puts into it. What they do not know inside a request they ignore.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from noid.client.calls import vms
from noid.client.errors import ServerError, ServerTooOld
from noid.core.model.processes import LOG_BYTES, ExecRequest
from noid.errors import Conflict

if TYPE_CHECKING:
    from noid.client.calls.call import Reply
    from noid.client.link import Link

INPUT = "give a command input"

_VM = "/v1/vms/[^/]+"
_CHANGES = "stop|start|reboot|pause|resume"
_CANNOT = (
    ("PATCH", _VM, "rename or label VMs"),
    ("POST", f"{_VM}/({_CHANGES})", ""),
    ("GET", "/v1/checkpoints", "list checkpoints across VMs"),
    ("GET", f"{_VM}/checkpoints/[^/]+", "show a single checkpoint"),
    ("PATCH", f"{_VM}/checkpoints/[^/]+", "label checkpoints"),
    ("DELETE", f"{_VM}/checkpoints/[^/]+", "remove checkpoints"),
    (".+", f"{_VM}/processes(/.*)?", "keep track of processes"),
    ("GET", f"({_VM}/logs(/.*)?|/logs/[^/]+)", "show logs"),
    (".+", f"{_VM}/files", "copy files"),
    (".+", f"{_VM}/ports(/.*)?", "forward ports"),
    (".+", "/v1/operations(/.*)?", "keep track of operations"),
    ("GET", "/v1/events", "tell of events"),
    (".+", "/v1/tokens(/.*)?", "manage tokens"),
    ("GET", "/v1/quota", "tell quotas"),
    (".+", "/v1/users/[^/]+", "remove users from afar"),
    ("GET", "/metrics", "tell metrics"),
    ("GET", "/(openapi.json|docs)", "describe its API"),
)


def cannot(method: str, path: str) -> str | None:
    """Return what a server that does not know this route cannot do, in words; None for routes of every server."""
    asked = f"{method} {path.partition('?')[0]}"
    for methods, pattern, deed in _CANNOT:
        if found := re.fullmatch(f"(?:{methods}) {pattern}", asked):
            return deed or f"{found[1]} VMs"
    return None


def is_unknown_route(reply: Reply) -> bool:
    """Return whether *reply* is what a server says to a route it does not know, and not to a thing."""
    try:
        fields: Any = reply.json()
    except (ValueError, RecursionError):
        return False
    return reply.status == 404 and fields == {"error": "not found"}


def check_request(request: ExecRequest, address: str, version: str) -> None:
    """Make sure that a server before 0.3.0 does all of *request*: what it does not know it ignores.

    Raises:
        ServerTooOld: it would not. `INPUT` is looked for last.
    """
    for is_wanted, deed in (
        (request.tty is not None, "give a command a terminal"),
        (request.user is not None, "run a command as another user"),
        (request.cwd is not None, "run a command in another directory"),
        (request.timeout_secs is not None, "end a command after a time of yours"),
        (request.log_bytes != LOG_BYTES, "keep a command's output"),
        (request.stdin, INPUT),
    ):
        if is_wanted:
            raise ServerTooOld(address, version, deed)


def vm_of(path: str) -> str:
    """Return the name of the VM that *path* belongs to."""
    return path.split("/")[3]


async def check_vm(link: Link, name: str) -> None:
    """Make sure that the VM *name* runs: nothing that is asked of the console of a dead one ever has an answer.

    Raises:
        ServerError: it does not, or there is none.
    """
    state = (await link.perform(vms.get(name)))["state"]
    if state != "running":
        raise ServerError(
            f"VM {name!r} does not run: it is {state}, and its server can only make a new VM from a checkpoint of it "
            "(noid restore --as), or destroy it.",
            status=0,
            code=Conflict.code,
        )
