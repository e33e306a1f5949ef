"""Checkpoints: taken, listed, restored."""

from __future__ import annotations

from noid.client.answers import CheckpointInfo, VmInfo
from noid.client.calls.call import Call, many, one


def take(name: str, label: str | None = None) -> Call[CheckpointInfo]:
    """Freeze the running VM *name*; answered when the checkpoint is on disk."""
    body = {} if label is None else {"label": label}
    path = f"/v1/vms/{name}/checkpoints"
    return Call(method="POST", path=path, body=body, quick=False, understand=one(CheckpointInfo))


def of_vm(name: str) -> Call[list[CheckpointInfo]]:
    """Ask for the checkpoints taken of *name*, oldest first."""
    return Call(method="GET", path=f"/v1/vms/{name}/checkpoints", understand=many(CheckpointInfo))


def restore(name: str, checkpoint_id: str, new_name: str | None = None) -> Call[VmInfo]:
    """Put *name* back to a checkpoint, or make *new_name* from it; answered when the guest answers.

    If it is refused or fails, the VM is as it was.
    """
    body = {"checkpoint_id": checkpoint_id} | ({} if new_name is None else {"new_name": new_name})
    return Call(method="POST", path=f"/v1/vms/{name}/restore", body=body, quick=False, understand=one(VmInfo))
