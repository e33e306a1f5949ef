"""What a VMM promises about pausing and ending machines, and about their change of hands.

Part of `noid.testing.vmm_conformance`.
"""

# ruff: noqa: D102, S108  # the names are the documentation; paths are the guest's
from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time

import pytest
import trio
import trio.testing

from noid.errors import DependencyDown, NoidError, NotFound, Unsupported
from noid.testing.pace import slowness
from noid.testing.vmm_rig import ANSWER_SECS, VmmRig, ticks_within

PAUSE_SECS = 0.5
BOUND_SECS = 10.0 * slowness()


class LifeSpecification:
    """Pausing, ending, and changing hands."""

    async def test_pause_stops_the_guest_and_resume_continues_it_however_often_they_are_said(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await rig.start_counter(running, "/dev/shm/n")
        began = time.monotonic()
        before = await rig.count(running, "/dev/shm/n")

        await running.machine.pause()
        await running.machine.pause()
        await trio.sleep(PAUSE_SECS)  # what is measured, not waited for: the guest must miss this time
        await running.machine.resume()
        await running.machine.resume()

        after = await rig.count(running, "/dev/shm/n")
        assert after - before <= ticks_within(time.monotonic() - began - PAUSE_SECS)
        await rig.count_beyond(running, "/dev/shm/n", after)

    async def test_a_guest_that_powers_off_is_reported_as_shut_down(self, rig: VmmRig) -> None:
        running = await rig.fresh()

        async with rig.guest(running) as guest:
            await guest.power_off()
            with trio.fail_after(ANSWER_SECS):
                end = await running.machine.wait()

        assert end.reason == "shutdown"
        assert rig.processes() == {}

    async def test_a_guest_that_reboots_is_reported_as_reset(self, rig: VmmRig) -> None:
        running = await rig.fresh()

        async with rig.guest(running) as guest:
            await guest.reboot()
            with trio.fail_after(ANSWER_SECS):
                end = await running.machine.wait()

        assert end.reason == "reset"
        assert rig.processes() == {}

    async def test_kill_ends_the_process_at_once_and_again_does_nothing(self, rig: VmmRig) -> None:
        running = await rig.fresh()

        async with trio.open_nursery() as nursery:
            ends = []

            async def wait() -> None:
                ends.append(await running.machine.wait())

            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await running.machine.kill()
            await running.machine.kill()

        assert [end.reason for end in ends] == ["killed"] * 3
        assert (await running.machine.wait()).reason == "killed"
        assert rig.processes() == {}

    async def test_the_power_button_hurts_no_guest_that_does_not_listen(self, rig: VmmRig) -> None:
        running = await rig.fresh()

        with contextlib.suppress(Unsupported):  # to have no button is as good as one that nobody hears
            await running.machine.press_power_button()

        with trio.fail_after(ANSWER_SECS):
            try:
                async with rig.guest(running) as guest:
                    await guest.ping()
            except DependencyDown:  # it has listened
                assert (await running.machine.wait()).reason == "shutdown"

    async def test_a_paused_machine_can_be_killed(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.pause()

        with trio.fail_after(BOUND_SECS):
            await running.machine.kill()

        assert rig.processes() == {}

    async def test_a_machine_that_is_killed_from_outside_is_noticed(self, rig: VmmRig) -> None:
        running = await rig.fresh()

        os.kill(running.machine.ref.pid, signal.SIGKILL)
        with trio.fail_after(BOUND_SECS):
            end = await running.machine.wait()

        assert end.reason in ("killed", "unknown")
        with trio.fail_after(BOUND_SECS), pytest.raises(NoidError):
            await running.machine.pause()

    async def test_the_next_agent_adopts_a_machine_as_it_is(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await rig.start_counter(running, "/dev/shm/n")
        before = await rig.count(running, "/dev/shm/n")

        adopted = await rig.adopt(running)

        assert adopted.machine.ref == running.machine.ref
        await rig.count_beyond(adopted, "/dev/shm/n", before)
        clone = await rig.clone(await rig.checkpoint(adopted))
        await rig.count_beyond(clone, "/dev/shm/n", before)
        await adopted.machine.kill()
        assert (await adopted.machine.wait()).reason == "killed"

    async def test_a_machine_adopted_while_paused_can_be_resumed(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.pause()

        adopted = await rig.adopt(running)
        await adopted.machine.resume()

        assert (await rig.run(adopted, "true")).status == 0

    async def test_a_dead_process_or_another_with_its_pid_is_not_adopted(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        other = dataclasses.replace(running.machine.ref, start_ticks=running.machine.ref.start_ticks + 1)
        with pytest.raises(NotFound):
            await rig.vmm.adopt(other, running.plan, running.memory)
        assert (await rig.run(running, "true")).status == 0

        await running.machine.kill()
        with pytest.raises(NotFound):
            await rig.vmm.adopt(running.machine.ref, running.plan, running.memory)

    async def test_a_process_that_lives_but_does_not_answer_is_not_waited_for(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.aclose()
        os.kill(running.machine.ref.pid, signal.SIGSTOP)
        try:
            with trio.fail_after(3 * BOUND_SECS), pytest.raises(DependencyDown):
                await rig.vmm.adopt(running.machine.ref, running.plan, running.memory)
        finally:
            os.kill(running.machine.ref.pid, signal.SIGCONT)

        adopted = await rig.adopt(running)
        assert (await rig.run(adopted, "true")).status == 0
