"""What an agent can be asked, for one user at a time: VMs come, go and change, and a face for each other subject.

`noid.core.opening` opens one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from noid.core.checkpoints.face import Checkpoints
from noid.core.checkpoints.templates import Templates
from noid.core.config.settings import Config
from noid.core.database.listing import ALL, Wanted
from noid.core.guests.face import Guests
from noid.core.guests.processlogs import ProcessLogs
from noid.core.guests.sessions import Sessions
from noid.core.guests.vmlogs import ConsoleLogs, VmLogs
from noid.core.model.names import checked_labels, checked_name
from noid.core.model.storage import Checkpoint
from noid.core.model.users import User
from noid.core.model.vms import Vm, VmSpec
from noid.core.operations.keys import Keys
from noid.core.operations.outcomes import Outcome
from noid.core.operations.performing import Performer
from noid.core.operations.running import Operations
from noid.core.people.audit import AuditLog
from noid.core.people.users import Users, local_user_name
from noid.core.services import Services
from noid.core.vms import changing, lifecycle, states
from noid.core.vms.changing import NO_LABELS
from noid.core.vms.pool import Pool
from noid.core.vms.sight import Sight
from noid.core.vms.switch import PowerSwitch
from noid.errors import NoidError, NotFound

logger = logging.getLogger(__name__)


class Agent:
    """One host's VMs. Every method that takes a user sees that user's things only.

    Attributes:
        power: Stops, starts, reboots, pauses and resumes them.
        checkpoints: Takes, lists, labels and deletes checkpoints; `restore_vm` continues one.
        guests: Their agents, processes and consoles.
        logs: What they and their processes have printed.
        operations: What is being done, and was.
        keys: Calls that are repeated.
        users: Who there is, and their tokens.
        audit: Who did what.
    """

    def __init__(
        self,
        services: Services,
        users: Users,
        audit: AuditLog,
        operations: Operations,
        templates: Templates,
        pool: Pool,
        sessions: Sessions,
    ) -> None:
        self.config = services.config
        self.services = services
        self.users = users
        self.audit = audit
        self.operations = Performer(services, operations, templates)
        self.keys = Keys(services.store, self.operations)
        self._store = services.store
        self._pool = pool
        self._locks = operations
        self._sight = Sight(services.store, services.supervisor, operations)
        self._local_user = services.store.user_named(local_user_name())
        self.power = PowerSwitch(services, self.operations, self._sight)
        self.checkpoints = Checkpoints(services, self.operations, self._sight, pool)
        self.guests = Guests(services, sessions, self._sight)
        self.logs = VmLogs([ConsoleLogs(services.supervisor, services.layout), ProcessLogs(sessions)])

    def take_up(self, config: Config) -> None:
        """Go by *config* from now on, in what the agent itself looks up each time: limits and quotas."""
        self.config = config
        self.services.quotas.take_up(config.quota, config.limits)

    def local_user(self) -> User:
        """Return the user whom the local socket's peer is: the one this agent runs as."""
        return self._local_user

    @property
    def waiting_machines(self) -> int:
        """How many woken machines wait for the next create."""
        return self._pool.woken

    @property
    def ready_copies(self) -> int:
        """How many copies of the checkpoint that was restored last stand ready for the next restore of it."""
        return self._pool.copies

    def vms(self, user: User, wanted: Wanted = ALL) -> list[Vm]:
        """Return those of *user*'s VMs that are *wanted*, oldest first."""
        return self._sight.all(user, wanted)

    def vm(self, user: User, name: str) -> Vm:
        """Return *user*'s VM.

        Raises:
            NotFound: there is none of that name, or it is not theirs.
        """
        return self._sight.one(user, name)

    async def settled(self, user: User, name: str) -> None:
        """Return when no operation holds *user*'s VM *name*. The next may be faster than whoever waited."""
        await self._locks.free(user.id, name)

    async def create_vm(self, user: User, spec: VmSpec) -> Outcome:
        """Make a VM from its shape's golden template, booting that first when there is none.

        Raises:
            InvalidRequest: the spec cannot be, here.
            Conflict: the name is taken.
            NotFound: no such image.
        """
        spec.checked(host_mem_mib())
        self.services.quotas.check_shape(spec.mem_mib)
        self.services.plugins.hook.validate_vm(spec=spec, owner=user)
        facts = lifecycle.facts_of_new_vm(spec.name, None)
        work = self.operations.work(user, spec=spec)
        work.take = self._pool.take

        async def want_another() -> None:
            self._pool.want(spec)

        return await self.operations.run(
            lifecycle.CREATE_VM, "create", user, (spec.name,), facts, work, after=want_another
        )

    async def destroy_vm(self, user: User, name: str) -> Outcome:
        """End the VM and remove its disk and memory. Its checkpoints stay.

        Raises:
            NotFound: there is no such VM.
        """
        vm = self._store.vm(user.id, checked_name(name))
        work = self.operations.work(user, vm=vm)
        return await self.operations.run(
            lifecycle.DESTROY_VM, "destroy", user, (name,), lifecycle.facts_of_destroy(vm), work
        )

    async def forget_copies(self, user: User) -> None:
        """End what stands ready for *user*, who is being removed."""
        await self._pool.forget(lambda checkpoint: checkpoint.owner == user.id)

    async def change_vm(
        self, user: User, name: str, *, new_name: str | None = None, labels: Mapping[str, str | None] = NO_LABELS
    ) -> Outcome:
        """Give the VM another name, which its checkpoints follow, and patch its labels: None removes one.

        Raises:
            NotFound: there is no such VM.
            Conflict: the name is taken; or it is being made or destroyed.
            InvalidRequest: the name or the labels cannot be, here.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("change", name, vm.state)
        if new_name in (None, name) and not labels:
            return Outcome(kind=changing.CHANGE_VM.kind, vm=self._sight.one(user, name))
        changing.patched(vm.labels, labels)
        own: list[Checkpoint] = []
        names: tuple[str, ...] = (name,)
        if new_name is not None and new_name != name:
            spec = VmSpec(name=new_name, cpus=vm.cpus, mem_mib=vm.mem_mib, image=vm.image, labels=vm.labels)
            self.services.plugins.hook.validate_vm(spec=spec, owner=user)
            own = [c for c in self._store.checkpoints(user.id) if c.vm_id == vm.id]
            names = (name, checked_name(new_name, "new VM name"), *(changing.held_checkpoint(c.id) for c in own))
        facts = changing.facts_of_vm(vm, name=new_name, labels=labels, checkpoints=own)
        return await self.operations.run(
            changing.CHANGE_VM, "change", user, names, facts, self.operations.work(user, vm=vm)
        )

    async def restore_vm(
        self,
        user: User,
        name: str,
        checkpoint_id: str,
        new_name: str | None,
        labels: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Continue a checkpoint: as a new VM *new_name*, or in place of VM *name*.

        In place, the new machine is built beside the old one, which ends only when the new one has woken; on any
        failure it still runs. A VM that was destroyed meanwhile comes back under its name. *labels* are those it has
        then; None: none for a new VM, in place those it has.

        Raises:
            NotFound: no such checkpoint.
            Conflict: *new_name* is taken; or the checkpoint is of another VM than *name*.
            Incompatible, Damaged: the checkpoint cannot continue here.
        """
        checked_name(name)
        checkpoint = self._store.checkpoint(user.id, checkpoint_id)
        if new_name is None and any(vm.name == name for vm in self._store.vms(user.id)):
            return await self._restore_in_place(user, name, checkpoint, labels)
        if new_name is None and checkpoint.vm_name != name:
            raise NotFound(f"VM {name!r} not found")
        target = checked_name(new_name or name, "new VM name")
        spec = VmSpec(
            name=target,
            cpus=checkpoint.cpus,
            mem_mib=checkpoint.mem_mib,
            image=checkpoint.image,
            labels=checked_labels(labels or {}),
        )
        self.services.plugins.hook.validate_vm(spec=spec, owner=user)
        facts = lifecycle.facts_of_new_vm(target, checkpoint.id)
        work = self.operations.work(user, spec=spec)
        work.take_copy = self._pool.take_copy

        async def want_another() -> None:
            self._pool.want_copy(checkpoint)

        return await self.operations.run(lifecycle.FORK_VM, "restore", user, (target,), facts, work, after=want_another)

    async def _restore_in_place(
        self, user: User, name: str, checkpoint: Checkpoint, labels: Mapping[str, str] | None
    ) -> Outcome:
        old = self._store.vm(user.id, name)
        states.require("restore", name, old.state)
        lifecycle.require_own_checkpoint(old, checkpoint)
        work = self.operations.work(user, vm=old)
        work.take_copy = self._pool.take_copy
        facts = lifecycle.facts_of_restore(old, checkpoint.id, None if labels is None else checked_labels(labels))

        async def end_old() -> None:
            self._pool.want_copy(checkpoint)
            try:
                await lifecycle.end_replaced(work, old)
            except (NoidError, OSError):  # the restore has happened; nothing owns the old machine any more
                logger.exception("the old machine of VM %s is not entirely gone; the next start sweeps it", name)

        return await self.operations.run(lifecycle.RESTORE_VM, "restore", user, (name,), facts, work, after=end_old)


def host_mem_mib() -> int:
    """Return the host's memory in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)
