"""Names, labels and what is deleted: what rows, files and a rebuilt database say of it. On simulated VMs."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from noid.core.agent import Agent
from noid.core.checkpoints import manifest as manifests
from noid.core.database.listing import Wanted, position_of
from noid.core.model.storage import Checkpoint
from noid.core.model.users import User
from noid.core.model.vms import VmSpec, VmState
from noid.errors import Busy, Conflict, InvalidRequest, NotFound
from noid.testing.faults import Faults
from noid.testing.simulated_agent import said, simulated_agent, simulated_config


async def make(agent: Agent, user: User, name: str = "web", **labels: str) -> None:
    await agent.create_vm(user, VmSpec(name=name, mem_mib=64, labels=labels))


async def freeze(agent: Agent, user: User, name: str = "web", label: str | None = None, **labels: str) -> Checkpoint:
    taken = await agent.checkpoints.take(user, name, label, labels)
    assert taken.checkpoint is not None
    return taken.checkpoint


def bytes_below(directory: Path) -> int:
    """Return what is occupied, each file once however many names it has."""
    found = {(s.st_dev, s.st_ino): s.st_blocks * 512 for p in directory.rglob("*") for s in [p.lstat()]}
    return sum(found.values())


# --- names and labels of VMs -----------------------------------------------------------------------------------------


async def test_a_running_vm_is_renamed_and_its_checkpoints_follow(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user, tier="front")
        checkpoint = await freeze(agent, user)
        before = agent.vm(user, "web")
        renamed = await agent.change_vm(user, "web", new_name="www", labels={"tier": None, "site": "b"})
        assert renamed.vm is not None
        assert (renamed.vm.name, renamed.vm.labels, renamed.vm.process) == ("www", {"site": "b"}, before.process)
        assert renamed.vm.generation > before.generation
        with pytest.raises(NotFound):
            agent.vm(user, "web")
        with pytest.raises(NotFound):
            agent.checkpoints.of(user, "web")
        (followed,) = agent.checkpoints.of(user, "www")
        assert (followed.id, followed.vm_name) == (checkpoint.id, "www")
        assert manifests.read(agent.services.layout.checkpoint(user.id, checkpoint.id)).vm_name == "www"
        assert await said(agent, user, "www", "hostname") == "web"  # the guest is not told
        await make(agent, user)  # the name is free
        await agent.restore_vm(user, "www", checkpoint.id, None)
        assert agent.vm(user, "www").labels == {"site": "b"}  # in place it keeps them
        assert await said(agent, user, "www", "hostname") == "www"  # a wake tells it


async def test_a_name_that_is_taken_is_refused_and_nothing_changes(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await make(agent, user, "other")
        checkpoint = await freeze(agent, user)
        with pytest.raises(Conflict, match="VM 'other' already exists"):
            await agent.change_vm(user, "web", new_name="other", labels={"a": "b"})
        assert agent.vm(user, "web").labels == {}
        assert manifests.read(agent.services.layout.checkpoint(user.id, checkpoint.id)).vm_name == "web"
        with pytest.raises(InvalidRequest):
            await agent.change_vm(user, "web", new_name="../up")
        with pytest.raises(NotFound):
            await agent.change_vm(user, "none", new_name="www")


async def test_a_change_to_what_it_is_does_nothing(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        unchanged = await agent.change_vm(user, "web", new_name="web")
        assert (unchanged.timings, unchanged.vm) == ({}, agent.vm(user, "web"))


async def test_both_names_are_held_while_a_vm_is_renamed(data_dir: Path) -> None:
    faults, go_on = Faults(), trio.Event()

    async def wait(_: int | None) -> None:
        await go_on.wait()

    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        faults.arm("wake", wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make, agent, user, "new")
            await faults.reached("wake")
            with pytest.raises(Busy, match="VM 'new' is busy with create"):
                await agent.change_vm(user, "web", new_name="new")
            go_on.set()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({f"k{n}": "" for n in range(65)}, "too many labels: 65"),
        ({"": "v"}, "label key ''"),
        ({"a b": "v"}, "label key 'a b'"),
        ({"k" * 64: "v"}, "is not 1 to 63 characters"),
        ({"k": "v" * 257}, "the value of label 'k' has 257 characters"),
    ],
)
async def test_labels_that_cannot_be_are_refused_everywhere(data_dir: Path, labels: dict[str, str], text: str) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        checkpoint = await freeze(agent, user)
        for attempt in (
            lambda: agent.create_vm(user, VmSpec(name="new", mem_mib=64, labels=labels)),
            lambda: agent.change_vm(user, "web", labels=labels),
            lambda: agent.checkpoints.take(user, "web", None, labels),
            lambda: agent.restore_vm(user, "web", checkpoint.id, "new", labels),
            lambda: agent.restore_vm(user, "web", checkpoint.id, None, labels),
            lambda: agent.checkpoints.change(user, checkpoint, label=None, labels=labels),
        ):
            with pytest.raises(InvalidRequest, match=text):
                await attempt()
        assert [vm.name for vm in agent.vms(user)] == ["web"]


async def test_a_clone_has_the_labels_of_its_request_and_a_restore_in_place_may_bring_some(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user, tier="front")
        checkpoint = await freeze(agent, user, purpose="test")
        assert checkpoint.labels == {"purpose": "test"}
        await agent.restore_vm(user, "web", checkpoint.id, "bare")
        await agent.restore_vm(user, "web", checkpoint.id, "own", {"b": "2", "a": "1"})
        assert (agent.vm(user, "bare").labels, agent.vm(user, "own").labels) == ({}, {"a": "1", "b": "2"})
        await agent.restore_vm(user, "web", checkpoint.id, None, {})
        assert agent.vm(user, "web").labels == {}


async def test_a_lost_database_is_rebuilt_with_names_and_labels(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user, tier="front")
        checkpoint = await freeze(agent, user, label="before", purpose="test")
        await agent.change_vm(user, "web", new_name="www", labels={"tier": "back"})
        await agent.checkpoints.change(user, checkpoint, label="after", labels={"more": "yes"})
        expected = agent.vm(user, "www").labels, agent.checkpoints.of(user, "www")
    simulated_config(data_dir).database.rename(data_dir / "lost")
    async with simulated_agent(data_dir) as (agent, user):
        (vm,) = agent.services.store.all_vms()
        owner = agent.services.store.user(vm.owner)
        assert (vm.name, vm.labels, agent.checkpoints.of(owner, "www")) == ("www", *expected)
        assert expected[1][0].labels == {"more": "yes", "purpose": "test"}
        assert expected[1][0].label == "after"


# --- lists -----------------------------------------------------------------------------------------------------------


async def test_lists_are_filtered_by_labels_and_state(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user, "a", tier="front", site="x")
        await make(agent, user, "b", tier="back")
        await make(agent, user, "c", **{"tier/of.it-1": "front=1"})
        await agent.power.stop(user, "b", 0.0)

        def names(**wanted: object) -> list[str]:
            return [vm.name for vm in agent.vms(user, Wanted(**wanted))]  # type: ignore[arg-type]  # said once

        assert names(labels=(("tier", None),)) == ["a", "b"]
        assert names(labels=(("tier", "front"),)) == ["a"]
        assert names(labels=(("tier", "front"), ("site", None))) == ["a"]
        assert names(labels=(("tier", "front"), ("site", "y"))) == []
        assert names(labels=(("tier/of.it-1", "front=1"),)) == ["c"]
        assert names(states=frozenset({VmState.STOPPED})) == ["b"]
        assert names(states=frozenset({VmState.STOPPED, VmState.RUNNING})) == ["a", "b", "c"]


async def test_pages_meet_everything_once_whatever_comes_and_goes_between_them(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        ids = [(await freeze(agent, user)).id for _ in range(5)]
        first = agent.checkpoints.of(user, "web", Wanted(limit=2))
        assert [c.id for c in first] == ids[:2]
        await agent.checkpoints.delete(user, first[-1])  # the very one where the page ends
        await agent.checkpoints.delete(user, first[0])
        late = (await freeze(agent, user)).id
        second = agent.checkpoints.of(user, "web", Wanted(limit=2, after=position_of(first[-1])))
        assert [c.id for c in second] == ids[2:4]
        third = agent.checkpoints.of(user, "web", Wanted(limit=9, after=position_of(second[-1])))
        assert [c.id for c in third] == [ids[4], late]


async def test_checkpoints_of_all_vms_also_of_those_that_are_gone_and_of_nobody_else(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        other, _ = await agent.users.add("other")
        await make(agent, user)
        await make(agent, other)
        one, _theirs = await freeze(agent, user), await freeze(agent, other)
        await agent.destroy_vm(user, "web")
        assert agent.checkpoints.all(user) == [one]
        assert agent.checkpoints.one(user, "web", one.id) == one
        for who, name in ((other, "web"), (user, "www")):
            with pytest.raises(NotFound):
                agent.checkpoints.one(who, name, one.id)


# --- deleting --------------------------------------------------------------------------------------------------------


async def test_a_deleted_checkpoint_frees_what_it_says_it_occupies_and_what_came_from_it_lives_on(
    data_dir: Path,
) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await said(agent, user, "web", "echo memory > /dev/shm/word; echo disk > /root/word; sync")
        checkpoint = await freeze(agent, user)
        directory = agent.services.layout.checkpoint(user.id, checkpoint.id)
        manifest = manifests.read(directory)
        usage = await agent.services.storage.usage(manifest.disk(directory))
        others = sum((directory / name).stat().st_blocks * 512 for name in ("memory", "state"))
        before = bytes_below(data_dir / "storage")
        gone = await agent.checkpoints.delete(user, checkpoint)
        assert gone.timings.keys() == {"unlist", "withdraw"}
        freed = before - bytes_below(data_dir / "storage")
        assert freed >= usage.unique_bytes + others > 0
        assert not directory.exists()
        assert agent.checkpoints.all(user) == []
        with pytest.raises(NotFound):
            await agent.checkpoints.delete(user, checkpoint)
        with pytest.raises(NotFound):
            await agent.restore_vm(user, "web", checkpoint.id, "copy")

        again = await freeze(agent, user)
        await agent.restore_vm(user, "web", again.id, "copy")
        await agent.checkpoints.delete(user, again)
        assert await said(agent, user, "copy", "cat /dev/shm/word /root/word") == "memory\ndisk"
        of_copy = await freeze(agent, user, "copy")
        assert of_copy.parent == again.id
        await agent.restore_vm(user, "copy", of_copy.id, "third")
        assert await said(agent, user, "third", "cat /dev/shm/word /root/word") == "memory\ndisk"


async def test_a_checkpoint_is_not_deleted_while_it_is_restored_nor_restored_while_it_is_deleted(
    data_dir: Path,
) -> None:
    faults, go_on = Faults(), trio.Event()

    async def wait(_: int | None) -> None:
        await go_on.wait()

    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        checkpoint = await freeze(agent, user)
        faults.arm("restore", wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.restore_vm, user, "web", checkpoint.id, "copy")
            await faults.reached("restore")
            with pytest.raises(Busy, match=rf"checkpoint '{checkpoint.id}' is busy with vm\.fork"):
                await agent.checkpoints.delete(user, checkpoint)
            go_on.set()
        assert agent.checkpoints.all(user) == [checkpoint]  # the refusal took nothing away
        failures: list[str] = []

        async def attempt(what: str, act: Callable[[], Awaitable[object]]) -> None:
            try:
                await act()
            except (Busy, NotFound):
                failures.append(what)

        async with trio.open_nursery() as nursery:  # whoever is first; never both, never neither
            nursery.start_soon(attempt, "delete", partial(agent.checkpoints.delete, user, checkpoint))
            nursery.start_soon(attempt, "restore", partial(agent.restore_vm, user, "web", checkpoint.id, "late"))
        assert len(failures) == 1
        assert any(vm.name == "late" for vm in agent.vms(user)) is (failures == ["delete"])
        assert len(agent.checkpoints.all(user)) == (1 if failures == ["delete"] else 0)


async def test_a_damaged_checkpoint_and_one_without_files_can_be_deleted_and_relabelled(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        damaged, empty = await freeze(agent, user), await freeze(agent, user)
        (agent.services.layout.checkpoint(user.id, damaged.id) / "manifest.json").write_text("{")
        shutil.rmtree(agent.services.layout.checkpoint(user.id, empty.id))
        for checkpoint in (damaged, empty):
            changed = await agent.checkpoints.change(user, checkpoint, label="bad")
            assert changed.checkpoint is not None
            assert changed.checkpoint.label == "bad"
            await agent.checkpoints.delete(user, checkpoint)
        assert agent.checkpoints.all(user) == []
        assert list(agent.services.layout.checkpoint(user.id, "x").parent.iterdir()) == []
