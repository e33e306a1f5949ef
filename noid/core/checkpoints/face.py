"""What can be done with checkpoints, but continue them: take one, look at them, label and delete them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from noid.core.checkpoints import checkpointing, discarding
from noid.core.database.listing import ALL, Wanted
from noid.core.model.names import checked_name
from noid.core.model.storage import Checkpoint
from noid.core.model.users import User
from noid.core.operations.outcomes import Outcome
from noid.core.operations.performing import Performer
from noid.core.services import Services
from noid.core.vms import changing, states
from noid.core.vms.changing import NO_LABELS
from noid.core.vms.pool import Pool
from noid.core.vms.sight import Sight
from noid.errors import Busy, NotFound


class Checkpoints:
    """One host's checkpoints. Every method sees its user's only."""

    def __init__(self, services: Services, operations: Performer, sight: Sight, pool: Pool) -> None:
        self._services = services
        self._store = services.store
        self._operations = operations
        self._sight = sight
        self._pool = pool

    async def take(self, user: User, name: str, label: str | None, labels: Mapping[str, str] = NO_LABELS) -> Outcome:
        """Freeze memory, devices and disk of a running VM. The VM goes on, whatever happens here.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            NoSpace: the disk is full; the VM runs, nothing is left of the checkpoint.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("checkpoint", name, vm.state)
        if (holder := self._sight.holder(vm)) is not None:
            raise Busy(name, holder)
        work = self._operations.work(user, vm=vm)
        work.machine = self._services.supervisor.get(vm).machine
        facts = checkpointing.facts_of_checkpoint(vm, label, labels)
        return await self._operations.run(checkpointing.CHECKPOINT_VM, "checkpoint", user, (name,), facts, work)

    def of(self, user: User, name: str, wanted: Wanted = ALL) -> list[Checkpoint]:
        """Return those *wanted* of the checkpoints *user* has of the VM *name*, oldest first; they outlive the VM.

        Raises:
            NotFound: there is neither such a VM nor a checkpoint of one.
        """
        found = self._store.checkpoints(user.id, dataclasses.replace(wanted, vm_name=checked_name(name)))
        if not found and not self._store.checkpoints(user.id, Wanted(vm_name=name, limit=1)):
            self._store.vm(user.id, name)
        return found

    def all(self, user: User, wanted: Wanted = ALL) -> list[Checkpoint]:
        """Return those *wanted* of all checkpoints *user* has, also of VMs that are gone, oldest first."""
        return self._store.checkpoints(user.id, wanted)

    def one(self, user: User, name: str, checkpoint_id: str) -> Checkpoint:
        """Return the checkpoint that *user* has of the VM *name*.

        Raises:
            NotFound: there is none, or it is of another VM.
        """
        checkpoint = self._store.checkpoint(user.id, checkpoint_id)
        if checkpoint.vm_name != checked_name(name):
            raise NotFound(f"checkpoint {checkpoint_id!r} not found: VM {name!r} has none of that id")
        return checkpoint

    async def change(
        self, user: User, checkpoint: Checkpoint, *, label: str | None, labels: Mapping[str, str | None] = NO_LABELS
    ) -> Outcome:
        """Say something else of *checkpoint*: *label* is its text from now on, *labels* a patch where None removes.

        Raises:
            NotFound: it has gone.
            Conflict: it is being changed or deleted.
            InvalidRequest: the labels cannot be.
        """
        facts = changing.facts_of_checkpoint(checkpoint, label=label, labels=labels)
        names, work = (changing.held_checkpoint(checkpoint.id),), self._operations.work(user)
        table, of = changing.CHANGE_CHECKPOINT, checkpoint.vm_name
        return await self._operations.run(table, "change", user, names, facts, work, vm_name=of)

    async def delete(self, user: User, checkpoint: Checkpoint) -> Outcome:
        """Delete *checkpoint*. VMs and checkpoints that were made from it live on.

        Raises:
            NotFound: it has gone.
            Conflict: it is being restored, changed or deleted.
        """
        work, facts = self._operations.work(user), discarding.facts_of_discard(checkpoint)

        async def clear_away() -> None:
            await self._pool.forget(lambda other: other.id == checkpoint.id)
            await discarding.remove_files(work, facts)

        return await self._operations.run(
            discarding.DELETE_CHECKPOINT,
            "delete",
            user,
            (changing.held_checkpoint(checkpoint.id),),
            facts,
            work,
            after=clear_away,
            vm_name=checkpoint.vm_name,
        )
