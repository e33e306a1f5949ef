"""The REST routes: JSON in, one call of the agent, JSON out. Wire format and statuses are the predecessor's (0.2)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import trio
from quart import Response, request

from noid import __version__
from noid.core.agent import Agent
from noid.core.changes import vm_after
from noid.core.database.listing import Wanted, position_of
from noid.core.database.rows import VMS_REMEMBERED
from noid.core.model.names import NAME_LENGTH_MAX, checked_name
from noid.core.model.storage import Checkpoint
from noid.core.model.times import wire_time
from noid.core.model.users import Scope
from noid.core.model.vms import DEFAULT_CPUS, DEFAULT_MEM_MIB, Vm, VmSpec
from noid.core.operations.outcomes import Outcome
from noid.core.people.users import ordered
from noid.core.wire import API_VERSION
from noid.errors import InvalidRequest
from noid.server.answers import empty_reply, json_reply, json_text, text_reply
from noid.server.interim import still_working
from noid.server.lists import Page, wanted_labels, wanted_states
from noid.server.queries import seconds
from noid.server.schemas.checkpoints import CHECKPOINT_TAKEN, TAKE
from noid.server.schemas.lists import IN_STATE, LABELLED, PAGE, listed
from noid.server.schemas.server import CAPABILITIES, HEALTH, VERSION, WHOAMI
from noid.server.schemas.vms import CHANGE, CREATE, RESTORE, VM, VM_CHANGED
from noid.server.schemas.vocabulary import integer, number, optional_json
from noid.server.table import Route
from noid.server.visit import current_caller, current_user, visit
from noid.server.websockets import whole_number

WAIT_SECS = 30.0
WAIT_SECS_MAX = 300.0

_MISSING = object()
#: Kinds of operations that are answered with 201, and with 204.
_MAKING = frozenset({"vm.create", "vm.checkpoint"})
_REMOVING = frozenset({"vm.destroy", "checkpoint.delete"})


class VmRoutes:
    """What the server is, its VMs and their checkpoints. Names in paths are checked: a bad one is 400, not 404."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        vms, vm = "/v1/vms", "/v1/vms/<name>"
        return [
            Route(
                method="GET", path="/healthz", handler=self.healthz, scope=None, also=("/health",),
                answers={200: HEALTH},
            ),
            Route(method="GET", path="/version", handler=self.version, scope=None, answers={200: VERSION}),
            Route(method="GET", path="/v1/whoami", handler=self.whoami, answers={200: WHOAMI}),
            Route(method="GET", path="/v1/capabilities", handler=self.capabilities, answers={200: CAPABILITIES}),
            Route(
                method="POST", path=vms, handler=self.create, scope=Scope.MANAGE, operation=True,
                body=CREATE, answers={201: VM_CHANGED}, errors=frozenset({404}),
            ),
            Route(
                method="GET", path=vms, handler=self.vms,
                query={**LABELLED, **IN_STATE, **PAGE}, answers={200: listed(VM)},
            ),
            Route(
                method="GET", path=vm, handler=self.vm, answers={200: VM},
                query={
                    "after?": integer(0, about="Wait until the VM's generation is greater."),
                    "wait?": number(0, WAIT_SECS_MAX, default=WAIT_SECS, about="Seconds, if it does not become that."),
                },
            ),
            Route(
                method="PATCH", path=vm, handler=self.change, scope=Scope.MANAGE, operation=True,
                body=CHANGE, answers={200: VM_CHANGED},
            ),
            Route(
                method="DELETE", path=vm, handler=self.destroy, scope=Scope.MANAGE, operation=True,
                answers={204: None},
            ),
            Route(
                method="POST", path=f"{vm}/checkpoints", handler=self.checkpoint, scope=Scope.MANAGE, operation=True,
                body=optional_json(TAKE), answers={201: CHECKPOINT_TAKEN},
            ),
            Route(
                method="POST", path=f"{vm}/restore", handler=self.restore, scope=Scope.MANAGE, operation=True,
                body=RESTORE, answers={200: VM_CHANGED},
            ),
        ]  # fmt: skip

    async def healthz(self) -> Response:
        """Say that requests are answered."""
        return json_reply({"status": "ok"})

    async def version(self) -> Response:
        """Say which version answers."""
        return json_reply({"version": __version__, "api_version": API_VERSION})

    async def whoami(self) -> Response:
        """Say who asks."""
        caller = current_caller()
        who = {"user_id": caller.user.id, "name": caller.user.name}
        return json_reply(who | {"token": caller.token, "scopes": ordered(caller.scopes)})

    async def capabilities(self) -> Response:
        """Say what a client may count on."""
        config = self._agent.config
        return json_reply(
            {
                "api_version": API_VERSION,
                "max_exec_output_bytes": config.limits.max_output_bytes,
                "exec_timeout_secs": _whole(config.exec_timeout_secs),
                "console_timeout_secs": _whole(config.console_timeout_secs),
                "max_vm_name_length": NAME_LENGTH_MAX,
                "default_cpus": DEFAULT_CPUS,
                "default_mem_mib": DEFAULT_MEM_MIB,
            }
        )

    async def create(self) -> Response:
        """Create a VM: 201."""
        body = await read_body()
        spec = VmSpec(
            name=checked_name(body.text("name")),
            cpus=body.integer("cpus", DEFAULT_CPUS),
            mem_mib=body.integer("mem_mib", DEFAULT_MEM_MIB),
            image=body.optional_text("image") or "default",
            labels=body.labels("labels") or {},
        )
        visit().target = spec.name
        async with still_working():
            outcome = await self._agent.create_vm(current_user(), spec)
        return outcome_reply(outcome)

    async def vms(self) -> Response:
        """List the caller's VMs, oldest first."""
        page = Page.asked()
        wanted = page.of(Wanted(labels=wanted_labels(), states=wanted_states()))
        return page.reply_in_text(self._agent.vms(current_user(), wanted), vm_text, position_of)

    async def vm(self, name: str) -> Response:
        """Show one VM; with ``after`` once its generation is greater than that, or after ``wait`` as it is then."""
        vm = self._agent.vm(current_user(), checked_name(name))
        wait_secs = seconds("wait", request.args.get("wait"), WAIT_SECS, WAIT_SECS_MAX)
        generation = whole_number("after", request.args.get("after"), -1)
        if vm.generation <= generation:
            async with still_working():
                with trio.move_on_after(wait_secs):
                    await vm_after(self._agent, current_user(), name, generation)
            vm = self._agent.vm(current_user(), name)
        return text_reply(vm_text(vm))

    async def change(self, name: str) -> Response:
        """Change a VM's name, and its labels by a JSON merge patch. Its guest keeps the hostname it has."""
        checked_name(name)
        body = await read_body()
        new_name, labels = body.optional_text("name"), body.labels("labels", may_be_null=True)
        if new_name is not None:
            checked_name(new_name, "new VM name")
        async with still_working():
            outcome = await self._agent.change_vm(current_user(), name, new_name=new_name, labels=labels or {})
        return outcome_reply(outcome)

    async def destroy(self, name: str) -> Response:
        """Destroy a VM: 204."""
        async with still_working():
            outcome = await self._agent.destroy_vm(current_user(), checked_name(name))
        return outcome_reply(outcome)

    async def checkpoint(self, name: str) -> Response:
        """Checkpoint a VM: 201. The body may be missing altogether."""
        checked_name(name)
        body = await read_body(may_be_empty=True)
        label, labels = body.optional_text("label"), body.labels("labels")
        async with still_working():
            outcome = await self._agent.checkpoints.take(current_user(), name, label, labels or {})
        return outcome_reply(outcome)

    async def restore(self, name: str) -> Response:
        """Restore a checkpoint, in place or as a new VM: 200, as the predecessor does for both."""
        checked_name(name)
        body = await read_body()
        checkpoint_id, new_name = body.text("checkpoint_id"), body.optional_text("new_name")
        if new_name is not None:
            checked_name(new_name, "new VM name")
        labels = body.labels("labels")
        async with still_working():
            outcome = await self._agent.restore_vm(current_user(), name, checkpoint_id, new_name, labels)
        return outcome_reply(outcome)


@functools.lru_cache(maxsize=VMS_REMEMBERED)
def vm_text(vm: Vm) -> str:
    """Return *vm* as VmInfo in JSON."""
    return json_text(vm_fields(vm))


def vm_fields(vm: Vm) -> dict[str, Any]:
    """Return *vm* as VmInfo: the predecessor's five fields, then ours."""
    return {
        "name": vm.name,
        "state": vm.state.value,
        "cpus": vm.cpus,
        "mem_mib": vm.mem_mib,
        "created_at": wire_time(vm.created_at),
        "id": vm.id,
        "generation": vm.generation,
        "busy": vm.busy,
        "image": vm.image,
        "network": vm.network,
        "origin": vm.origin,
        "receipt": None if vm.receipt is None else [dataclasses.asdict(item) for item in vm.receipt.items],
        "ended": vm.ended,
        "responding": vm.responding,
        "unresponsive_since": None if vm.unresponsive_since is None else wire_time(vm.unresponsive_since),
        "labels": dict(vm.labels),
    }


def checkpoint_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return *checkpoint* as CheckpointInfo: the predecessor's four fields, then ours."""
    return {
        "id": checkpoint.id,
        "vm_name": checkpoint.vm_name,
        "label": checkpoint.label,
        "created_at": wire_time(checkpoint.created_at),
        "cpus": checkpoint.cpus,
        "mem_mib": checkpoint.mem_mib,
        "image": checkpoint.image,
        "parent": checkpoint.parent,
        "labels": dict(checkpoint.labels),
    }


def outcome_answer(outcome: Outcome) -> tuple[int, dict[str, Any] | None]:
    """Return status and body that an operation's outcome is told with, now or by whoever asks for it later."""
    if outcome.kind in _REMOVING:
        return 204, None
    status, timings = 201 if outcome.kind in _MAKING else 200, {"timings": dict(outcome.timings)}
    if outcome.checkpoint is not None:
        changed = {"changed_bytes": outcome.changed_bytes} if outcome.kind in _MAKING else {}
        return status, checkpoint_fields(outcome.checkpoint) | timings | changed
    if outcome.vm is None:  # destroyed in the same instant
        return 204, None
    how = {} if outcome.how is None else {"how": outcome.how}
    return status, vm_fields(outcome.vm) | timings | how


def outcome_reply(outcome: Outcome) -> Response:
    """Return what an operation's outcome is answered with."""
    status, body = outcome_answer(outcome)
    return empty_reply() if body is None else json_reply(body, status)


async def refuse_no_name() -> None:
    """Refuse ``/v1/vms/``, which would otherwise be the list. After the guard, which was registered before."""
    if request.path in ("/v1/vms/", "/vms/"):
        raise InvalidRequest("missing VM name in path")


@dataclass(frozen=True, slots=True)
class Body:
    """A request's JSON object. Types are strict, unknown fields are ignored."""

    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a string that must be there.

        Raises:
            InvalidRequest: it is not, or is something else.
        """
        value = self.fields.get(name, _MISSING)
        if value is _MISSING:
            raise InvalidRequest(f"invalid request body: missing field {name!r}.")
        return _checked_text(name, value)

    def optional_text(self, name: str) -> str | None:
        """Return a string, or None if it is null or missing.

        Raises:
            InvalidRequest: it is something else.
        """
        value = self.fields.get(name)
        return None if value is None else _checked_text(name, value)

    def integer(self, name: str, default: int) -> int:
        """Return an integer, of any size: whoever uses it knows its range. Booleans, strings and fractions are none.

        Raises:
            InvalidRequest: it is something else.
        """
        value = self.fields.get(name, default)
        if type(value) is not int:
            shown = json.dumps(value)[:40]
            raise InvalidRequest(f"invalid request body: {name!r} is {shown}; it must be an integer.")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a finite number. Booleans and strings are none.

        Raises:
            InvalidRequest: it is something else.
        """
        value = self.fields.get(name, default)
        if type(value) not in (int, float) or not -1e18 < value < 1e18:  # NaN fails here too
            raise InvalidRequest(f"invalid request body: {name!r} is {json.dumps(value)[:40]}; it must be a number.")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return a boolean; one that is missing is false.

        Raises:
            InvalidRequest: it is something else.
        """
        value = self.fields.get(name, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"invalid request body: {name!r} must be true or false.")
        return value

    @overload
    def labels(self, name: str) -> dict[str, str] | None: ...

    @overload
    def labels(self, name: str, *, may_be_null: Literal[True]) -> dict[str, str | None] | None: ...

    def labels(self, name: str, *, may_be_null: bool = False) -> Any:
        """Return an object of strings, or None if it is missing. In a patch a value *may be null*.

        Raises:
            InvalidRequest: it is something else.
        """
        if name not in self.fields:
            return None
        value = self.fields[name]
        if not isinstance(value, dict):
            raise InvalidRequest(f"invalid request body: {name!r} must be an object of strings.")
        return {
            _checked_text(f"a key of {name}", key): None
            if text is None and may_be_null
            else _checked_text(f"{name}.{key[:80]}", text)
            for key, text in value.items()
        }


async def read_body(*, may_be_empty: bool = False) -> Body:
    """Return the current request's JSON object.

    Raises:
        InvalidRequest: it is not one.
    """
    raw = await request.get_data()
    assert isinstance(raw, bytes)  # noqa: S101  # as_text is off
    if may_be_empty and not raw.strip():
        return Body({})
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"invalid request body: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("invalid request body: expected a JSON object.")
    return Body(fields)


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"invalid request body: {name!r} must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"invalid request body: {name!r} contains half a surrogate pair.") from error
    return value


def _whole(secs: float) -> float:
    """Return *secs* as an integer where it is one: the predecessor's clients expect integers."""
    return int(secs) if secs.is_integer() else secs
