"""VMs: made, listed, named and labelled, started and stopped, removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from noid.client.answers import VmInfo
from noid.client.calls.call import Call, listed, nothing, one, with_query


def create(
    name: str, *, cpus: int, mem_mib: int, image: str | None = None, labels: Mapping[str, str] | None = None
) -> Call[VmInfo]:
    """Create a VM; answered when its guest answers. The first of a shape may take a minute.

    Refused with 409 if there is one of that name, 400 if it cannot be made that way. Nothing was made then.
    """
    body: dict[str, Any] = {"name": name, "cpus": cpus, "mem_mib": mem_mib}
    if image is not None:
        body["image"] = image
    if labels:
        body["labels"] = dict(labels)
    unsafe = None if image is None else ("choose images", "Its VMs are all made from its own one: leave --image away.")
    return Call(method="POST", path="/v1/vms", body=body, quick=False, understand=one(VmInfo), unsafe_before=unsafe)


def every(labels: Sequence[str] = ()) -> Call[list[VmInfo]]:
    """Ask for the caller's VMs, oldest first; with *labels*, ``KEY`` or ``KEY=VALUE``, for those that have all of them.

    Servers before 0.3.0 know no labels, and then answer with every VM.
    """
    return listed(with_query("/v1/vms", label=tuple(labels)), VmInfo)


def get(name: str) -> Call[VmInfo]:
    """Ask for the VM *name*; refused with 404 if there is none."""
    return Call(method="GET", path=f"/v1/vms/{name}", understand=one(VmInfo))


def changed(name: str, *, after: int, at_most_secs: float) -> Call[VmInfo]:
    """Ask for the VM *name* once its generation is greater than *after*, or after *at_most_secs* as it is then.

    Servers before 0.3.0 answer at once, without a generation.
    """
    path = with_query(f"/v1/vms/{name}", after=after, wait=f"{at_most_secs:g}")
    return Call(method="GET", path=path, quick=False, understand=one(VmInfo))


def rename(name: str, new_name: str) -> Call[VmInfo]:
    """Give the VM *name* another name; refused with 409 if there is one of that name."""
    return Call(method="PATCH", path=f"/v1/vms/{name}", body={"name": new_name}, quick=False, understand=one(VmInfo))


def label(name: str, labels: Mapping[str, str | None]) -> Call[VmInfo]:
    """Change labels of the VM *name*: each key gets its value, and one that is None goes. Others stay."""
    body = {"labels": dict(labels)}
    return Call(method="PATCH", path=f"/v1/vms/{name}", body=body, quick=False, understand=one(VmInfo))


def stop(name: str, *, grace_secs: float, force: bool = False) -> Call[VmInfo]:
    """Shut the VM *name* down; answered when its machine has ended. With *force* the guest is not asked."""
    return _change(name, "stop", {"timeout_secs": grace_secs, "force": force})


def start(name: str) -> Call[VmInfo]:
    """Boot the VM *name* on its disk; answered when its guest has booted."""
    return _change(name, "start", {})


def reboot(name: str, *, grace_secs: float, force: bool = False) -> Call[VmInfo]:
    """Shut the VM *name* down as `stop` does, then boot it as `start` does."""
    return _change(name, "reboot", {"timeout_secs": grace_secs, "force": force})


def pause(name: str) -> Call[VmInfo]:
    """Make the CPUs of the VM *name* stand still, until `resume`."""
    return _change(name, "pause", {})


def resume(name: str) -> Call[VmInfo]:
    """Let the VM *name* go on."""
    return _change(name, "resume", {})


def destroy(name: str) -> Call[None]:
    """End and remove the VM *name*; answered when nothing is left. Its checkpoints stay."""
    return Call(method="DELETE", path=f"/v1/vms/{name}", quick=False, understand=nothing)


def _change(name: str, what: str, body: dict[str, Any]) -> Call[VmInfo]:
    return Call(method="POST", path=f"/v1/vms/{name}/{what}", body=body, quick=False, understand=one(VmInfo))
