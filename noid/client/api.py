"""The agent's REST interface, one typed function for each call.

Answers are the JSON objects themselves: dictionaries whose guaranteed keys the types here name. Newer agents send more,
older ones only these, and ``--json`` prints what came.
"""

# Without `from __future__ import annotations`: as strings, TypedDict could not tell which keys are required.
import json
from typing import Any, NotRequired, TypedDict, TypeVar, cast

from noid.client.errors import ConnectionFailed, ServerError
from noid.client.settings import Endpoint
from noid.client.transport import Reply, request

RAW_TEXT_MAX = 200

ShapeT = TypeVar("ShapeT")


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
    is not known whether the guest answers.
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


class CheckpointInfo(TypedDict):
    """A checkpoint. *id* is 16 lowercase hex digits."""

    id: str
    vm_name: str
    label: str | None
    created_at: str
    timings: NotRequired[dict[str, float]]


class ProcessInfo(TypedDict):
    """A process of a VM. *id* is 8 hex digits, *state* running, exited or lost."""

    id: str
    pid: int
    command: list[str]
    state: str
    exit_code: int | None
    origin: str
    started_at: str | None


class Identity(TypedDict):
    """Who the agent says the caller is. *token* is the name of the token, None for the local user."""

    user_id: str
    name: str
    token: NotRequired[str | None]
    scopes: NotRequired[list[str]]


def whoami(endpoint: Endpoint) -> Identity:
    """Return who the caller is to the agent."""
    return _one(endpoint, _ask(endpoint, "GET", "/v1/whoami"), Identity)


def create_vm(endpoint: Endpoint, name: str, *, cpus: int, mem_mib: int, image: str | None = None) -> VmInfo:
    """Create a VM; returns when its guest answers. The first of a shape may take a minute.

    Raises:
        ServerError: 409 there is one of that name; 400 it cannot be made that way. Nothing was made.
    """
    body: dict[str, Any] = {"name": name, "cpus": cpus, "mem_mib": mem_mib}
    if image is not None:
        body["image"] = image
    return _one(endpoint, _ask(endpoint, "POST", "/v1/vms", body, quick=False), VmInfo)


def vms(endpoint: Endpoint) -> list[VmInfo]:
    """Return the caller's VMs, oldest first."""
    return _many(endpoint, _ask(endpoint, "GET", "/v1/vms"), VmInfo)


def vm(endpoint: Endpoint, name: str) -> VmInfo:
    """Return the VM *name*.

    Raises:
        ServerError: 404 there is none.
    """
    return _one(endpoint, _ask(endpoint, "GET", f"/v1/vms/{name}"), VmInfo)


def stop_vm(endpoint: Endpoint, name: str, *, grace_secs: float, force: bool = False) -> VmInfo:
    """Shut the VM *name* down; returns when its machine has ended. With *force* the guest is not asked."""
    body = {"timeout_secs": grace_secs, "force": force}
    return _one(endpoint, _ask(endpoint, "POST", f"/v1/vms/{name}/stop", body, quick=False), VmInfo)


def start_vm(endpoint: Endpoint, name: str) -> VmInfo:
    """Boot the VM *name* on its disk; returns when its guest has booted."""
    return _one(endpoint, _ask(endpoint, "POST", f"/v1/vms/{name}/start", {}, quick=False), VmInfo)


def reboot_vm(endpoint: Endpoint, name: str, *, grace_secs: float, force: bool = False) -> VmInfo:
    """Shut the VM *name* down as `stop_vm` does, then boot it as `start_vm` does."""
    body = {"timeout_secs": grace_secs, "force": force}
    return _one(endpoint, _ask(endpoint, "POST", f"/v1/vms/{name}/reboot", body, quick=False), VmInfo)


def pause_vm(endpoint: Endpoint, name: str) -> VmInfo:
    """Make the CPUs of the VM *name* stand still, until `resume_vm`."""
    return _one(endpoint, _ask(endpoint, "POST", f"/v1/vms/{name}/pause", {}, quick=False), VmInfo)


def resume_vm(endpoint: Endpoint, name: str) -> VmInfo:
    """Let the VM *name* go on."""
    return _one(endpoint, _ask(endpoint, "POST", f"/v1/vms/{name}/resume", {}, quick=False), VmInfo)


def destroy_vm(endpoint: Endpoint, name: str) -> None:
    """End and remove the VM *name*; returns when nothing is left. Its checkpoints stay."""
    _ask(endpoint, "DELETE", f"/v1/vms/{name}", quick=False)


def checkpoint_vm(endpoint: Endpoint, name: str, label: str | None = None) -> CheckpointInfo:
    """Freeze the running VM *name*; returns when the checkpoint is on disk."""
    path = f"/v1/vms/{name}/checkpoints"
    reply = _ask(endpoint, "POST", path, {} if label is None else {"label": label}, quick=False)
    return _one(endpoint, reply, CheckpointInfo)


def checkpoints(endpoint: Endpoint, name: str) -> list[CheckpointInfo]:
    """Return the checkpoints taken of *name*, oldest first."""
    return _many(endpoint, _ask(endpoint, "GET", f"/v1/vms/{name}/checkpoints"), CheckpointInfo)


def restore_vm(endpoint: Endpoint, name: str, checkpoint_id: str, new_name: str | None = None) -> VmInfo:
    """Put *name* back to a checkpoint, or make *new_name* from it; returns when the guest answers.

    Raises:
        ServerError: the VM is as it was.
    """
    body = {"checkpoint_id": checkpoint_id} | ({} if new_name is None else {"new_name": new_name})
    return _one(endpoint, _ask(endpoint, "POST", f"/v1/vms/{name}/restore", body, quick=False), VmInfo)


def processes(endpoint: Endpoint, name: str) -> list[ProcessInfo]:
    """Return the processes of the VM *name*, oldest first."""
    return _many(endpoint, _ask(endpoint, "GET", f"/v1/vms/{name}/processes"), ProcessInfo)


def start_process(endpoint: Endpoint, name: str, command: str) -> ProcessInfo:
    """Start a process that runs on without a client. *command* is `noid.core.wire.request_to_json` of it."""
    reply = _ask(endpoint, "POST", f"/v1/vms/{name}/processes", json.loads(command), quick=False)
    return _one(endpoint, reply, ProcessInfo)


def wait_process(endpoint: Endpoint, name: str, process: str, *, at_most_secs: float) -> ProcessInfo:
    """Return the process when it has ended, or after *at_most_secs* as it is then.

    Raises:
        ServerError: 404 there is none.
    """
    path = f"/v1/vms/{name}/processes/{process}/wait?timeout_secs={at_most_secs:g}"
    return _one(endpoint, _ask(endpoint, "GET", path, quick=False), ProcessInfo)


def signal_process(endpoint: Endpoint, name: str, process: str, signal: str | int) -> None:
    """Send *signal* to the process' group; an ended one does not mind."""
    _ask(endpoint, "POST", f"/v1/vms/{name}/processes/{process}/signal", {"signal": signal})


def end_process(endpoint: Endpoint, name: str, process: str) -> None:
    """End the process if it runs, and forget it and its output."""
    _ask(endpoint, "DELETE", f"/v1/vms/{name}/processes/{process}", quick=False)


def refusal(endpoint: Endpoint, reply: Reply) -> ServerError:
    """Return the error that *reply*, whose status is none of success, stands for."""
    status = reply.status
    try:
        fields = reply.json()
    except ValueError:
        fields = None
    match fields:
        case {"error": str(text), **rest}:
            code = rest.get("code")
            if status == 401:
                text = text.rstrip(".") + ". Check NOID_TOKEN, or run: noid auth setup --url URL --token TOKEN"
            return ServerError(text, status=status, code=code if isinstance(code, str) else None)
    if 300 <= status < 400:
        where = reply.headers.get("location", "elsewhere")
        return ServerError(f"it points to {where}. Give noid that URL: redirects are not followed.", status=status)
    text = " ".join(reply.body.decode("utf-8", "replace").split())
    if "html" in reply.headers.get("content-type", "") or text.startswith("<"):
        text = "a web page, not an answer of noid-server. Is the URL right, and is noid-server up behind that proxy?"
    elif not text:
        text = "no explanation. Is the URL right?"
    elif len(text) > RAW_TEXT_MAX:
        text = text[:RAW_TEXT_MAX] + " ..."
    return ServerError(f"{endpoint.address} answered: {text}", status=status)


def _ask(endpoint: Endpoint, method: str, path: str, body: object = None, *, quick: bool = True) -> Reply:
    reply = request(endpoint, method, path, body, quick=quick)
    if not 200 <= reply.status < 300:
        raise refusal(endpoint, reply)
    return reply


def _one(endpoint: Endpoint, reply: Reply, shape: type[ShapeT]) -> ShapeT:
    return _checked(endpoint, _decoded(endpoint, reply), shape)


def _many(endpoint: Endpoint, reply: Reply, shape: type[ShapeT]) -> list[ShapeT]:
    items = _decoded(endpoint, reply)
    if not isinstance(items, list):
        raise _not_noid(endpoint)
    return [_checked(endpoint, item, shape) for item in items]


def _checked(endpoint: Endpoint, item: object, shape: type[ShapeT]) -> ShapeT:
    required: frozenset[str] = getattr(shape, "__required_keys__")  # noqa: B009  # TypedDict's; unknown to type[ShapeT]
    if not isinstance(item, dict) or not required <= item.keys():
        raise _not_noid(endpoint)
    return cast("ShapeT", item)  # the line above is the check


def _decoded(endpoint: Endpoint, reply: Reply) -> object:
    try:
        return reply.json()
    except (ValueError, RecursionError) as error:
        raise _not_noid(endpoint) from error


def _not_noid(endpoint: Endpoint) -> ConnectionFailed:
    return ConnectionFailed(
        f"{endpoint.address} answered something noid-server would not. Is the URL right, or a login page in between?"
    )
