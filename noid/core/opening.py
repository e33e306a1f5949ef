"""The composition root: opens everything in order, recovers, and hands out the agent.

``async with open_agent(config, plugins) as agent`` owns every lifetime: leaving drains operations, closes backends and
lets go of the machines, which keep running and are adopted by the next agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import trio

from noid import hostfs
from noid.core import paths, recovery
from noid.core.agent import Agent
from noid.core.backends import AgentContext, StorageBackend, VmmBackend
from noid.core.checkpoints.templates import Templates
from noid.core.config.image import take_up as take_up_configured_image
from noid.core.config.settings import Config
from noid.core.database import deeds
from noid.core.database.store import open_store
from noid.core.events import Events
from noid.core.guests.sessions import Sessions
from noid.core.images import Images
from noid.core.layout import Layout
from noid.core.operations.running import Operations
from noid.core.people.audit import AuditLog
from noid.core.people.quotas import Quotas
from noid.core.people.users import Users, ensure_local_user
from noid.core.plugins import Plugins
from noid.core.services import Services
from noid.core.vms.endings import Endings
from noid.core.vms.pool import Pool
from noid.core.vms.supervisor import Supervisor
from noid.core.waiting import plain_nursery
from noid.errors import ConfigError, Conflict

logger = logging.getLogger(__name__)

DRAIN_SECS = 20.0
LOCK_SECS = 1.0


@contextlib.asynccontextmanager
async def open_agent(config: Config, plugins: Plugins) -> AsyncIterator[Agent]:
    """Open the agent of ``config.data_dir``: store, backends, recovery. There is one at a time.

    Raises:
        Conflict: another agent runs on that directory.
        ConfigError: a backend cannot be opened.
        Damaged: the database cannot be used.
    """
    layout = Layout(config.data_dir)
    with hostfs.os_errors("making the data directory"):
        try:
            config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            paths.private_directory(config.run_dir)
            for private in layout.private:
                private.mkdir(exist_ok=True, mode=0o700)
                private.chmod(0o700)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise ConfigError(
                f"cannot use {config.data_dir} as data directory: {error.filename}: {error.strerror}. Give one that "
                "this user can write to: data_dir in server.toml, --data-dir or NOID_DATA_DIR."
            ) from error
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(_only_agent(config.data_dir))
        store = stack.enter_context(open_store(config.database))
        context = AgentContext(
            data_dir=config.data_dir,
            run_dir=config.run_dir,
            database=config.database,
            sandbox=config.sandbox.settings(),
        )

        await trio.to_thread.run_sync(plugins.check_sections, config)
        vmm_spec, vmm_config = await trio.to_thread.run_sync(plugins.vmm, config)
        vmm = await stack.enter_async_context(vmm_spec.open(vmm_config, context))
        storage_spec, storage_config = await trio.to_thread.run_sync(plugins.storage, config, vmm.features)
        storage = await stack.enter_async_context(storage_spec.open(storage_config, context))
        _check_disks(vmm, storage)
        network_spec, network_config = plugins.network(config)
        network = await stack.enter_async_context(network_spec.open(network_config, context))
        execs = [
            await stack.enter_async_context(exec_spec.open(exec_config, context))
            for exec_spec, exec_config in plugins.execs(config)
        ]
        auth_spec, auth_config = plugins.auth(config)
        auth = await stack.enter_async_context(auth_spec.open(auth_config, context))
        logger.info("backends: vmm %s (%s), storage %s", vmm.name, vmm.features.accelerator, storage.name)

        images = Images(layout.images, plugins.initrd_files(os.uname().machine))
        await trio.to_thread.run_sync(take_up_configured_image, config, images)
        deeds.take_up_users(store, layout)  # blocks, and nothing else runs yet
        await ensure_local_user(store)
        nursery = await stack.enter_async_context(plain_nursery())

        users = Users(store, auth)
        audit = AuditLog(store)
        operations = Operations(nursery)
        events = Events(plugins)
        endings = Endings(store, operations, events, nursery)
        sessions = Sessions(nursery, layout, config.exec_reattach_secs)
        supervisor = Supervisor(nursery, execs, endings.note, sessions)
        services = Services(
            config=config,
            layout=layout,
            plugins=plugins,
            store=store,
            images=images,
            vmm=vmm,
            storage=storage,
            network=network,
            supervisor=supervisor,
            events=events,
            quotas=Quotas(store, layout, config.quota, config.limits),
        )
        templates = Templates(services)
        pool = Pool(services, templates, operations)
        try:
            interrupted = await recovery.recover(services, templates)
            await templates.collect()
            nursery.start_soon(pool.keep)
            agent = Agent(services, users, audit, operations, templates, pool, sessions)
            endings.serve(agent.power.boot_again)
            nursery.start_soon(users.keep_saving_uses)
            nursery.start_soon(audit.keep_flushing)
            nursery.start_soon(agent.keys.keep_forgetting)
            nursery.start_soon(agent.operations.keep_forgetting)
            for vm in interrupted:
                nursery.start_soon(agent.power.finish_reboot, vm)
            yield agent
        finally:
            with trio.move_on_after(DRAIN_SECS, shield=True):
                await operations.drain()
                await sessions.save()
                await users.save_uses()
                await audit.close()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _only_agent(data_dir: Path) -> AsyncIterator[None]:
    """Hold the lock that says an agent runs on *data_dir*; the kernel frees it with the process.

    Not quite: an agent killed while it started a VMM leaves a child that has the lock until it executes the VMM. So
    the lock is asked for again and again for `LOCK_SECS`.
    """
    with _lock_file(data_dir / "agent.lock") as lock:
        deadline = trio.current_time() + LOCK_SECS
        while not _locked(lock):
            if trio.current_time() > deadline:
                raise Conflict(
                    f"another noid agent already runs on {data_dir}. Use that one, or give this one its own --data-dir."
                )
            await trio.sleep(0.02)
        lock.seek(0)
        lock.write(f"{os.getpid()}\n")  # over what is there: on a full disk there may be no other block for it
        lock.flush()
        lock.truncate()
        yield


def _lock_file(path: Path) -> IO[str]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_disks(vmm: VmmBackend, storage: StorageBackend) -> None:
    """Let the agent start only with a VMM that can use what the storage makes.

    Raises:
        ConfigError: it cannot; every create would fail.
    """
    features, takes = storage.features, ", ".join(sorted(vmm.features.disk_formats))
    lacks = None
    if features.format not in vmm.features.disk_formats:
        lacks = f"makes {features.format} disks, and VMM {vmm.name!r} takes {takes}"
    elif features.needs_pivot and not vmm.features.disk_pivot:
        lacks = f"moves live disks onto new layers, which VMM {vmm.name!r} cannot do"
    if lacks is not None:
        raise ConfigError(
            f'storage {storage.name!r} {lacks}. Set [backends] storage = "auto" in server.toml, or name another one.'
        )
