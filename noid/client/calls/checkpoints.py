"""Checkpoints: taken, listed, labelled, restored, removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from noid.client.answers import CheckpointInfo, VmInfo
from noid.client.calls.call import Call, listed, nothing, one, with_query

_LOSES_IT = (
    "put a VM back in place: it would lose the VM, and answer nobody until it is started anew",
    "Make a new VM with --as NEW_NAME, and destroy the old one.",
)


def take(name: str, label: str | None = None, *, labels: Mapping[str, str] | None = None) -> Call[CheckpointInfo]:
    """Freeze the running VM *name*; answered when the checkpoint is on disk. *label* is a text, *labels* are words."""
    body: dict[str, Any] = {} if label is None else {"label": label}
    if labels:
        body["labels"] = dict(labels)
    path = f"/v1/vms/{name}/checkpoints"
    return Call(method="POST", path=path, body=body, quick=False, understand=one(CheckpointInfo))


def every(*, vm: str | None = None, labels: Sequence[str] = ()) -> Call[list[CheckpointInfo]]:
    """Ask for the caller's checkpoints, oldest first, also of VMs that are gone; of *vm* alone, or with all *labels*.

    Labels are ``KEY`` or ``KEY=VALUE``. Servers before 0.3.0 only know `of_vm`, and answer 404.
    """
    path = with_query("/v1/checkpoints", vm=vm, label=tuple(labels))
    return listed(path, CheckpointInfo)


def of_vm(name: str) -> Call[list[CheckpointInfo]]:
    """Ask for the checkpoints taken of *name*, oldest first."""
    return listed(f"/v1/vms/{name}/checkpoints", CheckpointInfo)


def get(name: str, checkpoint_id: str) -> Call[CheckpointInfo]:
    """Ask for one checkpoint of *name*."""
    return Call(method="GET", path=f"/v1/vms/{name}/checkpoints/{checkpoint_id}", understand=one(CheckpointInfo))


def label(name: str, checkpoint_id: str, labels: Mapping[str, str | None]) -> Call[CheckpointInfo]:
    """Change labels of a checkpoint of *name*: each key gets its value, and one that is None goes. Others stay."""
    path, body = f"/v1/vms/{name}/checkpoints/{checkpoint_id}", {"labels": dict(labels)}
    return Call(method="PATCH", path=path, body=body, quick=False, understand=one(CheckpointInfo))


def remove(name: str, checkpoint_id: str) -> Call[None]:
    """Remove a checkpoint of *name*. What was made from it lives on; 409 while it is being restored."""
    path = f"/v1/vms/{name}/checkpoints/{checkpoint_id}"
    return Call(method="DELETE", path=path, quick=False, understand=nothing)


def restore(
    name: str, checkpoint_id: str, new_name: str | None = None, *, labels: Mapping[str, str] | None = None
) -> Call[VmInfo]:
    """Put *name* back to a checkpoint, or make *new_name* from it; answered when the guest answers.

    If it is refused or fails, the VM is as it was. With *labels*, those are all that the VM has afterwards.
    """
    body: dict[str, Any] = {"checkpoint_id": checkpoint_id} | ({} if new_name is None else {"new_name": new_name})
    if labels:
        body["labels"] = dict(labels)
    return Call(
        method="POST",
        path=f"/v1/vms/{name}/restore",
        body=body,
        quick=False,
        understand=one(VmInfo),
        unsafe_before=_LOSES_IT if new_name is None else None,
    )
