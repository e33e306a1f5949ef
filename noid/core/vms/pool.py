"""Machines that were woken before anybody asked: a create that finds one only has to give it its own identity.

A restored guest is slow at first: under emulation every path through its kernel is translated when it first runs, and
with KVM every page is faulted in. So after a create, in a quiet moment, another machine of the same shape is restored
from the template, woken under a name of its own and made to run a command; then it waits.

A waiting machine belongs to no row. Its directories and its process are what a start sweeps, so a crash leaves nothing.
"""

from __future__ import annotations

import logging
import os

import trio

from noid.core.checkpoints.templates import GUEST_NAME, Templates
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.vms import VmSpec
from noid.core.operations.running import Operations
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
#: Run in turn, so that starting and reaping a process is warm too. A guest without them is as warm as it gets.
REHEARSAL = (("true",), ("true",))


class Pool:
    """Keeps ``[pool] size`` machines of the shape that was created last. Run `keep` for as long as the agent lives."""

    def __init__(self, services: Services, templates: Templates, operations: Operations) -> None:
        self._services = services
        self._templates = templates
        self._operations = operations
        self._waiting: list[Warm] = []
        self._wanted: VmSpec | None = None
        self._changed = trio.Event()

    def __len__(self) -> int:
        """How many machines wait."""
        return len(self._waiting)

    def want(self, spec: VmSpec) -> None:
        """Prefer this shape from now on, and make up for what was taken."""
        self._wanted = spec
        self._changed.set()

    async def take(self, spec: VmSpec) -> Warm | None:
        """Return a waiting machine of *spec*'s shape that answers, for the caller to keep or end. None: there is none.

        Raises:
            NotFound: no such image.
        """
        if not self._waiting:
            return None
        fingerprint = await self._templates.fingerprint_of(spec)
        for warm in [warm for warm in self._waiting if warm.fingerprint == fingerprint]:
            if warm not in self._waiting:  # somebody else was faster while we waited for another to answer
                continue
            self._waiting.remove(warm)
            try:
                if await self._answers(warm):
                    return warm
            except BaseException:
                await self._end(warm)  # noqa: ASYNC102  # shields itself
                raise
            await self._end(warm)
        return None

    async def keep(self) -> None:
        """Fill the pool whenever something changed and the agent has nothing else to do. Ends them when cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                await self._operations.quiet(QUIET_SECS)
                await self._fill()
        finally:
            with trio.move_on_after(CLOSE_SECS, shield=True):
                while self._waiting:
                    await self._end(self._waiting.pop())

    async def _fill(self) -> None:
        spec, size = self._wanted, self._services.config.pool.size
        if spec is None or size == 0:
            return
        try:
            fingerprint = await self._templates.fingerprint_of(spec)
            for other in [warm for warm in self._waiting if warm.fingerprint != fingerprint]:
                self._waiting.remove(other)
                await self._end(other)
            while len(self._waiting) < size and _spare_memory_share() > SPARE_MEMORY_SHARE:
                self._waiting.append(await self._make(spec, fingerprint))
        except NoidError as error:  # a create will say it to somebody who asked
            logger.info("no machine waits for the next create: %s", error)
        except Exception:  # a bug here must not end the agent
            logger.exception("no machine waits for the next create")

    async def _make(self, spec: VmSpec, fingerprint: str) -> Warm:
        """Restore, wake and rehearse a machine. Whatever fails or is cancelled: nothing is left of it."""
        facts = lifecycle.facts_of_new_vm(GUEST_NAME, None)
        work = Work(services=self._services, templates=self._templates, spec=spec)
        warm = Warm(fingerprint=fingerprint, facts=facts, work=work)
        try:
            with trio.fail_after(WARM_SECS):
                facts.update(await machines.find_template(work, facts))
                for step in machines.MACHINE:
                    facts.update(await step.do(work, facts) or {})
                await _rehearse(work)
        except trio.TooSlowError as error:
            await self._end(warm)
            raise DeadlineExceeded(f"a machine that should wait was not warm within {WARM_SECS:g} s.") from error
        except BaseException:
            await self._end(warm)  # noqa: ASYNC102  # shields itself
            raise
        return warm

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
