"""What a VMM promises about starting: that it does, and that nothing is left when it does not.

Part of `noid.testing.vmm_conformance`.
"""

# ruff: noqa: D102, ASYNC240  # the names are the documentation; paths are the guest's; tests may block
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from noid.errors import BackendError
from noid.testing.vmm_rig import ANSWER_SECS, VmmRig, run

BOUND_SECS = 10.0


class LaunchSpecification:
    """Starting, and not starting."""

    async def test_a_launched_machine_boots_until_its_agent_answers(self, rig: VmmRig) -> None:
        booted = await rig.launch()

        async with rig.guest(booted) as guest:
            assert await guest.ping() < BOUND_SECS
            assert (await run(guest, "true")).status == 0

    async def test_the_process_says_which_instance_of_which_data_directory_it_is(self, rig: VmmRig) -> None:
        running = await rig.fresh()

        entries = Path(f"/proc/{running.machine.ref.pid}/environ").read_bytes().split(b"\0")

        assert f"NOID_INSTANCE={running.plan.instance}".encode() in entries
        assert b"NOID_DATA_DIR=" + os.fsencode(rig.data_dir) in entries

    async def test_a_kernel_that_is_no_kernel_is_refused_and_leaves_no_process(self, rig: VmmRig) -> None:
        plan = await rig.launch_plan()
        junk = rig.data_dir / "junk"
        junk.write_bytes(b"this is no kernel " * 4096)

        with pytest.raises(BackendError):
            await rig.launch(dataclasses.replace(plan, kernel=junk))

        assert rig.processes() == {}

    async def test_a_missing_disk_is_refused_and_leaves_no_process(self, rig: VmmRig) -> None:
        plan = await rig.launch_plan()
        plan.volume.path.unlink()

        with pytest.raises(BackendError):
            await rig.launch(plan)

        assert rig.processes() == {}

    async def test_a_device_state_cut_short_is_refused_and_leaves_no_process(self, rig: VmmRig) -> None:
        taken = await rig.checkpoint(source := await rig.fresh())
        await source.machine.kill()
        os.truncate(taken.directory / "state", (taken.directory / "state").stat().st_size // 2)

        with trio.fail_after(ANSWER_SECS), pytest.raises(BackendError):
            await rig.clone(taken)

        assert rig.processes() == {}

    @pytest.mark.parametrize("at_secs", [0.0, 0.002, 0.01, 0.03, 0.1])
    async def test_cancelling_a_launch_leaves_no_process(self, rig: VmmRig, at_secs: float) -> None:
        plan = await rig.launch_plan()

        running = None
        with trio.move_on_after(at_secs) as scope:
            running = await rig.launch(plan)
        if running is not None:
            await running.machine.kill()

        assert rig.processes() == {}, f"cancelled: {scope.cancelled_caught}"

    @pytest.mark.parametrize("at_secs", [0.0, 0.002, 0.01, 0.03, 0.1])
    async def test_cancelling_a_restore_leaves_no_process(self, rig: VmmRig, at_secs: float) -> None:
        taken = await rig.checkpoint(source := await rig.fresh())
        await source.machine.kill()
        plan = await rig.restore_plan(taken)

        machine = None
        with trio.move_on_after(at_secs) as scope:
            machine = await rig.vmm.restore(plan)
        if machine is not None:
            await machine.kill()
            await machine.aclose()

        assert rig.processes() == {}, f"cancelled: {scope.cancelled_caught}"

    async def test_two_machines_cannot_write_one_disk(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        plan = await rig.launch_plan()

        with trio.fail_after(ANSWER_SECS), pytest.raises(BackendError):
            await rig.launch(dataclasses.replace(plan, volume=running.plan.volume))

        assert set(rig.processes()) == {running.machine.ref.pid}
        assert (await rig.run(running, "true")).status == 0

    async def test_the_fingerprint_is_text_and_stays_the_same(self, rig: VmmRig) -> None:
        fingerprint = dict(rig.vmm.fingerprint())

        assert fingerprint
        assert all(isinstance(text, str) for pair in fingerprint.items() for text in pair)
        assert dict(rig.vmm.fingerprint()) == fingerprint
