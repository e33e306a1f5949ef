"""What a VMM promises about the serial console: everything is in the log, and only who is connected can hold it up.

Part of `noid.testing.vmm_conformance`.
"""

# ruff: noqa: D102  # the names are the documentation
from __future__ import annotations

import pytest
import trio

from noid.core.backends import ConsoleListener
from noid.core.console import Console, open_console
from noid.errors import BackendError, Conflict, DependencyDown
from noid.testing.vmm_rig import VmmRig, run

BOUND_SECS = 60.0
FLOOD_BYTES = 1 << 18


class ConsoleSpecification:
    """The serial console."""

    async def test_what_is_typed_runs_and_what_is_printed_is_heard_and_kept(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            await console.write(b"echo typed\r")
            heard = await heard_until(listener, b"\ntyped\r\n")
        assert heard in (running.plan.directory / "serial.log").read_bytes()

    async def test_a_guest_prints_on_while_nobody_is_connected(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console:
            await console.write(b"yes\r")
            await grown(console, 1000)
        async with open_console(running.machine, running.plan.directory) as console:
            await grown(console, FLOOD_BYTES)
            async with rig.guest(running) as guest:
                assert (await run(guest, "true")).status == 0

    async def test_who_listens_and_types_but_does_not_read_holds_nobody_up(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with open_console(running.machine, running.plan.directory) as console, console.listen() as listener:
            await console.write(b"yes\r")
            await grown(console, FLOOD_BYTES)
            await console.write(b"\x03")
            await heard_until(listener, b"^C")

    async def test_a_guest_whose_output_a_dead_agent_did_not_take_goes_on(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        line = await running.machine.console()
        await line.send_all(b"yes\r")  # and nobody drains it: as an agent does that was stopped, and then killed
        async with open_console(running.machine, running.plan.directory) as console:
            await grown(console, 100)
            await line.aclose()
            await grown(console, FLOOD_BYTES)

    async def test_a_second_connection_is_refused_and_a_closed_one_frees_the_place(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        first = await running.machine.console()
        with trio.fail_after(BOUND_SECS), pytest.raises(Conflict, match="in use"):
            await running.machine.console()
        await first.aclose()
        with trio.fail_after(BOUND_SECS):
            await (await running.machine.console()).aclose()

    async def test_an_adopted_machine_gives_its_console_again(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.console()  # never closed, never read: its agent was killed
        adopted = await rig.adopt(running)
        async with open_console(adopted.machine, adopted.plan.directory) as console, console.listen() as listener:
            with trio.fail_after(BOUND_SECS):
                await console.write(b"\x15echo again\r")
            await heard_until(listener, b"\nagain\r\n")

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
