"""Golden templates: built once for each shape, never used when stale or damaged, kept while they may be needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from noid.core.images import Images
from noid.errors import BackendError
from noid.hookspecs import hookimpl
from noid.testing.faults import fail
from noid.testing.simulated_agent import give_default_image

Rig = Any  # see conftest.py


def templates(rig: Rig) -> set[str]:
    return {path.name for path in rig.layout.golden.iterdir()} if rig.layout.golden.is_dir() else set()


def booted(rig: Rig) -> int:
    return int(rig.faults.calls["launch"])


async def test_the_first_create_of_a_shape_boots_and_later_ones_do_not(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
        await noid.create("b")
        assert booted(rig) == 1
        await noid.create("c", mem_mib=256)
        await noid.create("d", cpus=2)
        assert booted(rig) == 3
    async with rig.agent() as noid:
        await noid.create("e")
        assert booted(rig) == 3
        assert len(templates(rig)) == 3


async def test_a_changed_image_is_booted_anew_and_the_old_template_goes_at_the_next_start(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
        old = templates(rig)
        Images(rig.layout.images, {}).remove("default")
        give_default_image(rig.data_dir, cmdline="quiet")
        await noid.create("b")
        assert booted(rig) == 2
        assert await noid.sh("hostname", name="a") == "a", "the VM made from the old one lives on"
    async with rig.agent():
        assert len(templates(rig)) == 1
        assert not templates(rig) & old


async def test_another_vmm_boots_anew(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
    async with rig.agent(plugin={"version": "2"}) as noid:
        assert templates(rig) == set()
        await noid.create("b")
        assert booted(rig) == 2


async def test_other_kernel_arguments_of_a_plugin_boot_anew_and_the_stale_template_goes(rig: Rig) -> None:
    class Arguments:
        @hookimpl
        def boot_args(self) -> list[str]:
            return ["mitigations=off"]

    async with rig.agent() as noid:
        await noid.create("a")
        noid.agent.services.plugins._manager.register(Arguments())
        await noid.create("b")
        assert booted(rig) == 2
        assert len(templates(rig)) == 2
    async with rig.agent():
        assert len(templates(rig)) == 1


async def test_an_image_that_cannot_be_read_costs_no_template(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
    kept = templates(rig)
    kernel = rig.layout.images / "default" / "kernel"
    content = kernel.read_bytes()
    kernel.unlink()
    async with rig.agent():
        assert templates(rig) == kept
    kernel.write_bytes(content)
    async with rig.agent() as noid:
        await noid.create("b")
        assert booted(rig) == 1


@pytest.mark.parametrize("name", ["memory", "manifest.json", "state"])
async def test_a_damaged_template_is_not_used_but_made_again(rig: Rig, name: str) -> None:
    async with rig.agent() as noid:
        await noid.create("a")
        (template,) = rig.layout.golden.iterdir()
        damage(template / name)
        await noid.create("b")
        assert booted(rig) == 2
        assert await noid.sh("hostname", name="b") == "b"


def damage(path: Path) -> None:
    """Replace the file: the VMs made from it hold the old one."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-2])


@pytest.mark.parametrize("call", ["launch", "start", "capture", "capture.finish"])
async def test_a_failed_build_leaves_nothing_and_the_next_create_builds(rig: Rig, call: str) -> None:
    async with rig.agent() as noid:
        rig.faults.arm(call, fail(BackendError("no")))
        with pytest.raises(BackendError, match="no"):
            await noid.create()
        assert (templates(rig), rig.machines(), rig.stray()) == (set(), 0, [])
        await noid.create()


async def test_a_builder_that_fails_hands_over_to_those_who_wait(rig: Rig) -> None:
    failed: list[str] = []

    async def create(noid: Any, name: str) -> None:
        try:
            await noid.create(name)
        except BackendError:
            failed.append(name)

    async with rig.agent() as noid:
        rig.faults.arm("launch", fail(BackendError("no")))
        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c"):
                nursery.start_soon(create, noid, name)
        assert len(failed) == 1
        assert len(noid.states()) == 2
        assert booted(rig) == 2
