"""What is delivered is what was produced, exactly once per lineage, whatever happens in between: a model says what.

``NOID_MODEL_RUNS`` and ``NOID_MODEL_STEPS`` make it look longer, ``NOID_TEST_SEED`` elsewhere: see docs/operations.md.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import trio

from noid.core.guests.session import Session
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest, Gap
from noid.errors import LineageEnded
from noid.testing.reaper import clean
from noid.testing.simulated_agent import give_default_image

from .conftest import Rig

RUNS = int(os.environ.get("NOID_MODEL_RUNS", "40"))
STEPS = int(os.environ.get("NOID_MODEL_STEPS", "12"))
SEED = int(os.environ.get("NOID_TEST_SEED", "20261121"))
RING_BYTES = 4096
STEP_SECS = 15.0
SHRINK_SECS = 30.0
VMS = ("web", "copy-1", "copy-2")

Step = tuple[str, int]
LONG, SHORT, KILLED, STOPPED = 5, 6, 1, 2  # what `write` and `restart` make of a number
KNOWN_TROUBLE: tuple[list[Step], ...] = (
    [("write", SHORT), ("restart", STOPPED), ("write", SHORT), ("read", 1), ("restart", KILLED), ("write", SHORT)],
    [("write", LONG), ("restart", KILLED), ("write", SHORT)],
    [("write", LONG), ("checkpoint", 0), ("write", SHORT), ("fork", 0), ("write", 1), ("restart", KILLED)],
    [("write", SHORT), ("checkpoint", 0), ("write", SHORT), ("restore", 0), ("join", 0), ("write", SHORT)],
)


@dataclass
class Reader:
    """A client of one process: what it has, where it goes on, and of which lineage it is."""

    lineage: str
    offset: int = 0
    received: bytearray = field(default_factory=bytearray)
    gaps: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Copy:
    """One process in one lineage: all it has ever written, and who reads it."""

    vm: str
    process: str
    lineage: str
    produced: bytes
    inherited: int
    readers: list[Reader] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # What a machine is made of has the ring, and nothing of what the original's agents had saved.
        self.lost.append((0, self.inherited - RING_BYTES))

    def may_lack(self, start: int, end: int) -> bool:
        """Whether neither the guest nor a disk had these bytes at some moment, when all else was lost."""
        return any(lost_start <= start < end <= lost_end for lost_start, lost_end in self.lost)


class Model:
    """Drives an agent and knows what every reader must have received."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.copies: list[Copy] = []
        self.checkpoints: list[tuple[str, list[tuple[str, bytes]]]] = []
        self.written = 0
        self.agent: Any = None

    async def play(self, steps: list[Step]) -> None:
        """Take all steps, on as many agents as they want, and compare in the end."""
        rest = [("create", 0), ("start", 0), *steps]
        while rest:
            async with self.rig.agent(exec_reattach_secs=600.0) as self.agent:
                while rest:
                    verb, which = rest.pop(0)
                    if verb == "restart":
                        if which % 2 == KILLED:
                            self.lose_what_is_unsaved()
                        break
                    with trio.fail_after(STEP_SECS):
                        await getattr(self, verb)(which)
                if not rest:
                    with trio.fail_after(STEP_SECS):
                        await self.check()
                    for name in self.agent.states():
                        await self.agent.destroy(name)

    def lose_what_is_unsaved(self) -> None:
        """Let the agent end as by ``kill -9``: what is only in its memory is gone."""
        for sessions in self.agent.agent.guests._sessions._by_vm.values():
            for session in sessions._sessions.values():
                for copy in self.copies:
                    if (copy.process, copy.lineage) == (session.name, session.lineage):
                        copy.lost.append((session.log.end - session.log.unsaved_bytes, len(copy.produced) - RING_BYTES))
                session.log.abandon()

    async def create(self, _: int) -> None:
        await self.agent.create("web")

    async def session(self, copy: Copy) -> Session:
        sessions = await self.agent.agent.guests.sessions(self.agent.user, copy.vm)
        return await sessions.get(copy.process, copy.lineage)

    # --- what can happen ----------------------------------------------------------------------------------------------

    async def start(self, _: int) -> None:
        request = ExecRequest(argv=("cat",), stdin=True, log_bytes=RING_BYTES)
        session = await self.agent.agent.guests.start_process(self.agent.user, "web", request, detached=True)
        self.copies.append(Copy("web", session.name, session.lineage, b"", 0, [Reader(session.lineage)]))

    async def write(self, which: int) -> None:
        """Let a process write something nobody has written before, sometimes more than its ring holds."""
        if not self.copies:
            return
        copy = self.copies[which % len(self.copies)]
        self.written += 1
        line = f"{self.written} of {copy.lineage}\n".encode() * (1 if which % LONG else 400)
        session = await self.session(copy)
        before = len(copy.produced)
        copy.produced += line
        await session.send_stdin(line)
        while session.log.end < before + len(line):
            await session.changed.park()

    async def read(self, which: int) -> None:
        """Let every reader of one process catch up, in pieces, and be cut off at a random place."""
        if self.copies:
            copy = self.copies[which % len(self.copies)]
            for reader in copy.readers:
                await self.catch_up(copy, reader, until=reader.offset + which * 7)

    async def join(self, which: int) -> None:
        if self.copies:
            copy = self.copies[which % len(self.copies)]
            copy.readers.append(Reader(copy.lineage))

    async def checkpoint(self, _: int) -> None:
        found = await self.agent.checkpoint("web")
        self.checkpoints.append((found, [(c.process, c.produced) for c in self.copies if c.vm == "web"]))

    async def restore(self, which: int) -> None:
        if self.checkpoints:
            checkpoint, then = self.checkpoints[which % len(self.checkpoints)]
            await self.agent.restore(checkpoint)
            for copy in [c for c in self.copies if c.vm == "web"]:
                with pytest.raises(LineageEnded):
                    await self.session(copy)
                self.copies.remove(copy)
            await self.now_in("web", then, "rewound")

    async def fork(self, which: int) -> None:
        name = VMS[1 + which % 2]
        if self.checkpoints and name not in self.agent.states():
            checkpoint, then = self.checkpoints[which % len(self.checkpoints)]
            await self.agent.restore(checkpoint, new_name=name)
            await self.now_in(name, then, "forked-copy")

    async def now_in(self, vm: str, then: list[tuple[str, bytes]], origin: str) -> None:
        sessions = await (await self.agent.agent.guests.sessions(self.agent.user, vm)).all()
        assert {s.name: s.origin for s in sessions} == dict.fromkeys((p for p, _ in then), origin)
        lineages = {c.lineage for c in self.copies}
        for process, produced in then:
            lineage = next(s.lineage for s in sessions if s.name == process)
            assert lineage not in lineages
            self.copies.append(Copy(vm, process, lineage, produced, len(produced), [Reader(lineage)]))

    # --- what must hold -----------------------------------------------------------------------------------------------

    async def catch_up(self, copy: Copy, reader: Reader, until: int) -> None:
        session = await self.session(copy)
        assert session.lineage == reader.lineage
        with session.view(reader.offset) as viewer:
            while viewer.offset < min(until, len(copy.produced)):
                events = await viewer.next()
                assert not isinstance(events, ProcessExit)
                for event in events:
                    if viewer.offset >= until:
                        break
                    if isinstance(event, Gap):
                        assert event.start == reader.offset
                        reader.gaps.append((event.start, event.end))
                        reader.received += bytes(event.end - event.start)
                    else:
                        assert event.offset == reader.offset, "twice, or missing without a gap"
                        reader.received += event.data
                    viewer.passed(event)
                    reader.offset = event.end

    async def check(self) -> None:
        """Let everybody catch up and compare: every byte is the produced one, or in a gap that had to be."""
        for copy in self.copies:
            for reader in copy.readers:
                await self.catch_up(copy, reader, until=len(copy.produced))
                expected = bytearray(copy.produced)
                for start, end in reader.gaps:
                    assert copy.may_lack(start, end), f"a gap {start}..{end} in what somebody still had: {copy.lost}"
                    expected[start:end] = bytes(end - start)
                assert reader.received == expected, _first_difference(reader.received, expected)


def _first_difference(received: bytes, expected: bytes) -> str:
    at = next((n for n, (a, b) in enumerate(zip(received, expected, strict=False)) if a != b), len(received))
    return f"byte {at}: received {bytes(received[at : at + 60])!r}, produced {bytes(expected[at : at + 60])!r}"


class _Patience:
    """Ends shrinking after a while: from then on only what is known to fail is played, all else counts as fine."""

    def __init__(self) -> None:
        self._failed: list[list[Step]] = []
        self._over_at = float("inf")

    def is_over_for(self, steps: list[Step]) -> bool:
        return time.monotonic() > self._over_at and steps not in self._failed

    def note(self, steps: list[Step]) -> None:
        if not self._failed:
            self._over_at = time.monotonic() + SHRINK_SECS
        self._failed.append(steps)


patience = _Patience()


def _each_known_trouble(test: Any) -> Any:
    for steps in KNOWN_TROUBLE:
        test = hypothesis.example(steps=steps)(test)
    return test


@hypothesis.settings(
    max_examples=RUNS,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)
@hypothesis.seed(SEED)
@_each_known_trouble
@hypothesis.given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["start", "write", "write", "write", "read", "join", "restart", "checkpoint", "restore", "fork"]
            ),
            st.integers(0, 999),
        ),
        min_size=4,
        max_size=STEPS,
    )
)
@pytest.mark.deadline(300 + 20 * RUNS)
def test_delivered_is_produced_exactly_once_per_lineage(data_dir_root: Path, steps: list[Step]) -> None:
    if patience.is_over_for(steps):
        return
    directory = Path(tempfile.mkdtemp(prefix="model-", dir=data_dir_root))  # watched: also a killed run leaves nothing
    try:
        give_default_image(directory)
        trio.run(Model(Rig(directory)).play, list(steps))
    except BaseException:
        patience.note(steps)
        raise
    finally:
        clean(directory)
