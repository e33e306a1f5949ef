"""What VMs' processes are kept in: found out by trying, the same for every VMM.

*Full*, as root: each process is a user of its own, in a root directory in memory that has only what the VMM needs, with
a network namespace without anything unless the VM has a network, with limits by cgroup and by rlimit, and unable to
gain privileges. Nothing of a room is on any disk, so it ends with its process; its cgroup and its user id are given
back by `Enclosure.release`, and what a killed agent leaves is found by name.

*Limits*: cgroup and rlimits alone, which needs a cgroup that is delegated to the agent, or root. Without, rlimits and
the ban on new privileges are left; they need nobody's leave.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from noid.core.model.sandbox import SandboxMode, SandboxSettings
from noid.errors import ConfigError
from noid.hostfs import os_errors
from noid.vmmhost.cgroups import Cgroups, NoCgroups
from noid.vmmhost.enclosure import Enclosure, Room
from noid.vmmhost.identities import Identities, user_of, users_within
from noid.vmmhost.launcher import LAUNCHER
from noid.vmmhost.limits import Shape, limits_of

log = logging.getLogger(__name__)

_TRIAL_SECS = 10.0
_RELEASE_SECS = 5.0
_SWEEP_SECS = (0.1, 60.0)
_TRIAL_ROOM = Room(read=(LAUNCHER,), devices=("null",))


class Sandbox:
    """What is in force for the VMs of one agent. Made by `opened`.

    *lacks* says what is not, and why; empty where all is.
    """

    def __init__(
        self,
        settings: SandboxSettings,
        *,
        identities: Identities | None = None,
        cgroups: Cgroups | None = None,
        lacks: tuple[str, ...] = (),
    ) -> None:
        self.lacks = lacks
        self._settings = settings
        self._identities = identities
        self._cgroups = cgroups

    @property
    def mode(self) -> SandboxMode:
        """What is in force: anything but ``auto``."""
        if self._settings.mode is SandboxMode.OFF:
            return SandboxMode.OFF
        return SandboxMode.FULL if self._identities else SandboxMode.LIMITS

    def describe(self) -> str:
        """Return in one line what is in force."""
        if self.mode is SandboxMode.OFF:
            return "off: VMs' processes are the agent's user, without limits"
        parts = []
        if self._identities:
            parts += ["a user, a root directory and a network namespace for each VM"]
        if self._cgroups:
            parts += [f"cgroups (version {self._cgroups.version})"]
        return f"{self.mode}: " + ", ".join([*parts, "rlimits, no new privileges"])

    @contextlib.asynccontextmanager
    async def enclosed(
        self, instance: str, directory: Path, shape: Shape, *, own: Sequence[Path], shared: Sequence[Path]
    ) -> AsyncIterator[Enclosure]:
        """Yield what the new process of the VM *instance* is to be started in, for the block to start it.

        The process may write to *own* and read *shared*. If the block fails, no process is to be left, and the
        enclosure is given back; otherwise that is up to whoever holds it.

        Raises:
            BackendError: it cannot be made.
        """
        enclosure = await trio.to_thread.run_sync(self.enclose, instance, directory, shape)
        try:
            with os_errors("giving a VM's process its files"):
                enclosure.prepare(own=own, shared=shared)
            yield enclosure
        except BaseException:
            with trio.move_on_after(_RELEASE_SECS, shield=True):
                await enclosure.release()
            raise

    def enclose(self, instance: str, directory: Path, shape: Shape) -> Enclosure:
        """Return what the process of the VM *instance* is to be started in. Blocks for a millisecond.

        Raises:
            BackendError: it cannot be made.
        """
        if self.mode is SandboxMode.OFF:
            return Enclosure(directory=directory)
        limits = limits_of(shape, self._settings.overhead_mib)
        with os_errors("making the cgroup of a VM"):
            cgroup = self._cgroups.create(instance, limits) if self._cgroups else None
        return Enclosure(
            directory=directory,
            limits=limits,
            cgroup=cgroup,
            user=(self._identities.take(), self._identities.group) if self._identities else None,
            identities=self._identities,
            readable=self._settings.readable,
        )

    def adopt(self, instance: str, directory: Path, pid: int) -> Enclosure:
        """Return what the process *pid* of an earlier agent is in, whatever that agent's settings were."""
        user = user_of(pid)
        if user is not None and user[0] == os.geteuid():
            user = None
        if user is not None and self._identities is not None:
            self._identities.adopt(user[0])
        return Enclosure(
            directory=directory,
            cgroup=self._cgroups.of(instance) if self._cgroups else None,
            user=user,
            identities=self._identities,
        )


@contextlib.asynccontextmanager
async def opened(settings: SandboxSettings, data_dir: Path, run_dir: Path) -> AsyncIterator[Sandbox]:
    """Find out what can be in force here, say so in the log, and offer it. Closing it disturbs no VM.

    There is one at a time for a *run_dir*: what is below the cgroup named after that is its own, to be swept. Files of
    VMs are in *data_dir*.

    Raises:
        ConfigError: more is demanded than works here; says what is missing.
    """
    sandbox, cgroups = await _found(settings, data_dir, run_dir)
    try:
        (log.warning if sandbox.lacks else log.info)("sandbox %s", "; ".join([sandbox.describe(), *sandbox.lacks]))
        with _swept(cgroups) if cgroups is not None else contextlib.nullcontext():
            yield sandbox
    finally:
        if cgroups is not None:
            with os_errors("removing the cgroup of the agent's VMs"):
                cgroups.close()


@contextlib.contextmanager
def _swept(cgroups: Cgroups) -> Iterator[None]:
    """Meanwhile remove what an earlier agent has left, as its processes end: soon after the start nobody's are ended.

    A thread and no task: a nursery here would wrap whatever fails in the agent.
    """
    over = threading.Event()

    def sweep() -> None:
        delay_secs, most_secs = _SWEEP_SECS
        while cgroups.sweep() and not over.wait(delay_secs):
            delay_secs = min(2 * delay_secs, most_secs)

    thread = threading.Thread(target=sweep, name="cgroups of earlier agents", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def _found(settings: SandboxSettings, data_dir: Path, run_dir: Path) -> tuple[Sandbox, Cgroups | None]:
    mode = settings.mode
    if mode is SandboxMode.OFF:
        return Sandbox(settings), None
    if not LAUNCHER.is_file():
        missing = f"this installation of noid has no {LAUNCHER.name}, which VMs are started by"
        if mode is not SandboxMode.AUTO:
            raise ConfigError(f'[sandbox] mode is "{mode}", but {missing}. Install noid again.')
        return Sandbox(replace(settings, mode=SandboxMode.OFF), lacks=(missing,)), None
    lacks = []
    identities: Identities | None = None
    if mode in (SandboxMode.AUTO, SandboxMode.FULL):
        refusal = await _room_refusal(settings, data_dir)
        if refusal and mode is SandboxMode.FULL:
            raise ConfigError(
                f'[sandbox] mode is "full", but VMs cannot have users and root directories of their own here: '
                f'{refusal}. Run noid-server as root, or use "auto" to take what works.'
            )
        if refusal:
            lacks.append(f"no user and no root directory of their own: {refusal}")
        else:
            taken = await trio.to_thread.run_sync(users_within, settings.uids)
            identities = Identities(settings.uids, taken)
    cgroups: Cgroups | None = None
    try:
        cgroups = await trio.to_thread.run_sync(Cgroups.open, run_dir, settings.cgroup)
    except NoCgroups as error:
        if mode is not SandboxMode.AUTO:
            raise ConfigError(
                f'[sandbox] mode is "{mode}", but VMs cannot have cgroups here: {error}. Name a cgroup that this user '
                'may write to as `cgroup`, or use "auto" to take what works.'
            ) from error
        lacks.append(f"no limits of memory, CPU and threads: {error}")
    return Sandbox(settings, identities=identities, cgroups=cgroups, lacks=tuple(lacks)), cgroups


async def _room_refusal(settings: SandboxSettings, data_dir: Path) -> str:
    """Return why processes cannot have a room and a user of their own here; empty if they can."""
    if os.geteuid() != 0:
        return "the agent is not root"
    group = settings.uids.start
    try:
        await trio.to_thread.run_sync(_try_to_give, data_dir, group + 1, group)
        enclosure = Enclosure(directory=data_dir, user=(group + 1, group))
        argv = enclosure.command([str(LAUNCHER), "--nothing"], _TRIAL_ROOM)
    except OSError as error:
        return str(error)
    with trio.move_on_after(_TRIAL_SECS):
        try:
            done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
        except OSError as error:
            return str(error)
        return "" if done.returncode == 0 else done.stdout.decode(errors="replace").strip() or f"{done.returncode}"
    return f"a trial was not over within {_TRIAL_SECS:g} s"


def _try_to_give(data_dir: Path, uid: int, gid: int) -> None:
    """Give a file in *data_dir* away, if it is there: on a network's file system root may not."""
    if data_dir.is_dir():
        with tempfile.NamedTemporaryFile(prefix=".sandbox-", dir=data_dir) as file:
            os.fchown(file.fileno(), uid, gid)
