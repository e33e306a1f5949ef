"""The supervisor: one connection to each guest for everybody, and a machine's end that harms nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from noid.core.backends import ExecBackend, Machine, MachineExit
from noid.core.guests.console import Console
from noid.core.guests.filewatch import FileWatches
from noid.core.model.vms import ProcessRef
from noid.core.vms import health
from noid.core.vms.supervisor import TRY_SECS, GuestLink, Supervisor
from noid.errors import BackendError, ConfigError, DependencyDown


class Backend:
    """An exec backend that counts, and whose guest answers when it is let."""

    needs_agent = True

    def __init__(self, name: str = "counted") -> None:
        self.name = name
        self.opened = self.open = 0
        self.let = trio.Event()

    @contextlib.asynccontextmanager
    async def connect(self, machine: Machine, console: Any) -> AsyncIterator[Any]:
        await self.let.wait()
        self.opened += 1
        self.open += 1
        try:
            yield Conversation()
        finally:
            self.open -= 1


class Conversation:
    """As much of a guest as a link asks for."""

    lost = False

    async def ping(self) -> float:
        await trio.lowlevel.checkpoint()
        if self.lost:
            raise DependencyDown("lost")
        return 0.0


class Ending:
    """A machine that ends when told."""

    ref = ProcessRef(pid=1, start_ticks=1, boot_id="")

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.closed = False

    async def wait(self) -> MachineExit:
        await self.ended.wait()
        return MachineExit(reason="killed")

    async def aclose(self) -> None:
        self.closed = True


def link_of(backend: Backend, nursery: trio.Nursery) -> GuestLink:
    machine = cast("Machine", Ending())  # as much as it needs
    console = Console(machine, Path("serial.log"), FileWatches(nursery))
    return GuestLink(machine, console, [cast("ExecBackend", backend)], nursery)


async def test_everybody_shares_one_connection_also_those_who_come_while_it_opens() -> None:
    backend = Backend()
    guests: list[object] = []

    async def use(link: GuestLink) -> None:
        async with link.guest() as guest:
            guests.append(guest)

    async with trio.open_nursery() as agent:
        link = link_of(backend, agent)
        async with trio.open_nursery() as users:
            for _ in range(5):
                users.start_soon(use, link)
            await trio.testing.wait_all_tasks_blocked()
            backend.let.set()
        assert (backend.opened, len(set(map(id, guests)))) == (1, 1)
        agent.cancel_scope.cancel()
    assert backend.open == 0


async def test_of_several_ways_in_the_first_that_reaches_the_guest_stays(
    autojump_clock: trio.testing.MockClock,
) -> None:
    silent, answering = Backend("silent"), Backend("answering")
    answering.let.set()
    async with trio.open_nursery() as agent:
        machine = cast("Machine", Ending())
        console = Console(machine, Path("serial.log"), FileWatches(agent))
        link = GuestLink(machine, console, cast("list[ExecBackend]", [silent, answering]), agent)
        for _ in range(2):
            async with link.guest():
                assert link.reached_by == "answering"
            link.drop()
            await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() < 2 * TRY_SECS  # the second time nobody waited for the silent one
        agent.cancel_scope.cancel()
    assert (silent.opened, answering.opened, answering.open) == (0, 2, 0)


@pytest.mark.parametrize("needs_agent", [True, False])
async def test_only_a_guest_with_an_agent_is_asked_whether_it_answers_when_nobody_else_talks_to_it(
    needs_agent: bool, autojump_clock: trio.testing.MockClock
) -> None:
    backend = Backend()
    backend.needs_agent = needs_agent
    async with trio.open_nursery() as agent:
        link = link_of(backend, agent)
        agent.start_soon(link.health.watch, link)
        await trio.sleep(10 * health.PING_EVERY_SECS)
        assert link.health.responding is (False if needs_agent else None)  # nobody answers who is asked
        agent.cancel_scope.cancel()


async def test_without_a_usable_way_in_the_link_says_what_to_configure() -> None:
    async def on_exit(*_: Any) -> None: ...

    async with trio.open_nursery() as agent:
        supervisor = Supervisor(agent, [cast("ExecBackend", Backend())], on_exit, cast("Any", None))
        with pytest.raises(ConfigError, match="serial"):
            supervisor.link(cast("Machine", Ending()), Path(), has_agent=False)


async def test_a_connection_dropped_while_it_opens_is_given_up_and_its_opener_told() -> None:
    backend = Backend()
    told: list[str] = []

    async def use(link: GuestLink) -> None:
        try:
            async with link.guest():
                pass
        except DependencyDown as error:
            told.append(str(error))

    async with trio.open_nursery() as agent:
        link = link_of(backend, agent)
        agent.start_soon(use, link)
        await trio.testing.wait_all_tasks_blocked()
        link.drop()
        backend.let.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(told) == 1
        assert backend.opened == 0
        await use(link)  # and a new one can be opened
        assert backend.open == 1
        link.drop()


async def test_an_opener_who_gives_up_leaves_no_half_open_connection() -> None:
    backend = Backend()
    async with trio.open_nursery() as agent:
        link = link_of(backend, agent)
        with trio.move_on_after(0.01):
            async with link.guest():
                raise AssertionError("the guest does not answer")
        backend.let.set()
        await trio.testing.wait_all_tasks_blocked()
        assert backend.opened == 0
        async with link.guest():
            assert backend.open == 1
        link.drop()


async def test_a_lost_connection_is_opened_anew_for_whoever_comes_next() -> None:
    backend = Backend()
    backend.let.set()

    async def find_it_lost(link: GuestLink) -> None:
        async with link.guest() as guest:
            cast("Conversation", guest).lost = True
            raise DependencyDown("lost")

    async with trio.open_nursery() as agent:
        link = link_of(backend, agent)
        with pytest.raises(DependencyDown):
            await find_it_lost(link)
        async with link.guest() as guest:
            assert await guest.ping() == 0.0
        assert backend.opened == 2
        link.drop()


@contextlib.asynccontextmanager
async def supervised(on_exit: Callable[[str, str, MachineExit], Any]) -> AsyncIterator[Supervisor]:
    async with trio.open_nursery() as nursery:
        yield Supervisor(nursery, [cast("ExecBackend", Backend())], on_exit)
        nursery.cancel_scope.cancel()


async def test_an_end_that_cannot_be_written_down_ends_no_other_watch() -> None:
    heard: list[str] = []

    async def on_exit(vm_id: str, instance: str, why: MachineExit) -> None:
        heard.append(vm_id)
        if vm_id == "a":
            raise BackendError("the disk is full")

    async with supervised(on_exit) as supervisor:
        machines = {vm_id: Ending() for vm_id in "ab"}
        for vm_id, machine in machines.items():
            held = cast("Machine", machine)
            assert supervisor.hold(vm_id, f"instance of {vm_id}", held, supervisor.link(held, Path())) is None
        for machine in machines.values():
            machine.ended.set()
            await trio.testing.wait_all_tasks_blocked()
    assert heard == ["a", "b"]
    assert all(machine.closed for machine in machines.values())


async def test_a_released_machine_ends_unheard_and_is_its_new_owners_to_close() -> None:
    async def on_exit(*_: object) -> None:
        raise AssertionError("nobody should hear of it")

    async with supervised(on_exit) as supervisor:
        first, second = Ending(), Ending()
        supervisor.hold("a", "1", cast("Machine", first), supervisor.link(cast("Machine", first), Path()))
        replaced = supervisor.hold("a", "2", cast("Machine", second), supervisor.link(cast("Machine", second), Path()))
        assert replaced is not None
        assert replaced.instance == "1"
        first.ended.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not first.closed
        live = supervisor.find("a")
        assert live is not None
        assert live.instance == "2"
    assert second.closed
