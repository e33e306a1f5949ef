"""What owners say of their VMs and checkpoints, as tables that change it: a VM's name and labels, a checkpoint's.

What is said lies in a row and beside the data, so that a lost database is rebuilt with it: a VM's in its ``vm.json``,
written within the commit, a checkpoint's in its manifest, which a step changes and its undo changes back. A VM's new
name is also its checkpoints'. The guest is not told: its hostname stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import trio

from noid import hostfs
from noid.core.checkpoints import manifest as manifests
from noid.core.database import deeds
from noid.core.database.store import Tx
from noid.core.model.names import checked_label, checked_labels
from noid.core.model.storage import Checkpoint
from noid.core.model.vms import Vm
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Work, given
from noid.errors import Damaged, NotFound

logger = logging.getLogger(__name__)

#: No labels, or no change of any.
NO_LABELS: Mapping[str, str] = MappingProxyType({})


def patched(labels: Mapping[str, str], patch: Mapping[str, str | None]) -> dict[str, str]:
    """Return *labels* with a JSON merge patch applied: a value sets, None removes.

    Raises:
        InvalidRequest: what comes out is not allowed, or the patch has more than could be there.
    """
    checked_labels(dict.fromkeys((key for key, value in patch.items() if value is None), ""))
    merged: dict[str, str | None] = {**labels, **patch}
    return checked_labels({key: value for key, value in merged.items() if value is not None})


def held_checkpoint(checkpoint_id: str) -> str:
    """Return what an operation on a checkpoint holds, among the names of VMs: no VM can have such a name."""
    return f"checkpoint/{checkpoint_id}"


# --- a VM ------------------------------------------------------------------------------------------------------------


async def tell_checkpoints(work: Work, facts: Facts) -> None:
    """Write the new name into the manifests of the VM's checkpoints."""
    await _amend_all(work, facts, facts["name"])


async def tell_checkpoints_back(work: Work, facts: Facts) -> None:
    """Write the old name into them again."""
    await _amend_all(work, facts, facts["old_name"])


async def _amend_all(work: Work, facts: Facts, vm_name: str) -> None:
    if facts["name"] != facts["old_name"]:
        for checkpoint_id in facts["checkpoints"]:
            await _amend(work, checkpoint_id, vm_name=vm_name)


async def _amend(work: Work, checkpoint_id: str, **changes: Any) -> None:
    """Change a published checkpoint's manifest. One that cannot be read stays as it is: its row is what counts."""
    directory = work.services.layout.checkpoint(given(work.user).id, checkpoint_id)
    try:
        with hostfs.os_errors("changing the checkpoint's manifest"):
            await trio.to_thread.run_sync(lambda: manifests.amend(directory, **changes))
    except (NotFound, Damaged) as error:
        logger.warning("what is said of checkpoint %s is in the database only: %s", checkpoint_id, error)


def commit_vm(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM and its checkpoints are called so, and the VM is labelled so."""
    vm = tx.current(facts["vm_id"])
    tx.update_vm(vm, name=facts["name"], labels=patched(vm.labels, facts["patch"]))
    if facts["name"] != facts["old_name"]:
        tx.rename_checkpoints(vm.owner, vm.id, facts["name"])
    deeds.write_vm(work.services.layout, tx.current(vm.id), given(work.user))


def facts_of_vm(vm: Vm, *, name: str | None, labels: Mapping[str, str | None], checkpoints: list[Checkpoint]) -> Facts:
    """Name what changes: *labels* is a merge patch, *checkpoints* are the VM's."""
    return {
        "vm_id": vm.id,
        "instance": vm.instance,
        "name": name or vm.name,
        "old_name": vm.name,
        "patch": dict(labels),
        "checkpoints": [checkpoint.id for checkpoint in checkpoints],
    }


CHANGE_VM: Saga[Work] = Saga(
    "vm.change", (Step("checkpoints", tell_checkpoints, tell_checkpoints_back),), commit_vm, deadline_secs=120.0
)


# --- a checkpoint ----------------------------------------------------------------------------------------------------


async def write_said(work: Work, facts: Facts) -> None:
    """Write into the manifest what is said now."""
    await _amend(work, facts["checkpoint_id"], **facts["said"])


async def write_said_before(work: Work, facts: Facts) -> None:
    """Write into the manifest what was said before."""
    await _amend(work, facts["checkpoint_id"], **facts["said_before"])


def commit_checkpoint(work: Work, facts: Facts, tx: Tx) -> None:
    """The checkpoint is labelled so."""
    work.checkpoint = tx.update_checkpoint(given(work.user).id, facts["checkpoint_id"], **facts["said"])


def facts_of_checkpoint(checkpoint: Checkpoint, *, label: str | None, labels: Mapping[str, str | None]) -> Facts:
    """Name what changes: *label* is the text as it shall be, *labels* a merge patch."""
    return {
        "checkpoint_id": checkpoint.id,
        "said": {"label": checked_label(label), "labels": patched(checkpoint.labels, labels)},
        "said_before": {"label": checkpoint.label, "labels": dict(checkpoint.labels)},
    }


CHANGE_CHECKPOINT: Saga[Work] = Saga(
    "checkpoint.change", (Step("manifest", write_said, write_said_before),), commit_checkpoint, deadline_secs=60.0
)
