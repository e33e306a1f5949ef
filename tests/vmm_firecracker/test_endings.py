"""Why a machine ended is read from the last line of its console, and a guest that only says so is left alone."""

from __future__ import annotations

import pytest
import trio
from noid_vmm_firecracker.endings import ending, says_halted

from noid.testing.vmm_rig import VmmRig


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"[ 9.1] reboot: Restarting system\r\n", "reset"),
        (b"reboot: Restarting system\r\n# ", "unknown"),
        (b"Kernel panic - not syncing: no init\r\nRebooting in 1 s\r\nreboot: Restarting system\r\n", "unknown"),
        (b"", "unknown"),
    ],
)
def test_the_last_words_tell_why(said: bytes, reason: str) -> None:
    assert ending(said, killed=False, how="exit status 0").reason == reason
    assert ending(said, killed=True, how="exit status 0").reason == "killed"


def test_a_panic_is_quoted() -> None:
    said = b"Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"
    assert "VFS: Unable to mount root fs" in ending(said, killed=False, how="exit status 0").detail


def test_only_the_last_line_counts() -> None:
    assert says_halted(b"[ 9.1] reboot: System halted\r\n")
    assert says_halted(b"reboot: Power off not available: System halted instead\r\n")
    assert not says_halted(b"reboot: System halted\r\n# ")


async def test_a_guest_that_says_it_has_halted_and_runs_on_is_left_alone(rig: VmmRig) -> None:
    running = await rig.launch()
    with (running.plan.directory / "serial.log").open("ab") as log:
        log.write(b"\r\nreboot: System halted\r\n")

    with trio.move_on_after(3.5) as scope:
        await running.machine.wait()

    assert scope.cancelled_caught
    assert (await rig.run(running, "true")).status == 0


async def test_a_guest_that_switches_itself_off_is_found_by_whoever_still_waits(rig: VmmRig) -> None:
    running = await rig.launch()
    with trio.move_on_after(1.5):
        await running.machine.wait()  # looked after it, and was cancelled
    async with rig.guest(running) as guest:
        await guest.power_off()
    ends = []

    async def wait() -> None:
        ends.append((await running.machine.wait()).reason)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)

    assert ends == ["shutdown", "shutdown"]
