"""What an agent can be asked: every verb of the product, for one user at a time. `noid.core.opening` opens one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType

import trio

from noid.core import changing, checkpointing, discarding, lifecycle, pausing, power, states
from noid.core.audit import AuditLog
from noid.core.backends import Guest
from noid.core.config import Config
from noid.core.console import Console
from noid.core.keys import Keys
from noid.core.listing import ALL, Wanted
from noid.core.model import (
    Checkpoint,
    ExecRequest,
    User,
    Vm,
    VmSpec,
    VmState,
    checked_labels,
    checked_name,
    wire_time,
)
from noid.core.operations import Operations
from noid.core.outcomes import Outcome
from noid.core.performing import Performer, seen_by
from noid.core.pool import Pool
from noid.core.processlogs import ProcessLogs
from noid.core.saga import Facts, Saga
from noid.core.services import Services
from noid.core.session import Session
from noid.core.sessions import Sessions, VmSessions
from noid.core.supervisor import GuestLink
from noid.core.templates import Templates
from noid.core.users import Users, local_user_name
from noid.core.vmlogs import ConsoleLogs, VmLogs
from noid.core.work import Work
from noid.errors import Busy, Conflict, DeadlineExceeded, NoidError, NotFound

logger = logging.getLogger(__name__)

HANDOVER_SECS = 2.0
CONNECT_SECS = 10.0
RECOVERED_SECS = 2.0
#: No labels, or no change of any.
NOTHING: Mapping[str, str] = MappingProxyType({})


class Agent:
    """One host's VMs. Every method that takes a user sees that user's things only."""

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
        self._store = services.store
        self.users = users
        self.audit = audit
        self._locks = operations
        self.operations = Performer(services, operations)
        self.keys = Keys(services.store, self.operations)
        self._templates = templates
        self._pool = pool
        self._sessions = sessions
        self._local_user = services.store.user_named(local_user_name())
        self.logs = VmLogs([ConsoleLogs(services.supervisor, services.layout), ProcessLogs(sessions)])

    def take_up(self, config: Config) -> None:
        """Go by *config* from now on, in what the agent itself looks up each time: limits and quotas."""
        self.config = config
        self.services.quotas.take_up(config.quota, config.limits)

    # --- VMs -------------------------------------------------------------------------------------------------------

    def vms(self, user: User, wanted: Wanted = ALL) -> list[Vm]:
        """Return those of *user*'s VMs that are *wanted*, oldest first."""
        return [self._with_busy(vm) for vm in self._store.vms(user.id, wanted)]

    def vm(self, user: User, name: str) -> Vm:
        """Return *user*'s VM.

        Raises:
            NotFound: there is none of that name, or it is not theirs.
        """
        return self._with_busy(self._store.vm(user.id, checked_name(name)))

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
        work = self._work(user, spec=spec)
        work.take = self._pool.take

        async def want_another() -> None:
            self._pool.want(spec)

        return await self._run(lifecycle.CREATE_VM, "create", user, (spec.name,), facts, work, after=want_another)

    async def destroy_vm(self, user: User, name: str) -> Outcome:
        """End the VM and remove its disk and memory. Its checkpoints stay.

        Raises:
            NotFound: there is no such VM.
        """
        vm = self._store.vm(user.id, checked_name(name))
        work = self._work(user, vm=vm)
        return await self._run(lifecycle.DESTROY_VM, "destroy", user, (name,), lifecycle.facts_of_destroy(vm), work)

    async def change_vm(
        self, user: User, name: str, *, new_name: str | None = None, labels: Mapping[str, str | None] = NOTHING
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
            return Outcome(kind=changing.CHANGE_VM.kind, vm=self._with_busy(vm))
        changing.patched(vm.labels, labels)
        own: list[Checkpoint] = []
        names: tuple[str, ...] = (name,)
        if new_name is not None and new_name != name:
            spec = VmSpec(name=new_name, cpus=vm.cpus, mem_mib=vm.mem_mib, image=vm.image, labels=vm.labels)
            self.services.plugins.hook.validate_vm(spec=spec, owner=user)
            own = [c for c in self._store.checkpoints(user.id) if c.vm_id == vm.id]
            names = (name, checked_name(new_name, "new VM name"), *(changing.held_checkpoint(c.id) for c in own))
        facts = changing.facts_of_vm(vm, name=new_name, labels=labels, checkpoints=own)
        return await self._run(changing.CHANGE_VM, "change", user, names, facts, self._work(user, vm=vm))

    async def checkpoint_vm(
        self, user: User, name: str, label: str | None, labels: Mapping[str, str] = NOTHING
    ) -> Outcome:
        """Freeze memory, devices and disk of a running VM. The VM goes on, whatever happens here.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            NoSpace: the disk is full; the VM runs, nothing is left of the checkpoint.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("checkpoint", name, vm.state)
        if (holder := self._locks.holder(user.id, name)) is not None:
            raise Busy(name, holder)
        work = self._work(user, vm=vm)
        work.machine = self.services.supervisor.get(vm).machine
        facts = checkpointing.facts_of_checkpoint(vm, label, labels)
        return await self._run(checkpointing.CHECKPOINT_VM, "checkpoint", user, (name,), facts, work)

    def checkpoints(self, user: User, name: str, wanted: Wanted = ALL) -> list[Checkpoint]:
        """Return those *wanted* of the checkpoints *user* has of the VM *name*, oldest first; they outlive the VM.

        Raises:
            NotFound: there is neither such a VM nor a checkpoint of one.
        """
        found = self._store.checkpoints(user.id, dataclasses.replace(wanted, vm_name=checked_name(name)))
        if not found and not self._store.checkpoints(user.id, Wanted(vm_name=name, limit=1)):
            self._store.vm(user.id, name)
        return found

    def all_checkpoints(self, user: User, wanted: Wanted = ALL) -> list[Checkpoint]:
        """Return those *wanted* of all checkpoints *user* has, also of VMs that are gone, oldest first."""
        return self._store.checkpoints(user.id, wanted)

    def checkpoint(self, user: User, name: str, checkpoint_id: str) -> Checkpoint:
        """Return the checkpoint that *user* has of the VM *name*.

        Raises:
            NotFound: there is none, or it is of another VM.
        """
        checkpoint = self._store.checkpoint(user.id, checkpoint_id)
        if checkpoint.vm_name != checked_name(name):
            raise NotFound(f"checkpoint {checkpoint_id!r} not found: VM {name!r} has none of that id")
        return checkpoint

    async def change_checkpoint(
        self, user: User, checkpoint: Checkpoint, *, label: str | None, labels: Mapping[str, str | None] = NOTHING
    ) -> Outcome:
        """Say something else of *checkpoint*: *label* is its text from now on, *labels* a patch where None removes.

        Raises:
            NotFound: it has gone.
            Conflict: it is being changed or deleted.
            InvalidRequest: the labels cannot be.
        """
        facts = changing.facts_of_checkpoint(checkpoint, label=label, labels=labels)
        names, work = (changing.held_checkpoint(checkpoint.id),), self._work(user)
        table, of = changing.CHANGE_CHECKPOINT, checkpoint.vm_name
        return await self._run(table, "change", user, names, facts, work, vm_name=of)

    async def delete_checkpoint(self, user: User, checkpoint: Checkpoint) -> Outcome:
        """Delete *checkpoint*. VMs and checkpoints that were made from it live on.

        Raises:
            NotFound: it has gone.
            Conflict: it is being restored, changed or deleted.
        """
        work, facts = self._work(user), discarding.facts_of_discard(checkpoint)
        return await self._run(
            discarding.DELETE_CHECKPOINT,
            "delete",
            user,
            (changing.held_checkpoint(checkpoint.id),),
            facts,
            work,
            after=functools.partial(discarding.remove_files, work, facts),
            vm_name=checkpoint.vm_name,
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
        return await self._run(lifecycle.FORK_VM, "restore", user, (target,), facts, self._work(user, spec=spec))

    async def _restore_in_place(
        self, user: User, name: str, checkpoint: Checkpoint, labels: Mapping[str, str] | None
    ) -> Outcome:
        old = self._store.vm(user.id, name)
        states.require("restore", name, old.state)
        lifecycle.require_own_checkpoint(old, checkpoint)
        work = self._work(user, vm=old)
        facts = lifecycle.facts_of_restore(old, checkpoint.id, None if labels is None else checked_labels(labels))

        async def end_old() -> None:
            try:
                await lifecycle.end_replaced(work, old)
            except (NoidError, OSError):  # the restore has happened; nothing owns the old machine any more
                logger.exception("the old machine of VM %s is not entirely gone; the next start sweeps it", name)

        return await self._run(lifecycle.RESTORE_VM, "restore", user, (name,), facts, work, after=end_old)

    async def settled(self, user: User, name: str) -> None:
        """Return when no operation holds *user*'s VM *name*. The next may be faster than whoever waited."""
        await self._locks.free(user.id, name)

    # --- power -----------------------------------------------------------------------------------------------------

    async def stop_vm(self, user: User, name: str, grace_secs: float) -> Outcome:
        """Let the guest shut down, and end its machine if that takes longer than *grace_secs*; 0 ends it at once.

        A VM that does not run is fine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it is being made or destroyed.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("stop", name, vm.state)
        facts = power.facts_of_power(vm, grace_secs=grace_secs)
        return await self._run(power.STOP_VM, "stop", user, (name,), facts, self._work(user, vm=vm))

    async def start_vm(self, user: User, name: str) -> Outcome:
        """Boot a stopped or dead VM on its disk. Returns when its guest has booted; a VM that runs is fine.

        Raises:
            NotFound: there is no such VM, or its image is gone.
            Conflict: it is being made or destroyed.
            DependencyDown, DeadlineExceeded: it does not boot; it is stopped, its disk as the boot has left it.
        """
        vm = self.vm(user, name)
        states.require("start", name, vm.state)
        if vm.state is VmState.RUNNING and vm.busy is None:
            return Outcome(kind=power.START_VM.kind, vm=vm)
        return await self._run(
            power.START_VM, "start", user, (name,), power.facts_of_power(vm), self._work(user, vm=vm)
        )

    async def reboot_vm(self, user: User, name: str, grace_secs: float) -> Outcome:
        """Let the guest shut down as in `stop_vm`, then boot it as in `start_vm`.

        Raises:
            NotFound: there is no such VM, or its image is gone; then it was not stopped.
            Conflict: it does not run.
            DependencyDown, DeadlineExceeded: it does not boot; it is stopped.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("reboot", name, vm.state)
        return await self._reboot(user, vm, grace_secs)

    async def pause_vm(self, user: User, name: str) -> Outcome:
        """Stop the VM's CPUs. Memory, disk, connections and its place on the host stay; a paused VM is fine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
        """
        vm = self.vm(user, name)
        states.require("pause", name, vm.state)
        if vm.state is VmState.PAUSED and vm.busy is None:
            return Outcome(kind=pausing.PAUSE_VM.kind, vm=vm)
        return await self._run(
            pausing.PAUSE_VM, "pause", user, (name,), pausing.facts_of_pause(vm), self._work(user, vm=vm)
        )

    async def resume_vm(self, user: User, name: str) -> Outcome:
        """Let the CPUs of a paused VM go on where they stood. A VM that runs is fine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it is neither paused nor running.
        """
        vm = self.vm(user, name)
        states.require("resume", name, vm.state)
        if vm.state is VmState.RUNNING and vm.busy is None:
            return Outcome(kind=pausing.RESUME_VM.kind, vm=vm)
        return await self._run(
            pausing.RESUME_VM, "resume", user, (name,), pausing.facts_of_pause(vm), self._work(user, vm=vm)
        )

    async def boot_again(self, vm: Vm) -> None:
        """Start a VM again whose guest has reset its machine."""
        await self._reboot(self._store.user(vm.owner), vm, 0.0)

    async def finish_reboot(self, vm: Vm) -> None:
        """Start a VM again that was being rebooted when the last agent ended. What fails is logged."""
        try:
            await self.start_vm(self._store.user(vm.owner), vm.name)
        except NoidError as error:
            logger.warning("VM %s was being rebooted and does not come back: %s", vm.name, error)
        except Exception:  # a bug here must not end the agent
            logger.exception("VM %s was being rebooted and does not come back", vm.name)

    async def _reboot(self, user: User, vm: Vm, grace_secs: float) -> Outcome:
        await trio.to_thread.run_sync(self.services.images.get, vm.image)  # before anything is stopped for nothing
        fresh = self._store.vm(user.id, vm.name)
        if fresh.instance != vm.instance:
            raise Conflict(f"VM {vm.name!r} was restored or made anew at the same time. Look at it again and repeat.")
        states.require("reboot", vm.name, fresh.state)
        facts = power.facts_of_power(vm, grace_secs=grace_secs, again=True)
        return await self._run(power.REBOOT_VM, "reboot", user, (vm.name,), facts, self._work(user, vm=vm))

    @contextlib.asynccontextmanager
    async def guest(self, user: User, name: str) -> AsyncIterator[Guest]:
        """Yield the VM's guest agent, over the one connection everybody shares.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            DependencyDown, DeadlineExceeded: its guest does not answer.
        """
        async with self._guest(name, self._link(await self._settled(user, name))) as guest:
            yield guest

    def _link(self, vm: Vm) -> GuestLink:
        states.require("exec", vm.name, vm.state)
        holder = self._locks.holder(vm.owner, vm.name)
        if holder is not None and self.services.supervisor.find(vm.id) is None:
            raise Busy(vm.name, holder)
        return self.services.supervisor.get(vm).link

    @contextlib.asynccontextmanager
    async def _guest(self, name: str, link: GuestLink) -> AsyncIterator[Guest]:
        await self._refuse_if_hung(name, link)
        connecting = link.guest()
        try:
            with trio.fail_after(CONNECT_SECS):
                guest = await connecting.__aenter__()
        except trio.TooSlowError as error:
            raise DeadlineExceeded(
                f"the guest of VM {name!r} does not answer (waited {CONNECT_SECS:g} s). It may be busy or hung: try "
                f"again, look at its serial.log, reboot it with `noid reboot {name}`, or restore it from a checkpoint."
            ) from error
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(connecting.__aexit__)
            yield guest

    async def sessions(self, user: User, name: str) -> VmSessions:
        """Return the processes of the VM, also of one that has ended.

        Raises:
            NotFound: there is no such VM.
        """
        return await self._sessions.of(await self._settled(user, name))

    async def start_process(self, user: User, name: str, request: ExecRequest, *, detached: bool) -> Session:
        """Start a process in the VM, as the image's default user unless the request names one.

        One that is not *detached* is the caller's to finish: see `VmSessions.finish`.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            InvalidRequest, Unsupported: the guest cannot start that.
            QuotaExceeded: as many run as may.
            DependencyDown, DeadlineExceeded: its guest does not answer.
        """
        vm = await self._settled(user, name)
        link = self._link(vm)
        sessions = await self._sessions.of(vm)  # before anything that takes time: the same machine's as the link
        if request.user is None:
            request = dataclasses.replace(request, user=self._default_user(vm))
        async with self._guest(name, link) as guest:
            self.services.quotas.check_process(user, self._running_processes(user))
            return await sessions.start(guest, request, detached=detached)

    async def quota(self, user: User) -> tuple[dict[str, int | None], dict[str, int]]:
        """Return the most *user* may have of each resource (None: no limit), and what they use."""
        quotas = self.services.quotas
        used = await quotas.use(user)
        return quotas.limits(user), {**used, "exec_sessions": self._running_processes(user)}

    def _running_processes(self, user: User) -> int:
        return self._sessions.running(vm.id for vm in self._store.vms(user.id))

    async def _refuse_if_hung(self, name: str, link: GuestLink) -> None:
        """Let pass unless the guest is known not to answer and has not come back since.

        Raises:
            DeadlineExceeded: says since when it does not answer.
        """
        since = link.health.unresponsive_since
        if since is None or await link.health.ask(link, RECOVERED_SECS):
            return
        raise DeadlineExceeded(
            f"the guest of VM {name!r} has not answered since {wire_time(since)} UTC. It may be hung or starved: look "
            f"at its serial.log, reboot it with `noid reboot {name}`, or restore it from a checkpoint."
        )

    def console(self, user: User, name: str) -> Console:
        """Return the serial console of the VM's machine, for as long as that runs.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("console", name, vm.state)
        return self.services.supervisor.get(vm).link.console

    def default_user(self, user: User, name: str) -> str:
        """Return who commands run as in that VM when nobody is named: the image's user, or root."""
        return self._default_user(self._store.vm(user.id, name))

    def _default_user(self, vm: Vm) -> str:
        try:
            return self.services.images.user(vm.image)
        except NotFound:
            return "root"

    @property
    def waiting_machines(self) -> int:
        """How many woken machines wait for the next create."""
        return len(self._pool)

    # --- users -----------------------------------------------------------------------------------------------------

    def local_user(self) -> User:
        """Return the user whom the local socket's peer is: the one this agent runs as."""
        return self._local_user

    # --- inside ----------------------------------------------------------------------------------------------------

    def _work(self, user: User, *, vm: Vm | None = None, spec: VmSpec | None = None) -> Work:
        return Work(services=self.services, templates=self._templates, user=user, vm=vm, spec=spec)

    async def _settled(self, user: User, name: str) -> Vm:
        """Return the VM. A commit is seen an instant before its machine is held; this waits for that."""
        vm = self._store.vm(user.id, checked_name(name))
        with trio.move_on_after(HANDOVER_SECS):
            while self._is_handed_over(vm):
                await self.services.supervisor.next_hold()
                vm = self._store.vm(user.id, name)
        return vm

    def _is_handed_over(self, vm: Vm) -> bool:
        live = self.services.supervisor.find(vm.id)
        held = live is not None and live.instance == vm.instance
        return not held and self._locks.holder(vm.owner, vm.name) is not None

    def _with_busy(self, vm: Vm) -> Vm:
        live = self.services.supervisor.find(vm.id)
        link = live.link if live is not None and live.instance == vm.instance else None
        return seen_by(vm, link, self._locks.holder(vm.owner, vm.name))

    async def _run(
        self,
        table: Saga[Work],
        what: str,
        user: User,
        vm_names: tuple[str, ...],
        facts: Facts,
        work: Work,
        *,
        after: Callable[[], Awaitable[None]] | None = None,
        vm_name: str | None = None,
    ) -> Outcome:
        """Carry out a saga as an operation: see `Performer.run`."""
        return await self.operations.run(table, what, user, vm_names, facts, work, after=after, vm_name=vm_name)


def host_mem_mib() -> int:
    """Return the host's memory in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)
