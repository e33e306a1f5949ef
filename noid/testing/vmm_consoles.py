"""What a VMM promises about the serial console: all of it is in the log, once, and nobody can hold up the guest.

Part of `noid.testing.vmm_conformance`.
"""

# ruff: noqa: D102  # the names are the documentation
from __future__ import annotations

import pytest
import trio

from noid.core.backends import ConsoleListener
from noid.core.guests.console import Console, open_console
from noid.errors import BackendError, DependencyDown
from noid.testing.pace import slowness
from noid.testing.vmm_rig import VmmRig, run

BOUND_SECS = 60.0 * slowness()
FLOOD_BYTES = 1 << (17 if slowness() < 2 else 12)
"""More than pipes and sockets hold; where each byte costs a guest of a guest milliseconds, what it can print at all."""
UNREAD_BYTES_MAX = 1 << 17


class ConsoleSpecification:
    """The serial console."""

    async def test_what_is_typed_runs_and_what_is_printed_is_heard_and_kept(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            await console.write(b"echo typed\r")
            heard = await heard_until(listener, b"\ntyped\r\n")
        assert heard in (running.plan.directory / "serial.log").read_bytes()

    async def test_every_byte_is_printed_once_however_many_type_and_nobody_reads(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            await console.write(b"yes\r")
            await grown(console, 1000)
            async with await running.machine.console() as first, await running.machine.console() as second:
                await first.send_all(b"w")  # both are echoed in the middle of what is printed
                await second.send_all(b"\x7f")
                await grown(console, FLOOD_BYTES)
                await console.write(b"\x03")
            heard = await heard_until(listener, b"^C")
        log = (running.plan.directory / "serial.log").read_bytes()
        begins = log.rindex(b"yes\r\n") + len(b"yes\r\n")
        printed = log[begins : log.index(b"^C", begins)]
        assert heard in log
        assert printed.replace(b"w", b"").replace(b"\b \b", b"") == (b"y\r\n" * len(printed))[: printed.count(b"y") * 3]

    async def test_a_guest_prints_on_while_nobody_is_there(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console:
            await console.write(b"yes\r")
            await grown(console, 1000)
        async with open_console(running.machine, running.plan.directory) as console:
            await grown(console, FLOOD_BYTES)
            async with rig.guest(running) as guest:
                assert (await run(guest, "true")).status == 0

    async def test_an_adopted_machine_has_its_console_whatever_became_of_who_typed_before(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        left = await running.machine.console()  # never closed: its agent was stopped, or is about to be killed
        await left.send_all(b"echo ag")
        adopted = await rig.adopt(running)
        async with open_console(adopted.machine, adopted.plan.directory) as console, console.listen() as listener:
            with trio.fail_after(BOUND_SECS):
                await console.write(b"ain\r")
            await heard_until(listener, b"\nagain\r\n")
            await left.aclose()
            await console.write(b"echo and again\r")
            await heard_until(listener, b"\nand again\r\n")

    async def test_who_types_what_nobody_reads_waits_and_can_be_cancelled(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.pause()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            with trio.move_on_after(0.5) as waited:
                await console.write(b"\x15" * UNREAD_BYTES_MAX)
            assert waited.cancelled_caught
            await running.machine.resume()
            with trio.fail_after(BOUND_SECS):
                await console.write(b"\x15echo after\r")
            await heard_until(listener, b"\nafter\r\n")

    async def test_input_that_a_paused_guest_has_not_read_waits_for_it(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            await running.machine.pause()
            await console.write(b"echo later\r")
            await running.machine.resume()
            await heard_until(listener, b"\nlater\r\n")

    async def test_a_dead_machines_console_ends_its_listeners_and_refuses_its_writers(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            await console.write(b"\r")
            await running.machine.kill()
            with trio.fail_after(BOUND_SECS):
                with pytest.raises(DependencyDown):
                    await write_until_refused(console)
                console.end()
                while await listener.receive_some():
                    pass


async def heard_until(listener: ConsoleListener, wanted: bytes) -> bytes:
    """Listen until *wanted* was printed, and return all that was until then."""
    heard = bytearray()
    with trio.fail_after(BOUND_SECS):
        while wanted not in heard:
            said = await listener.receive_some()
            if not said:
                raise BackendError(f"the console ended without saying {wanted!r}; it said {bytes(heard)!r}")
            heard += said
    return bytes(heard)


async def grown(console: Console, more_bytes: int) -> None:
    """Wait until the guest has printed *more_bytes* from now on."""
    with trio.fail_after(BOUND_SECS), console.log.changes() as changes:
        wanted = (await console.log.extent()).end + more_bytes
        seen = changes.count
        while (await console.log.extent()).end < wanted:
            await changes.beyond(seen)
            seen = changes.count


async def write_until_refused(console: Console) -> None:
    """Type for ever: what is sent to a machine that is just dying may be taken yet."""
    while True:
        await console.write(b"\r")
