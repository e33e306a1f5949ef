"""VMs: made, listed, started and stopped, removed."""

from __future__ import annotations

from typing import Any

from noid.client.answers import VmInfo
from noid.client.calls.call import Call, many, nothing, one


def create(name: str, *, cpus: int, mem_mib: int, image: str | None = None) -> Call[VmInfo]:
    """Create a VM; answered when its guest answers. The first of a shape may take a minute.

    Refused with 409 if there is one of that name, 400 if it cannot be made that way. Nothing was made then.
    """
    body: dict[str, Any] = {"name": name, "cpus": cpus, "mem_mib": mem_mib}
    if image is not None:
        body["image"] = image
    return Call(method="POST", path="/v1/vms", body=body, quick=False, understand=one(VmInfo))


def every() -> Call[list[VmInfo]]:
    """Ask for the caller's VMs, oldest first."""
    return Call(method="GET", path="/v1/vms", understand=many(VmInfo))


def get(name: str) -> Call[VmInfo]:
    """Ask for the VM *name*; refused with 404 if there is none."""
    return Call(method="GET", path=f"/v1/vms/{name}", understand=one(VmInfo))


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
