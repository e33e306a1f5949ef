"""The agent's promises about one VM and many, on simulated VMs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from noid.core import agent as agents
from noid.core.guests import face as guests
from noid.core.model.vms import VmSpec
from noid.errors import (
    BackendError,
    Busy,
    ConfigError,
    Conflict,
    Damaged,
    DeadlineExceeded,
    DependencyDown,
    Incompatible,
    InvalidRequest,
    NoidError,
    NoSpace,
    NotFound,
)
from noid.testing.faults import die, fail, hang
from noid.testing.simulated_agent import give_default_image

Rig = Any  # see conftest.py
MEMORY, DISK = "/dev/shm/in-memory", "/home/on-disk"


async def until(condition: Callable[[], object]) -> None:
    """Look until *condition* holds; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110  # it happens in another process
        await trio.sleep(0.01)


# --- one VM ----------------------------------------------------------------------------------------------------------


async def test_the_life_of_a_vm(rig: Rig, no_leaks: None) -> None:
    async with rig.agent() as noid:
        await noid.create()
        assert await noid.sh("hostname") == "web"
        await noid.write(MEMORY, "1")
        await noid.write(DISK, "1")
        checkpoint = await noid.checkpoint()

        await noid.write(MEMORY, "2")
        await noid.write(DISK, "2")
        await noid.restore(checkpoint, new_name="copy")
        assert [await noid.sh("cat", path, name="copy") for path in (MEMORY, DISK)] == ["1", "1"]
        assert [await noid.sh("cat", path) for path in (MEMORY, DISK)] == ["2", "2"]
        assert await noid.sh("hostname", name="copy") == "copy"

        before = noid.agent.vm(noid.user, "web")
        await noid.restore(checkpoint)
        after = noid.agent.vm(noid.user, "web")
        assert [await noid.sh("cat", path) for path in (MEMORY, DISK)] == ["1", "1"]
        assert (after.id, after.created_at) == (before.id, before.created_at)
        assert after.instance != before.instance
        assert after.origin == checkpoint
        assert rig.machines() == 2

        await noid.destroy()
        await noid.destroy("copy")
        assert noid.states() == {}
        assert rig.machines() == 0
        assert rig.stray() == []
        assert [c.id for c in noid.agent.checkpoints.of(noid.user, "web")] == [checkpoint]

        await noid.restore(checkpoint)  # a VM that was destroyed comes back under its name
        assert await noid.sh("cat", MEMORY) == "1"
        await noid.destroy()


async def test_checkpoints_know_their_parents(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        first = await noid.checkpoint()
        await noid.restore(first, new_name="copy")
        second = await noid.checkpoint("copy")
        parents = {c.id: c.parent for name in ("web", "copy") for c in noid.agent.checkpoints.of(noid.user, name)}
        assert parents == {first: None, second: first}


async def test_a_grandchild_lives_although_all_it_came_from_was_destroyed(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
        await noid.write(MEMORY, "a", name="a")
        await noid.restore(await noid.checkpoint("a"), name="a", new_name="b")
        await noid.destroy("a")
        await noid.restore(await noid.checkpoint("b"), name="b", new_name="c")
        await noid.destroy("b")
        assert await noid.sh("cat", MEMORY, name="c") == "a"


async def test_a_restored_vm_has_the_shape_of_its_checkpoint(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create(cpus=2, mem_mib=128)
        checkpoint = await noid.checkpoint()
        await noid.destroy()
        await noid.create(cpus=1, mem_mib=256)
        await noid.restore(checkpoint)
        vm = noid.agent.vm(noid.user, "web")
        assert (vm.cpus, vm.mem_mib) == (2, 128)
    async with rig.agent() as noid:
        assert noid.states() == {"web": "running"}, "the next agent could not adopt a machine of another shape"


async def test_another_vms_checkpoint_is_refused_in_place(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
        await noid.create("b")
        checkpoint = await noid.checkpoint("a")
        with pytest.raises(Conflict, match=r"is of VM 'a', not of 'b'\. Restore it as a new VM"):
            await noid.restore(checkpoint, name="b")
        await noid.restore(checkpoint, name="a", new_name="c")
        await noid.restore(checkpoint, name="c")  # c was cloned from it


@pytest.mark.parametrize("length", [1, 64])
async def test_a_name_may_have_up_to_64_characters(rig: Rig, length: int) -> None:
    async with rig.agent() as noid:
        name = "x" * length
        await noid.create(name)
        assert await noid.sh("hostname", name=name) == name
        with pytest.raises(InvalidRequest, match="65 characters"):
            await noid.create("x" * 65)


async def test_limits_of_the_host_are_named(rig: Rig) -> None:
    async with rig.agent() as noid:
        for fields, says in (
            ({"mem_mib": agents.host_mem_mib() + 1}, f"between 64 and {agents.host_mem_mib()}"),
            ({"mem_mib": 0}, "mem_mib is 0"),
            ({"cpus": 0}, "cpus is 0"),
            ({"cpus": 33}, "cpus is 33"),
            ({"name": "a/b"}, "invalid characters"),
        ):
            with pytest.raises(InvalidRequest, match=says):
                await noid.create(**fields)
        with pytest.raises(NotFound, match="no image 'missing'"):
            await noid.create(image="missing")
        assert noid.states() == {}


async def test_what_is_not_there_is_not_found(rig: Rig) -> None:
    async with rig.agent() as noid:
        for ask in (
            lambda: noid.destroy("no"),
            lambda: noid.checkpoint("no"),
            lambda: noid.sh("true", name="no"),
            lambda: noid.restore("0123456789abcdef"),
        ):
            with pytest.raises(NotFound, match="not found"):
                await ask()
        with pytest.raises(NotFound, match="VM 'no' not found"):
            noid.agent.checkpoints.of(noid.user, "no")


async def test_what_belongs_to_another_user_is_not_found(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        mine = noid.user
        noid.user, token = await noid.agent.users.add("other")
        assert token
        for ask in (noid.destroy, noid.checkpoint, lambda: noid.sh("true"), lambda: noid.restore(checkpoint)):
            with pytest.raises(NotFound):
                await ask()
        await noid.create()  # names are each user's own
        noid.user = mine
        assert noid.states() == {"web": "running"}


# --- many ------------------------------------------------------------------------------------------------------------


async def test_twenty_creates_at_once_boot_once_and_all_work(rig: Rig) -> None:
    async with rig.agent() as noid:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(noid.create, f"vm{number}")
        assert rig.faults.calls["launch"] == 1
        assert rig.machines() == 20
        for number in range(20):
            assert await noid.sh("hostname", name=f"vm{number}") == f"vm{number}"
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(noid.destroy, f"vm{number}")
        assert rig.machines() == 0


async def test_of_two_creates_of_one_name_one_wins_and_one_is_told(rig: Rig) -> None:
    refused: list[NoidError] = []

    async def try_create() -> None:
        try:
            await noid.create()
        except Conflict as error:
            refused.append(error)

    async with rig.agent() as noid:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_create)
            nursery.start_soon(try_create)
        assert len(refused) == 1
        assert isinstance(refused[0], Busy)
        assert await noid.sh("hostname") == "web"
        with pytest.raises(Conflict, match="VM 'web' already exists"):
            await noid.create()
        assert rig.machines() == 1


async def test_a_caller_who_leaves_gets_the_vm_all_the_same(rig: Rig) -> None:
    async with rig.agent() as noid:
        with trio.move_on_after(0):
            await noid.create()
        await until(lambda: noid.states().get("web") == "running")
        assert await noid.sh("hostname") == "web"


async def test_connecting_to_a_guest_that_hangs_ends_with_advice_and_others_go_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "CONNECT_SECS", 0.2)
    async with rig.agent() as noid:
        await noid.create("a")
        await noid.create("b")
        noid.agent.services.supervisor.get(noid.agent.vm(noid.user, "a")).link.drop()
        rig.faults.arm("connect", hang)
        with pytest.raises(DeadlineExceeded, match="guest of VM 'a' does not answer"):
            await noid.sh("true", name="a")
        await noid.sh("true", name="b")
        await noid.sh("true", name="a")


async def test_the_failure_of_one_user_of_a_guest_does_not_disturb_another(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        async with noid.agent.guests.reach(noid.user, "web") as guest:
            with pytest.raises(BackendError, match="mine alone"):
                async with noid.agent.guests.reach(noid.user, "web"):
                    raise BackendError("mine alone")
            assert await guest.ping() >= 0
            async with noid.agent.guests.reach(noid.user, "web") as again:
                assert again is guest


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [fail(BackendError("no")), die], ids=["fails", "dies"])
@pytest.mark.parametrize("call", ["restore", "connect", "wake"])
async def test_after_a_failed_in_place_restore_the_old_vm_goes_on(rig: Rig, call: str, action: Any) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        await noid.write(MEMORY, "later")
        before = noid.agent.vm(noid.user, "web")
        rig.faults.arm(call, action, after=call == "restore")
        with pytest.raises((BackendError, DependencyDown)):
            await noid.restore(checkpoint)
        assert noid.agent.vm(noid.user, "web") == before
        assert await noid.sh("cat", MEMORY) == "later"
        assert rig.machines() == 1
        assert rig.stray(before.instance) == []


@pytest.mark.parametrize("call", ["pause", "capture", "capture.finish", "resume"])
async def test_after_a_failed_checkpoint_the_vm_goes_on_and_nothing_is_left(rig: Rig, call: str) -> None:
    async with rig.agent() as noid:
        await noid.create()
        rig.faults.arm(call, fail(NoSpace("the disk is full")), after=call == "resume")
        with pytest.raises(NoSpace):
            await noid.checkpoint()
        await noid.write(MEMORY, "goes on")
        assert await noid.sh("cat", MEMORY) == "goes on"
        assert rig.stray(noid.agent.vm(noid.user, "web").instance) == []
        assert await noid.checkpoint()


async def test_a_vm_that_dies_while_it_is_replaced_is_replaced(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        old = noid.agent.vm(noid.user, "web").process
        assert old is not None

        async def kill_the_old_one(_: int | None) -> None:
            os.kill(old.pid, signal.SIGKILL)
            await until(lambda: noid.states() == {"web": "dead"})

        rig.faults.arm("wake", kill_the_old_one)
        await noid.restore(checkpoint)
        assert noid.states() == {"web": "running"}
        assert await noid.sh("hostname") == "web"


async def test_a_guest_that_never_boots_is_told_and_nothing_is_left(rig: Rig) -> None:
    give_default_image_mute(rig.data_dir)
    async with rig.agent(boot_timeout_secs=0.5) as noid:
        with pytest.raises(DeadlineExceeded, match=r"image 'default' did not finish booting within 0\.5 s"):
            await noid.create()
        assert noid.states() == {}
        assert rig.machines() == 0
        assert rig.stray() == []
        assert not any(rig.layout.golden.iterdir())


def give_default_image_mute(data_dir: Path) -> None:
    from noid.core.images import Images

    Images(data_dir / "images", {}).remove("default")
    give_default_image(data_dir, cmdline="simulated.mute")


async def test_a_guest_that_does_not_wake_is_told_and_nothing_is_left(rig: Rig) -> None:
    async with rig.agent(wake_timeout_secs=0.3, hook_timeout_secs=0.1) as noid:
        await noid.create("first")
        rig.faults.arm("wake", hang)
        with pytest.raises(DeadlineExceeded, match=r"guest of VM 'web' did not answer within 0\.4 s"):
            await noid.create()
        assert noid.states() == {"first": "running"}
        assert rig.machines() == 1
        await noid.create()


async def test_a_vmm_that_dies_while_its_guest_wakes_is_told_at_once(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("first")
        rig.faults.arm("wake", die)
        with pytest.raises(DependencyDown, match="the VM ended before its guest answered"):
            await noid.create()
        assert noid.states() == {"first": "running"}


@pytest.mark.parametrize(("how", "becomes"), [("poweroff", "stopped"), ("kill", "dead")])
async def test_a_vm_that_ends_by_itself_says_how_and_what_can_be_done(rig: Rig, how: str, becomes: str) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        if how == "kill":
            process = noid.agent.vm(noid.user, "web").process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
        else:
            async with noid.agent.guests.reach(noid.user, "web") as guest:
                await guest.power_off()
        await until(lambda: noid.states() == {"web": becomes})
        assert noid.agent.vm(noid.user, "web").process is None
        with pytest.raises(Conflict, match=f"cannot exec VM 'web': it is {becomes}.*estore it from a checkpoint"):
            await noid.sh("true")
        with pytest.raises(Conflict, match="cannot checkpoint"):
            await noid.checkpoint()
        await noid.restore(checkpoint)
        assert await noid.sh("hostname") == "web"


async def test_a_damaged_or_foreign_checkpoint_is_refused_and_the_vm_goes_on(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        directory = rig.layout.checkpoint(noid.user.id, checkpoint)
        memory = (directory / "memory").read_bytes()
        (directory / "memory").write_bytes(memory.replace(b'"hostname"', b'"hostnane"'))
        with pytest.raises(Damaged, match="memory: its content differs"):
            await noid.restore(checkpoint)
        (directory / "memory").write_bytes(memory)
        await noid.sh("true")
    async with rig.agent(plugin={"version": "2"}) as noid:
        with pytest.raises(Incompatible, match="version was '1' when it was taken and is '2' on this host"):
            await noid.restore(checkpoint, new_name="copy")
        assert noid.states() == {"web": "running"}


async def test_a_hook_that_refuses_makes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from noid.hookspecs import hookimpl

    class Quota:
        @hookimpl
        def validate_vm(self, spec: VmSpec) -> None:
            raise InvalidRequest(f"no more VMs: {spec.name}")

    async with rig.agent() as noid:
        noid.agent.services.plugins._manager.register(Quota())
        with pytest.raises(InvalidRequest, match="no more VMs: web"):
            await noid.create()
        assert noid.states() == {}


async def test_events_are_told_after_the_fact_and_a_listener_that_fails_harms_nobody(rig: Rig) -> None:
    from noid.hookspecs import hookimpl

    heard: list[tuple[str, dict[str, str]]] = []

    class Listener:
        @hookimpl
        def on_event(self, event: Any) -> None:
            heard.append((event.kind, noid.states()))
            raise RuntimeError("a listener with a fault")

    async with rig.agent() as noid:
        noid.agent.services.plugins._manager.register(Listener())
        await noid.create()
        await noid.destroy()
    alive = {"web": "running"}
    assert heard == [
        *(("operation.start", {}), ("vm.create", alive), ("operation.end", alive)),
        *(("operation.start", alive), ("vm.destroy", {}), ("operation.end", {})),
    ]


async def test_what_guests_hold_is_for_the_agents_user_alone_also_where_it_was_open_before(rig: Rig) -> None:
    storage, golden = rig.data_dir / "storage", rig.data_dir / "golden"
    storage.mkdir(mode=0o755)
    async with rig.agent():
        assert [path.stat().st_mode & 0o777 for path in (storage, golden)] == [0o700, 0o700]


async def test_a_data_directory_that_cannot_be_is_a_matter_of_configuration(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rig.data_dir = tmp_path / "file" / "data"
    with pytest.raises(ConfigError, match=r"cannot use .*file/data as data directory: .*data_dir in server.toml"):
        async with rig.agent():
            pass
