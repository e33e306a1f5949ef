"""What a VMM and its exec backend promise about processes in a guest.

Part of `noid.testing.vmm_conformance`.
"""

# ruff: noqa: D102, S108  # the names are the documentation; paths are the guest's
from __future__ import annotations

import os
import signal

import pytest
import trio
import trio.testing

from noid.core.backends import Guest, GuestConnection
from noid.core.guests.console import open_console
from noid.core.model.connections import ConnectRequest
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest
from noid.errors import DependencyDown, InvalidRequest, NoidError, Unreachable
from noid.testing.pace import slowness
from noid.testing.vmm_rig import ANSWER_SECS, VmmRig, read_count, run

BOUND_SECS = 10.0 * slowness()


class GuestSpecification:
    """Processes in a guest."""

    async def test_a_command_tells_its_status_and_its_two_outputs_apart(self, rig: VmmRig) -> None:
        finished = await rig.run(await rig.fresh(), "sh", "-c", "echo out; echo err >&2; exit 3")

        assert (finished.status, finished.stdout, finished.stderr) == (3, b"out\n", b"err\n")

    async def test_arguments_arrive_as_they_were_given(self, rig: VmmRig) -> None:
        finished = await rig.run(await rig.fresh(), "echo", "two words", "$HOME", "*", "'", "ünï", "a\nb")

        assert finished.stdout.decode() == "two words $HOME * ' ünï a\nb\n"

    async def test_a_process_gets_its_environment_directory_and_user(self, rig: VmmRig) -> None:
        async with rig.guest(await rig.fresh()) as guest:
            assert (
                b"\nGREETING=hello world\n" in b"\n" + (await run(guest, "env", env={"GREETING": "hello world"})).stdout
            )
            assert (await run(guest, "pwd", cwd="/etc")).stdout == b"/etc\n"
            assert (await run(guest, "id", "-un", user="noid")).stdout == b"noid\n"

    async def test_what_cannot_be_entered_or_become_is_an_invalid_request(self, rig: VmmRig) -> None:
        async with rig.guest(await rig.fresh()) as guest:
            with pytest.raises(InvalidRequest):
                await guest.start(ExecRequest(argv=("true",), user="nobody-of-that-name"))
            with pytest.raises(InvalidRequest):
                await guest.start(ExecRequest(argv=("true",), cwd="/no/such/directory"))
            assert (await run(guest, "true")).status == 0

    async def test_a_program_that_does_not_exist_exits_with_127(self, rig: VmmRig) -> None:
        finished = await rig.run(await rig.fresh(), "/no/such/program")

        assert (finished.end.code, finished.stdout) == (127, b"")

    async def test_stdin_reaches_the_process_whole_and_ends(self, rig: VmmRig) -> None:
        sent = os.urandom(300_000)

        async with rig.guest(await rig.fresh()) as guest:
            assert (await run(guest, "cat", stdin=sent)).stdout == sent
            assert (await run(guest, "cat")).stdout == b""

    async def test_a_signal_ends_a_process_and_is_reported(self, rig: VmmRig) -> None:
        async with rig.guest(await rig.fresh()) as guest:
            process = await guest.start(ExecRequest(argv=("sleep", "1000")))
            await process.signal(signal.SIGTERM)

            with trio.fail_after(ANSWER_SECS):
                end = await process.receive()

            assert isinstance(end, ProcessExit)
            assert (end.signal, end.status) == (signal.SIGTERM, 128 + signal.SIGTERM)
            assert await process.receive() == end
            await process.signal(signal.SIGTERM)
            await guest.release(process)
            assert (await run(guest, "true")).status == 0

    @pytest.mark.parametrize("ignore_term", [False, True], ids=["obedient", "stubborn"])
    async def test_releasing_a_process_ends_it(self, rig: VmmRig, ignore_term: bool) -> None:
        running = await rig.fresh()
        await rig.start_counter(running, "/dev/shm/witness")
        async with rig.guest(running) as guest:
            process = await guest.start(ExecRequest(argv=rig.counter("/dev/shm/victim", ignore_term)))
            while not await read_count(guest, "/dev/shm/victim"):
                await run(guest, "sleep", "0.05")

            with trio.fail_after(ANSWER_SECS):
                await guest.release(process)

            at_release = await read_count(guest, "/dev/shm/victim")
        await rig.count_beyond(running, "/dev/shm/witness", await rig.count(running, "/dev/shm/witness") + 5)
        assert await rig.count(running, "/dev/shm/victim") <= at_release + 1

    async def test_output_that_nobody_reads_stops_its_process_and_no_other(self, rig: VmmRig) -> None:
        async with rig.guest(await rig.fresh()) as guest:
            flood = await guest.start(ExecRequest(argv=("yes",)))
            for _ in range(5):
                assert (await run(guest, "echo", "through")).stdout == b"through\n"

            for _ in range(3):
                said = await flood.receive()
                assert isinstance(said, OutputChunk)
                assert set(said.data) <= set(b"y\n")
            await guest.release(flood)
            assert (await run(guest, "true")).status == 0

    async def test_a_connection_carries_bytes_both_ways_to_their_ends(self, rig: VmmRig) -> None:
        sent = os.urandom(300_000)
        async with rig.guest(await rig.fresh()) as guest:
            connection = await self._echo(rig, guest)
            received = bytearray()
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await connection.send_all(sent)
                    await connection.send_eof()

                nursery.start_soon(send)
                while data := await connection.receive_some():
                    received += data
            assert bytes(received) == sent
            await connection.wait_closed()
            assert await connection.receive_some() == b""
            await connection.aclose()
            await connection.aclose()

    async def test_where_nothing_listens_is_unreachable_and_costs_nobody_anything(self, rig: VmmRig) -> None:
        async with rig.guest(await rig.fresh()) as guest:
            self._require_ports(guest)
            with pytest.raises(Unreachable):
                await guest.connect(ConnectRequest(port=1))
            assert (await run(guest, "true")).status == 0

    async def test_connections_end_with_the_machine_and_with_who_holds_them(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with rig.guest(running) as guest:
            left, held = await self._echo(rig, guest), await self._echo(rig, guest)
            await left.send_all(b"?")
            await left.aclose()
            assert all(not process.label for process in await guest.processes())
            await held.send_all(b"!")
            assert await held.receive_some() == b"!"
            await running.machine.kill()
            with trio.fail_after(BOUND_SECS), pytest.raises(DependencyDown):
                await held.receive_some()
            await held.aclose()

    async def test_a_connection_that_nobody_reads_stops_its_server_and_no_other(self, rig: VmmRig) -> None:
        async with rig.guest(await rig.fresh()) as guest:
            connection = await self._echo(rig, guest)
            with trio.move_on_after(0.4) as scope:
                await connection.send_all(bytes(32 << 20))
            assert scope.cancelled_caught, "everything was taken, and nothing of it received"
            assert (await run(guest, "echo", "through")).stdout == b"through\n"
            await connection.aclose()
            assert (await run(guest, "true")).status == 0

    async def _echo(self, rig: VmmRig, guest: Guest) -> GuestConnection:
        """Connect to the guest's port 7, once something listens there."""
        self._require_ports(guest)
        if not any(process.running for process in await guest.processes()):
            await guest.start(ExecRequest(argv=rig.echo))
        with trio.fail_after(ANSWER_SECS):
            while True:
                try:
                    return await guest.connect(ConnectRequest(port=7))
                except Unreachable:
                    await run(guest, "sleep", "0.05")

    @staticmethod
    def _require_ports(guest: Guest) -> None:
        if "ports" not in guest.features:
            pytest.skip("this way into a guest makes no connections")

    async def test_processes_go_on_when_the_connection_ends(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await rig.start_counter(running, "/run/n")

        await rig.count_beyond(running, "/run/n", await rig.count(running, "/run/n") + 2)

    async def test_a_second_connection_waits_for_the_first_to_end_and_disturbs_nobody(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with rig.guest(running) as guest:
            with trio.move_on_after(0.5) as scope:
                try:
                    async with (
                        open_console(running.machine, running.plan.directory) as console,
                        rig.exec_backend.connect(running.machine, console),
                    ):
                        pytest.fail("two hosts talk to one guest at the same time")
                except NoidError:  # to refuse it is as good as to let it wait
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert scope.cancelled_caught
            assert (await run(guest, "true")).status == 0

        assert (await rig.run(running, "true")).status == 0

    async def test_everybody_who_waits_learns_that_the_machine_is_gone(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with rig.guest(running) as guest:
            process = await guest.start(ExecRequest(argv=("sleep", "1000")))
            await running.machine.kill()

            with trio.fail_after(BOUND_SECS):
                with pytest.raises(DependencyDown):
                    await process.receive()
                with pytest.raises(DependencyDown):
                    await guest.start(ExecRequest(argv=("true",)))
                with pytest.raises(DependencyDown):
                    await guest.ping()
        with trio.fail_after(BOUND_SECS), pytest.raises(DependencyDown):
            await running.machine.channel()
