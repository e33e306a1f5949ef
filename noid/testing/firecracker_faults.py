"""Whatever goes wrong at any call that is made of Firecracker, through the whole agent: what must hold afterwards.

A `FaultWorld` is an agent's data directory with a VM ``web``, whose memory holds a word, and a checkpoint of it. It
first records which calls each operation makes of the simulated Firecracker, so that a call that is added later is
swept by itself. Then, for each of them and each way in which it can go wrong:

- the operation fails, and its error names the call, and repeats Firecracker's own words, if there were any;
- ``web`` runs on in the same process, answers, and its memory is what it was. Where the fault has hit ``web`` itself,
  so that its process has ended or never answers again, that is told, and it can be destroyed;
- no process, directory, file, socket, cgroup, row or open operation is left of what failed;
- the same again works, and holds all of the guest's memory.

Where the agent is what is killed at a call, the same holds for the next agent.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import trio
from noid_vmm_firecracker import api, backend

from noid.core.agent import Agent
from noid.core.config.settings import Backends, SandboxConfig
from noid.core.database.store import open_store
from noid.core.layout import Layout
from noid.core.model.storage import Checkpoint
from noid.core.model.vms import ProcessRef, VmSpec, VmState
from noid.core.opening import open_agent
from noid.errors import NoidError
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.processes import marked_processes
from noid.testing.simulated_agent import give_default_image, said, simulated_config, simulated_plugins

OPERATIONS = ("create", "wake", "checkpoint", "fork", "restore")
"""``create`` boots a template first, ``wake`` is a create that finds one."""
WAYS = (
    ("refuse", "before"),
    ("garble", "before"),
    ("cut", "before"),
    ("cut", "after"),
    ("die", "before"),
    ("die", "after"),
    ("hang", "before"),
    ("hang", "after"),
    ("late", "after"),
)
IN_THE_MIDDLE = (("die", "during"), ("hang", "during"))
STARTING = "start"
CAPTURING = "PUT /snapshot/create"
WORDS = "no, because of the weather"
LATE_SECS = 0.2
IMPATIENCE_SECS = 1.5
CASE_SECS = 60.0
_MEM_MIB = 128
_WORD_AT = "/dev/shm/word"  # noqa: S108  # in the guest
_NO_WORD = f"cat: {_WORD_AT}: No such file or directory"


@dataclass(frozen=True, slots=True)
class Place:
    """The *nth* *call* of its name that *operation* makes."""

    operation: str
    call: str
    nth: int

    def __str__(self) -> str:
        return f"{self.operation}, {self.call}" + (f" number {self.nth}" if self.nth > 1 else "")


@dataclass(frozen=True, slots=True)
class Case:
    """What goes wrong where. *what* ``kill``: the agent is killed; else see `SimulatedFirecracker.arm`."""

    place: Place
    what: str
    when: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what} {self.when}"

    @property
    def hits_web(self) -> bool:
        """Whether it is the process of ``web`` that ends or never answers again."""
        return self.place.operation == "checkpoint" and self.what in ("die", "hang")

    @property
    def may_succeed(self) -> bool:
        """Whether the operation may succeed all the same: letting a guest go on is tried again."""
        return self.what == "late" or (self.place.operation == "checkpoint" and self.place.nth > 1)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Nobody waits long, inside the block, for an answer that never comes. The real deadlines are of seconds."""
    names = {api: ("DEADLINE_SECS", "SNAPSHOT_SECS"), backend: ("START_SECS",)}
    patient = {(module, name): getattr(module, name) for module in names for name in names[module]}
    for module, name in patient:
        setattr(module, name, IMPATIENCE_SECS)
    try:
        yield
    finally:
        for (module, name), secs in patient.items():
            setattr(module, name, secs)


def cases(places: list[Place], *, kill: bool) -> Iterator[Case]:
    """Yield every way in which *places* can go wrong, or, with *kill*, every moment at which the agent can die."""
    for place in places:
        middle = place.call == CAPTURING
        if kill:
            moments = ("before", "during", "after") if middle else ("before", "after")
            ways = [("kill", when) for when in moments]
        elif place.call == STARTING:
            ways = [("die", "before"), ("hang", "before")]  # nothing is answered yet
        else:
            ways = [*WAYS, *(IN_THE_MIDDLE if middle else ())]
        yield from (Case(place, what, when) for what, when in ways)


class FaultWorld:
    """One data directory, swept through many cases. *firecracker* is its VMM."""

    def __init__(self, data_dir: Path, firecracker: SimulatedFirecracker) -> None:
        self.data_dir = data_dir
        self._firecracker = firecracker
        self._checkpoint = ""
        self._process: ProcessRef | None = None
        self._mem_mib = _MEM_MIB
        self._words = 0

    # --- what is done ------------------------------------------------------------------------------------------------

    async def prepare(self) -> list[Place]:
        """Make ``web`` and its checkpoint, and return every call each operation makes."""
        give_default_image(self.data_dir)
        places = []
        async with self._opened() as agent:
            await self._make_web(agent)
            for operation in OPERATIONS:
                self._mem_mib += 1  # a shape that has no template yet
                before = len(self._firecracker.calls())
                await self._operate(agent, operation)
                seen: Counter[str] = Counter()
                for call in self._firecracker.calls()[before:]:
                    seen[call] += 1
                    places.append(Place(operation, call, seen[call]))
                await self._tidy(agent, operation)
        return places

    async def strike(self, cases: list[Case]) -> None:
        """Let each of *cases* happen, under one agent.

        Raises:
            AssertionError: names the case, and says what does not hold.
        """
        async with self._opened() as agent:
            for case in cases:
                try:
                    with trio.fail_after(CASE_SECS):
                        await self._strike(agent, case)
                except (AssertionError, NoidError, trio.TooSlowError, OSError) as error:
                    raise AssertionError(f"{case}: {error!r}") from error

    def kill(self, case: Case) -> None:
        """Let an agent be killed at a call, and see what the next one makes of it.

        Raises:
            AssertionError: names the case, and says what does not hold.
        """
        before = trio.run(self._inventory_of_another)
        self._mem_mib += 1
        pid = os.fork()
        if pid == 0:
            _leave_after(lambda: self._be_killed(case))
        _, status = os.waitpid(pid, 0)
        self._words += case.place.operation == "checkpoint"  # written, before the call came
        self._firecracker.disarm()
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise AssertionError(f"{case}: the agent was not killed, but ended with status {status:#x}")
        try:
            trio.run(self._look_after, case, before)
        except (AssertionError, NoidError, trio.TooSlowError) as error:
            raise AssertionError(f"{case}: {error!r}") from error

    async def end(self) -> None:
        """Destroy every VM."""
        async with self._opened() as agent:
            user = agent.local_user()
            for vm in agent.vms(user):
                await agent.destroy_vm(user, vm.name)

    # --- the sweep ---------------------------------------------------------------------------------------------------

    async def _strike(self, agent: Agent, case: Case) -> None:
        place = case.place
        before = self._inventory(agent)
        self._mem_mib += 1
        self._firecracker.arm(place.call, case.what, when=case.when, nth=place.nth, text=WORDS, secs=LATE_SECS)
        failure = await self._attempt(agent, case)
        assert self._firecracker.struck(), f"it never came to the call: {failure}"
        if case.what == "late":
            assert failure is None, failure
        elif failure is None:
            assert case.may_succeed, "the operation succeeded"
        else:
            text = str(failure)
            named = "listen" if place.call == STARTING else place.call
            assert named in text, f"the error does not name the call: {text}"
            assert case.what not in ("refuse", "garble") or WORDS in text, f"Firecracker's words are missing: {text}"
        if failure is None:
            await self._tidy(agent, place.operation)
        if case.hits_web:
            await self._bury_web(agent, case)
        else:
            await self._web_is_well(agent)
            left = self._inventory(agent)
            assert left == before, f"left behind: {_difference(before, left)}"
        await self._operate(agent, place.operation)
        await self._tidy(agent, place.operation)

    async def _attempt(self, agent: Agent, case: Case) -> NoidError | None:
        try:
            await self._operate(agent, case.place.operation)
        except NoidError as error:
            return error
        return None

    async def _be_killed(self, case: Case) -> None:
        """The child: run into the end of this process."""
        async with self._opened() as agent:
            place = case.place
            self._firecracker.arm(place.call, "kill", when=case.when, nth=place.nth, pid=os.getpid())
            await self._operate(agent, place.operation)
            await trio.sleep(CASE_SECS)  # the signal is on its way

    async def _look_after(self, case: Case, before: dict[str, Counter[str]]) -> None:
        with trio.fail_after(CASE_SECS):
            async with self._opened() as agent:
                await self._web_is_well(agent)
                left = self._inventory(agent)
                assert left == before, f"left behind: {_difference(before, left)}"
                await self._operate(agent, case.place.operation)
                await self._tidy(agent, case.place.operation)

    async def _operate(self, agent: Agent, operation: str) -> None:
        """Carry out the operation."""
        user = agent.local_user()
        match operation:
            case "create":
                await agent.create_vm(user, VmSpec(name="new", mem_mib=self._mem_mib))
            case "wake":
                await agent.create_vm(user, VmSpec(name="new", mem_mib=_MEM_MIB))
            case "checkpoint":
                self._words += 1
                await said(agent, user, "web", f"echo {self._words} > {_WORD_AT}")
                await agent.checkpoints.take(user, "web", "another")
            case "fork":
                await agent.restore_vm(user, "web", self._checkpoint, "new")
            case "restore":
                await agent.restore_vm(user, "web", self._checkpoint, None)

    async def _tidy(self, agent: Agent, operation: str) -> None:
        """Look at what a successful *operation* has made, and take it away."""
        user = agent.local_user()
        if operation == "restore":
            self._words = 0
            assert agent.vm(user, "web").process != self._process, "web is the machine it was"
            self._process = agent.vm(user, "web").process
        if operation == "checkpoint":
            another = self._another(agent)
            await agent.restore_vm(user, "web", another.id, "new")
            await agent.checkpoints.delete(user, another)
        if operation != "restore":
            expected = {"checkpoint": str(self._words), "fork": "0"}.get(operation, _NO_WORD)
            found = await said(agent, user, "new", f"cat {_WORD_AT}")
            assert found == expected, f"the memory of what it has made holds {found!r}, not {expected!r}"
            await agent.destroy_vm(user, "new")
        await self._web_is_well(agent)

    # --- web ---------------------------------------------------------------------------------------------------------

    async def _make_web(self, agent: Agent) -> None:
        user = agent.local_user()
        await agent.create_vm(user, VmSpec(name="web", mem_mib=_MEM_MIB))
        self._words = 0
        await said(agent, user, "web", f"echo 0 > {_WORD_AT}")
        taken = (await agent.checkpoints.take(user, "web", "first")).checkpoint
        assert taken is not None
        self._checkpoint = taken.id
        self._process = agent.vm(user, "web").process

    async def _web_is_well(self, agent: Agent) -> None:
        user = agent.local_user()
        web = agent.vm(user, "web")
        assert (web.state, web.busy) == (VmState.RUNNING, None), f"web is {web.state}, busy with {web.busy}"
        assert web.process == self._process, "web's process is another one"
        found = await said(agent, user, "web", f"cat {_WORD_AT}")
        assert found == str(self._words), f"web's memory holds {found!r}, not {self._words}"

    async def _bury_web(self, agent: Agent, case: Case) -> None:
        """Whoever lost its process is told so; what is stuck can be destroyed. Then make it anew."""
        user = agent.local_user()
        if case.what == "die":
            while agent.vm(user, "web").state is not VmState.DEAD:  # noqa: ASYNC110  # nobody is told of it
                await trio.sleep(0.01)
        await agent.destroy_vm(user, "web")
        for checkpoint in agent.checkpoints.all(user):
            await agent.checkpoints.delete(user, checkpoint)
        left = self._inventory(agent)
        assert not left["process"], f"left behind: {left['process']}"
        assert not [name for name in left["file"] if "/vms/" in name or ".partial" in name], f"left behind: {left}"
        assert not left["row"], f"left behind: {left['row']}"
        await self._make_web(agent)

    def _another(self, agent: Agent) -> Checkpoint:
        (another,) = (c for c in agent.checkpoints.all(agent.local_user()) if c.id != self._checkpoint)
        return another

    # --- what there is -----------------------------------------------------------------------------------------------

    def _inventory(self, agent: Agent) -> dict[str, Counter[str]]:
        """Count what there is, by kind and by names that another machine of the same VM would have too."""
        user, layout = agent.local_user(), Layout(self.data_dir)
        instances = {vm.instance: vm.name for vm in agent.vms(user)}
        roots = (layout.golden, self.data_dir / "storage", layout.run("x").parent)
        files = [path.relative_to(root.parent).as_posix() for root in roots for path in root.rglob("*")]
        whole = re.compile(r"golden/\w+(/|$)|.*/memory\.base$|.*/agent\.sock$")  # templates stay, as they should
        kept = [name for name in files if not whole.match(name)]
        with open_store(agent.config.database) as store:
            operations = [operation["kind"] for operation in store.open_operations()]
        rows = [f"{vm.name} {vm.state}" for vm in agent.vms(user)]
        rows += [f"checkpoint {checkpoint.label}" for checkpoint in agent.checkpoints.all(user)]
        return {
            "process": Counter(_named(words, instances) for words in marked_processes(self.data_dir).values()),
            "file": Counter(_named(name, instances) for name in kept),
            "cgroup": Counter(
                _named(path.name, instances) for path in _cgroups() if any(name in path.name for name in instances)
            ),
            "row": Counter(rows),
            "operation": Counter(operations),
        }

    async def _inventory_of_another(self) -> dict[str, Counter[str]]:
        async with self._opened() as agent:
            return self._inventory(agent)

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[Agent]:
        backends = Backends(vmm="firecracker", storage="copy", exec=("simulated",), network="none", auth="token")
        plugins = {"vmm_firecracker": {"binary": str(self._firecracker.program)}}
        # The simulated program is Python, which needs half of the host to be there.
        sandbox = SandboxConfig(mode="limits")
        config = simulated_config(self.data_dir, backends=backends, plugins=plugins, sandbox=sandbox)
        async with open_agent(config, simulated_plugins()) as agent:
            yield agent


def _named(name: str, instances: dict[str, str]) -> str:
    for instance, vm_name in instances.items():
        name = name.replace(instance, f"<{vm_name}>")
    return name


def _cgroups() -> list[Path]:
    root = Path("/sys/fs/cgroup")
    return [Path(directory) for directory, _, _ in os.walk(root)] if root.is_dir() else []


def _difference(before: dict[str, Counter[str]], after: dict[str, Counter[str]]) -> str:
    new = [f"{kind} {name}" for kind in after for name in (after[kind] - before[kind])]
    gone = [f"no more {kind} {name}" for kind in after for name in (before[kind] - after[kind])]
    return re.sub(r"\s+", " ", "; ".join([*new, *gone]))


def _leave_after(run: Callable[[], Awaitable[None]]) -> NoReturn:
    """The forked process: run, and leave without any of its parent's clean-up."""
    try:
        trio.run(run)
    except Exception:  # nobody is left to raise it to
        traceback.print_exc()
    finally:
        os._exit(1)
