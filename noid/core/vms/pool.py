"""Machines that were made before anybody asked: a create or restore that finds one has little left to do.

A restored guest is slow at first: under emulation every path through its kernel is translated when it first runs, and
with KVM every page is faulted in. So after a create, in a quiet moment, another machine of the same shape is restored
from the template, woken under a name of its own and made to run a command; then it waits.

After a restore, likewise, a copy of that checkpoint is loaded. It stands still, at the instant of the checkpoint: what
ran there shall go on for somebody, and not before. Letting it go on is all that is left of loading it.

Such a machine belongs to no row. Its directories and its process are what a start sweeps, so a crash leaves nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from noid.core.checkpoints.templates import GUEST_NAME, Templates
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.storage import Checkpoint
from noid.core.model.vms import VmSpec
from noid.core.operations.running import Operations
from noid.core.operations.saga import Step
from noid.core.operations.work import Warm, Work, given
from noid.core.services import Services
from noid.core.vms import lifecycle, machines
from noid.errors import DeadlineExceeded, NoidError

logger = logging.getLogger(__name__)

QUIET_SECS = 1.0
WARM_SECS = 60.0
PING_SECS = 2.0
CLOSE_SECS = 20.0
SPARE_MEMORY_SHARE = 0.25
SPARE_DISK_SHARE = 0.1
#: Run in turn, so that starting and reaping a process is warm too. A guest without them is as warm as it gets.
REHEARSAL = (("true",), ("true",))


class Pool:
    """Keeps ``[pool] size`` machines of the shape that was created last, and copies of the checkpoint restored last.

    Run `keep` for as long as the agent lives.
    """

    def __init__(self, services: Services, templates: Templates, operations: Operations) -> None:
        self._services = services
        self._templates = templates
        self._operations = operations
        self._woken: list[Warm] = []
        self._copies: list[Warm] = []
        self._shape: VmSpec | None = None
        self._checkpoint: Checkpoint | None = None
        self._changed = trio.Event()

    @property
    def woken(self) -> int:
        """How many machines wait for the next create."""
        return len(self._woken)

    @property
    def copies(self) -> int:
        """How many copies of a checkpoint stand ready for the next restore of it."""
        return len(self._copies)

    # --- machines of a shape ------------------------------------------------------------------------------------------

    def want(self, spec: VmSpec) -> None:
        """Prefer this shape from now on, and make up for what was taken."""
        self._shape = spec
        self._changed.set()

    async def take(self, spec: VmSpec) -> Warm | None:
        """Return a waiting machine of *spec*'s shape that answers, for the caller to keep or end. None: there is none.

        Raises:
            NotFound: no such image.
        """
        if not self._woken:
            return None
        fingerprint = await self._templates.fingerprint_of(spec)
        for warm in [warm for warm in self._woken if warm.key == fingerprint]:
            if warm not in self._woken:  # somebody else was faster while we waited for another to answer
                continue
            self._woken.remove(warm)
            try:
                if await self._answers(warm):
                    return warm
            except BaseException:
                await self._end(warm)  # noqa: ASYNC102  # shields itself
                raise
            await self._end(warm)
        return None

    # --- copies of a checkpoint ---------------------------------------------------------------------------------------

    def want_copy(self, checkpoint: Checkpoint) -> None:
        """Prefer this checkpoint from now on, and make up for what was taken."""
        self._checkpoint = checkpoint
        self._changed.set()

    async def take_copy(self, checkpoint_id: str) -> Warm | None:
        """Return a copy of that checkpoint, which goes on now, for the caller to keep or end. None: there is none."""
        copy = next((copy for copy in self._copies if copy.key == checkpoint_id), None)
        if copy is None:
            return None
        self._copies.remove(copy)
        try:
            await given(copy.work.machine).resume()
        except NoidError as error:
            logger.info("the copy %s of checkpoint %s does not go on: %s", copy.facts["instance"], copy.key, error)
            await self._end(copy)
            return None
        except BaseException:
            await self._end(copy)  # noqa: ASYNC102  # shields itself
            raise
        return copy

    async def forget(self, is_gone: Callable[[Checkpoint], bool]) -> None:
        """End the copies of checkpoints of which *is_gone* is true, and make no more of them."""
        if self._checkpoint is not None and is_gone(self._checkpoint):
            self._checkpoint = None
        await self._end_copies(lambda copy: is_gone(given(copy.work.checkpoint)))

    # --- filling ------------------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Fill the pool whenever something changed and the agent has nothing else to do. Ends them when cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                if self._services.config.pool.size == 0:
                    continue
                for fill in (self._fill, self._fill_copies):
                    await self._operations.quiet(QUIET_SECS)
                    await self._attempt(fill)
        finally:
            with trio.move_on_after(CLOSE_SECS, shield=True):
                for shelf in (self._woken, self._copies):
                    while shelf:
                        await self._end(shelf.pop())

    async def _attempt(self, fill: Callable[[], Awaitable[None]]) -> None:
        try:
            await fill()
        except NoidError as error:  # a create or restore will say it to somebody who asked
            logger.info("no machine waits for the next create or restore: %s", error)
        except Exception:  # a bug here must not end the agent
            logger.exception("no machine waits for the next create or restore")

    async def _fill(self) -> None:
        if (spec := self._shape) is None:
            return
        fingerprint = await self._templates.fingerprint_of(spec)
        for other in [warm for warm in self._woken if warm.key != fingerprint]:
            self._woken.remove(other)
            await self._end(other)
        while self._has_room_for_another(self._woken):
            facts = lifecycle.facts_of_new_vm(GUEST_NAME, None)
            work = Work(services=self._services, templates=self._templates, spec=spec)
            warm = Warm(key=fingerprint, facts=facts, work=work)
            await self._make(warm, (Step("template", machines.find_template), *machines.MACHINE))
            self._woken.append(warm)

    async def _fill_copies(self) -> None:
        checkpoint = self._checkpoint
        await self._end_copies(lambda copy: checkpoint is None or copy.key != checkpoint.id)
        while checkpoint is not None and self._has_room_for_another(self._copies):
            facts = lifecycle.facts_of_new_vm(GUEST_NAME, checkpoint.id)
            user = self._services.store.user(checkpoint.owner)
            work = Work(services=self._services, templates=self._templates, user=user, stands_still=True)
            copy = Warm(key=checkpoint.id, facts=facts, work=work)
            await self._make(copy, (Step("verify", machines.find_checkpoint), *machines.COLD))
            work.checkpoint = checkpoint
            if self._checkpoint != checkpoint:  # forgotten, or another is wanted meanwhile
                await self._end(copy)
                return
            self._copies.append(copy)

    def _has_room_for_another(self, shelf: list[Warm]) -> bool:
        config = self._services.config
        spare = _spare_memory_share() > SPARE_MEMORY_SHARE and _spare_disk_share(config.data_dir) > SPARE_DISK_SHARE
        return spare and len(shelf) < config.pool.size

    async def _make(self, warm: Warm, steps: Sequence[Step[Work]]) -> None:
        """Take *steps*. Whatever fails or is cancelled: nothing is left of it."""
        try:
            with trio.fail_after(WARM_SECS):
                for step in steps:
                    warm.facts.update(await step.do(warm.work, warm.facts) or {})
                if not warm.work.stands_still:
                    await _rehearse(warm.work)
        except trio.TooSlowError as error:
            await self._end(warm)
            raise DeadlineExceeded(f"a machine that should wait was not made within {WARM_SECS:g} s.") from error
        except BaseException:
            await self._end(warm)  # noqa: ASYNC102  # shields itself
            raise

    async def _end_copies(self, of: Callable[[Warm], bool]) -> None:
        for copy in [copy for copy in self._copies if of(copy)]:
            if copy in self._copies:  # nobody has taken it while another one ended
                self._copies.remove(copy)
                await self._end(copy)

    async def _answers(self, warm: Warm) -> bool:
        try:
            with trio.fail_after(PING_SECS):
                async with given(warm.work.link).guest() as guest:
                    await guest.ping()
        except (NoidError, trio.TooSlowError) as error:
            logger.info("the waiting machine %s does not answer: %s", warm.facts["instance"], error)
            return False
        return True

    async def _end(self, warm: Warm) -> None:
        """Undo what made it. What fails the next start sweeps."""
        with trio.move_on_after(CLOSE_SECS, shield=True):
            try:
                await machines.end_all(warm.work, warm.facts)
            except (NoidError, OSError):
                logger.exception("the waiting machine %s is not entirely gone", warm.facts["instance"])


async def _rehearse(work: Work) -> None:
    async with given(work.link).guest() as guest:
        for argv in REHEARSAL:
            process = await guest.start(ExecRequest(argv=argv))
            while not isinstance(await process.receive(), ProcessExit):
                pass
            await guest.release(process)


def _spare_memory_share() -> float:
    """Return which part of the host's memory is available."""
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123  # a stream of a few lines
        fields = dict(line.split(":", 1) for line in file)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(fields["MemAvailable"].split()[0]) * 1024 / total


def _spare_disk_share(path: Path) -> float:
    """Return which part of the disk that *path* is on is available."""
    disk = os.statvfs(path)
    return disk.f_bavail / max(1, disk.f_blocks)
