"""What a starting agent does about the past, before it listens: adopt, unwind, resume, sweep.

The order matters. VMs the database has never heard of are taken up (see `database.deeds`). Machines of committed VMs
are adopted, because unwinding a checkpoint needs its VM's machine; then every operation without an outcome is undone (a
destroy is carried on instead); then rows, processes and directories are compared, and what no row owns goes away.
Checkpoints on disk without a row get their row back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import trio

from noid import hostfs
from noid.core.backends import Machine, MachinePlan
from noid.core.checkpoints import checkpointing, discarding
from noid.core.checkpoints import manifest as manifests
from noid.core.checkpoints.templates import Templates
from noid.core.database import deeds
from noid.core.database.store import Tx
from noid.core.model.storage import Checkpoint
from noid.core.model.times import now
from noid.core.model.users import User
from noid.core.model.vms import Vm, VmState
from noid.core.operations import saga
from noid.core.operations.performing import REMEMBERED, Performance
from noid.core.operations.saga import Journal, Saga
from noid.core.operations.work import Work
from noid.core.services import Services
from noid.core.vms import changing, lifecycle, pausing, power, processes
from noid.errors import Damaged, DependencyDown, NoidError, NotFound

logger = logging.getLogger(__name__)

#: A VMM says by itself when it does not answer; one that is in the middle of a capture answers after that.
ADOPT_SECS = 150.0
ADOPTED_AT_ONCE = 8

SAGAS: dict[str, Saga[Work]] = {
    table.kind: table
    for table in (
        lifecycle.CREATE_VM,
        lifecycle.FORK_VM,
        lifecycle.RESTORE_VM,
        lifecycle.DESTROY_VM,
        checkpointing.CHECKPOINT_VM,
        power.STOP_VM,
        power.START_VM,
        power.REBOOT_VM,
        pausing.PAUSE_VM,
        pausing.RESUME_VM,
        changing.CHANGE_VM,
        changing.CHANGE_CHECKPOINT,
        discarding.DELETE_CHECKPOINT,
    )
}


async def recover(services: Services, templates: Templates) -> list[Vm]:
    """Bring rows, processes and files into agreement. One VM that cannot be mended is logged and stops nothing.

    Returns the VMs that a reboot has stopped and not yet started: they are to be started.
    """
    with hostfs.os_errors("looking at the VMs' directories"):
        spared = deeds.take_up_vms(services.store, services.layout)  # blocks, and nothing else runs yet
    at_once = trio.CapacityLimiter(ADOPTED_AT_ONCE)
    async with trio.open_nursery() as nursery:
        for vm in services.store.all_vms():
            if vm.state in (VmState.RUNNING, VmState.PAUSED):
                nursery.start_soon(_adopt, services, vm, at_once)
    rebooting = []
    for operation in services.store.open_operations():
        undoing = any(event != "planned" for _, event in operation["events"])
        if operation["kind"] == power.REBOOT_VM.kind and not undoing:
            rebooting.append((operation["owner"], operation["vm_name"]))
        try:
            await _unwind(services, templates, operation)
        except Exception:  # whatever it is, an agent that does not start helps nobody
            logger.exception("%s of %r cannot be unwound yet", operation["kind"], operation["vm_name"])
    for vm in services.store.all_vms():
        if vm.state is VmState.CREATING:  # its operation could not be unwound, or its journal was lost
            await services.store.write(partial(Tx.delete_vm, vm_id=vm.id))
        elif vm.state is VmState.DESTROYING:
            try:
                await _carry_on_destroying(services, templates, vm)
            except (NoidError, OSError):
                logger.exception("VM %s cannot be destroyed yet", vm.name, extra={"vm": vm.name, "owner": vm.owner})
    with hostfs.os_errors("looking at the checkpoints"):
        await _restore_checkpoint_rows(services)
    await _sweep(services, spared)
    for user in services.store.users():
        await trio.to_thread.run_sync(deeds.write_user, services.layout, user)
    await services.store.write(partial(Tx.forget_operations, ended_before=now() - REMEMBERED))
    stopped = (vm for vm in services.store.all_vms() if vm.state is VmState.STOPPED)
    return [vm for vm in stopped if (vm.owner, vm.name) in rebooting]


async def _adopt(services: Services, vm: Vm, at_once: trio.CapacityLimiter) -> None:
    """Take hold of a machine an earlier agent started. Without one a VM is dead; one we cannot drive is left."""
    async with at_once:
        obstacle = await trio.to_thread.run_sync(_obstacle, services, vm)
        if obstacle is not None:
            logger.error("VM %s runs on, but this agent cannot drive it: %s", vm.name, obstacle)
            return
        await _take_hold(services, vm)


def _obstacle(services: Services, vm: Vm) -> str | None:
    """Return why a living machine is beyond this agent's backends: the settings changed. Killing it would lose it."""
    directory = services.layout.vm(vm.instance)
    if vm.process is None or processes.reference(vm.process.pid) != vm.process:
        return None
    try:
        services.storage.volume(directory)
        theirs = manifests.read(directory).fingerprint.get("vmm")
    except NoidError as error:
        return str(error)
    ours = services.vmm.fingerprint().get("vmm")
    if theirs == ours:
        return None
    return f'its VMM is {theirs} and this agent has {ours}. Set [backends] vmm = "{theirs}" and restart the agent.'


async def _take_hold(services: Services, vm: Vm) -> None:
    layout, directory = services.layout, services.layout.vm(vm.instance)
    machine: Machine | None = None
    try:
        if vm.process is None:
            raise NotFound(f"VM {vm.name!r} has no process")
        plan = MachinePlan(
            instance=vm.instance,
            directory=directory,
            run_dir=layout.run(vm.instance),
            data_dir=services.config.data_dir,
            cpus=vm.cpus,
            mem_mib=vm.mem_mib,
            volume=services.storage.volume(directory),
            lease=vm.lease,
        )
        with trio.fail_after(ADOPT_SECS):
            machine = await services.vmm.adopt(vm.process, plan, directory / "memory")
            if vm.state is VmState.RUNNING:
                await machine.resume()  # the last agent may have died inside a pause
            else:
                await machine.pause()  # or while it let go of one
    except (NoidError, trio.TooSlowError) as error:
        why = str(error) or f"it does not become {vm.state} within {ADOPT_SECS:g} s"
        logger.warning("VM %s (%s) is dead: %s", vm.name, vm.instance, why, extra={"vm": vm.name, "owner": vm.owner})
        if machine is not None:
            await machine.aclose()
        with hostfs.os_errors(f"ending the machine of VM {vm.name!r}"):
            await trio.to_thread.run_sync(processes.end_instance, services.config.data_dir, vm.instance)
        await services.store.write(lambda tx: tx.update_vm(vm, state=VmState.DEAD, process=None, ended=why))
        return
    link = services.supervisor.link(machine, directory, await trio.to_thread.run_sync(_reached_by, directory))
    if vm.state is VmState.PAUSED:
        link.health.suspend()
    services.supervisor.hold(vm.id, vm.instance, machine, link)
    logger.info("adopted VM %s (%s)", vm.name, vm.instance, extra={"vm": vm.name, "owner": vm.owner})


def _reached_by(directory: Path) -> str:
    """Return which exec backend reached the guest of the VM in *directory* before, or an empty string."""
    try:
        return manifests.read(directory).exec
    except (NotFound, Damaged) as error:
        logger.warning("it is not known how the guest in %s is reached: %s", directory, error)
        return ""


async def _unwind(services: Services, templates: Templates, operation: dict[str, Any]) -> None:
    """Undo an operation the last agent did not end, or carry it on if it is one that goes forward only."""
    kind, facts = operation["kind"], json.loads(operation["facts"])
    table = SAGAS.get(kind)
    if table is None:
        raise Damaged(f"the journal has an operation {kind!r} that this noid does not know. Upgrade noid.")
    work = _work(services, templates, operation["owner"])
    try:
        work.vm = services.store.vm(operation["owner"], operation["vm_name"])
        live = services.supervisor.find(work.vm.id)
        work.machine = live.machine if live and kind == checkpointing.CHECKPOINT_VM.kind else None
    except NotFound:
        pass  # a create that died before its row
    page = Journal(services.store, operation["id"], facts)
    if table.forward and work.vm is not None and work.vm.id == facts["vm_id"]:
        logger.info("carrying on %s of %s", kind, operation["vm_name"])
        performance = Performance(
            operation=operation["id"],
            table=table,
            owner=operation["owner"],
            vm_name=operation["vm_name"],
            facts=facts,
            work=work,
        )
        await saga.run(
            table,
            work,
            services.store,
            owner=operation["owner"],
            vm_name=operation["vm_name"],
            facts=facts,
            progress=performance,
            page=page,
        )
        return
    planned = {step for step, event in operation["events"] if event == "planned"}
    steps = [step for step in table.steps if step.name in planned]
    logger.info("unwinding %s of %s", kind, operation["vm_name"])
    await saga.unwind(table, work, facts, page, steps, None)


async def _carry_on_destroying(services: Services, templates: Templates, vm: Vm) -> None:
    work = _work(services, templates, vm.owner)
    work.vm = vm
    facts = lifecycle.facts_of_destroy(vm)
    await saga.run(lifecycle.DESTROY_VM, work, services.store, owner=vm.owner, vm_name=vm.name, facts=facts)


def _work(services: Services, templates: Templates, owner: str) -> Work:
    user: User = services.store.user(owner)
    return Work(services=services, templates=templates, user=user)


async def _restore_checkpoint_rows(services: Services) -> None:
    """Give checkpoints their rows back that a power cut or a lost database took: the manifest is the truth."""
    known = {(c.owner, c.id) for user in services.store.users() for c in services.store.checkpoints(user.id)}
    owners = {user.id for user in services.store.users()}

    def found() -> list[Checkpoint]:
        checkpoints = []
        for owner, directory in _owned(services.layout.users, "checkpoints"):
            if (owner, directory.name) in known or owner not in owners or directory.name.endswith(".partial"):
                continue
            try:
                manifest = manifests.read(directory)
            except (NotFound, Damaged) as error:
                logger.warning("not a checkpoint: %s: %s", directory.name, error)
                continue
            if manifest.id != directory.name:
                logger.warning("not a checkpoint: %s holds a copy of %s", directory, manifest.id)
                continue
            names = ("id", "vm_id", "vm_name", "label", "cpus", "mem_mib", "image", "parent", "created_at", "labels")
            checkpoints.append(Checkpoint(owner=owner, **{name: getattr(manifest, name) for name in names}))
        return checkpoints

    for checkpoint in await trio.to_thread.run_sync(found):
        logger.warning("checkpoint %s of %s has its row again", checkpoint.id, checkpoint.vm_name)
        await services.store.write(partial(Tx.insert_checkpoint, checkpoint=checkpoint))


async def _sweep(services: Services, spared: set[str]) -> None:
    """End processes and remove directories that belong to no row and are not *spared*."""
    data_dir, layout = services.config.data_dir, services.layout
    instances = spared | {vm.instance for vm in services.store.all_vms()}

    def sweep() -> list[str]:
        swept = []
        for process in list(processes.find(data_dir)):
            if process.instance not in instances:
                processes.end_instance(data_dir, process.instance)
                swept.append(f"process {process.pid} of machine {process.instance}")
        stray = [d for d in _entries(layout.vms) if d.name not in instances]
        stray += [d for _, d in _owned(layout.users, "checkpoints") if d.name.endswith(".partial")]
        stray += [d for d in _entries(layout.golden) if d.name.endswith(".partial")]
        stray += _entries(layout.scratch)
        stray += [d for d in _entries(layout.run("x").parent) if d.is_dir() and d.name not in instances]
        for directory in stray:
            hostfs.remove_tree(directory)
            swept.append(directory.name)
        return swept

    try:
        for what in await trio.to_thread.run_sync(sweep):
            logger.info("swept %s", what)
    except (OSError, TimeoutError) as error:
        raise DependencyDown(f"cannot clean up after the last agent: {error}. Do it by hand, then start.") from error


def _owned(users: Path, what: str) -> Iterator[tuple[str, Path]]:
    """Yield (owner, directory) for every directory of kind *what* that anybody has."""
    for user in _entries(users):
        for directory in _entries(user / what):
            yield user.name, directory


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
