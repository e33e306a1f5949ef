"""The executable specification of a VMM: subclass `VmmConformance`, give it a ``rig`` fixture, and run pytest.

::

    class TestMyVmm(VmmConformance):
        @pytest.fixture
        async def rig(self, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VmmRig]:
            rig = VmmRig(vmm=MyVmm(), exec_backend=..., storage=..., image=..., data_dir=data_dir, shared=...)
            yield rig
            await rig.close()

Collected (``pytest --collect-only``) it is the list of what `VmmBackend`, `Machine`, `Capture` and `Guest` promise.
"""

# ruff: noqa: D102, S108, ASYNC240  # the names are the documentation; paths are the guest's; tests may block
from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from noid.core.model import ExecRequest, OutputChunk, ProcessExit
from noid.errors import BackendError, DependencyDown, InvalidRequest, NoidError, NoSpace, NotFound
from noid.testing.vmm_rig import ANSWER_SECS, Taken, VmmRig, identity, read_count, run, ticks_within

YEAR_SECS = 365 * 86400
PAUSE_SECS = 0.5
BOUND_SECS = 10.0


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with 64 KiB of room, of which a test fills as much as it likes with `fill`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "noid-test", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(directory: Path) -> None:
    """Leave no byte of room."""
    with (directory / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


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

    async def test_processes_go_on_when_the_connection_ends(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await rig.start_counter(running, "/run/n")

        await rig.count_beyond(running, "/run/n", await rig.count(running, "/run/n") + 2)

    async def test_a_second_connection_waits_for_the_first_to_end_and_disturbs_nobody(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        async with rig.guest(running) as guest:
            with trio.move_on_after(0.5) as scope:
                try:
                    async with rig.exec_backend.connect(running.machine):
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


class CheckpointSpecification:
    """Captures and clones."""

    async def test_a_capture_changes_nothing_for_its_source(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.start_counter(source, "/dev/shm/n")
        await rig.write(source, "/dev/shm/memory", "in memory")
        await rig.write(source, "/root/disk", "on disk")
        before = await rig.count(source, "/dev/shm/n")

        for _ in range(2):
            await rig.checkpoint(source)

        assert await rig.read(source, "/dev/shm/memory", "/root/disk") == "in memoryon disk"
        await rig.count_beyond(source, "/dev/shm/n", before)
        assert await source.machine.disk_path() == rig.volume(source).path

    async def test_a_clone_wakes_where_its_checkpoint_was_taken(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.start_counter(source, "/dev/shm/n")
        await rig.write(source, "/dev/shm/memory", "then")
        await rig.write(source, "/root/disk", "then")
        before = await rig.count(source, "/dev/shm/n")
        taken = await rig.checkpoint(source)
        after = await rig.count(source, "/dev/shm/n")
        await rig.write(source, "/dev/shm/memory", "later")
        await rig.write(source, "/root/disk", "later")
        await rig.count_beyond(source, "/dev/shm/n", after + 20)

        began = time.monotonic()
        clone = await rig.clone(taken)
        number = await rig.count(clone, "/dev/shm/n")

        assert before <= number <= after + ticks_within(time.monotonic() - began)
        assert await rig.read(clone, "/dev/shm/memory", "/root/disk") == "thenthen"
        await rig.count_beyond(clone, "/dev/shm/n", number)

    async def test_clones_and_their_source_do_not_see_each_other(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        taken = await rig.checkpoint(source)
        clones = []

        async def start() -> None:
            clones.append(await rig.clone(taken))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            nursery.start_soon(start)
        machines = [source, *clones]
        for number, machine in enumerate(machines):
            await rig.write(machine, "/dev/shm/own", f"memory {number}")
            await rig.write(machine, "/root/own", f"disk {number}")

        found = [await rig.read(machine, "/dev/shm/own", "/root/own") for machine in machines]
        assert found == ["memory 0disk 0", "memory 1disk 1", "memory 2disk 2"]

    async def test_nothing_that_happens_to_clones_touches_the_checkpoint(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        taken = await rig.checkpoint(source)
        files = [taken.directory / "memory", taken.directory / "state", taken.disk.path]
        before = [sha256(file) for file in files]

        clone = await rig.clone(taken)
        await rig.write(clone, "/dev/shm/own", "x" * 1000)
        await rig.write(clone, "/root/own", "x" * 1000)
        await rig.run(clone, "sync")
        await rig.checkpoint(clone)
        await clone.machine.kill()
        await source.machine.kill()

        assert [sha256(file) for file in files] == before

    async def test_children_of_children_know_all_that_went_before(self, rig: VmmRig) -> None:
        machine = await rig.fresh()
        await rig.start_counter(machine, "/dev/shm/n")
        for generation in range(3):
            await rig.write(machine, f"/dev/shm/memory{generation}", f"m{generation}")
            await rig.write(machine, f"/root/disk{generation}", f"d{generation}")
            number = await rig.count(machine, "/dev/shm/n")
            taken = await rig.checkpoint(machine)
            await machine.machine.kill()
            machine = await rig.clone(taken)
            await rig.count_beyond(machine, "/dev/shm/n", number)

        paths = [path for g in range(3) for path in (f"/dev/shm/memory{g}", f"/root/disk{g}")]
        assert await rig.read(machine, *paths) == "m0d0m1d1m2d2"

    async def test_a_checkpoint_can_be_deleted_while_its_clones_run(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.write(source, "/dev/shm/memory", "kept")
        taken = await rig.checkpoint(source)
        clone = await rig.clone(taken)

        for name in ("memory", "state"):
            (taken.directory / name).unlink()

        assert await rig.read(clone, "/dev/shm/memory") == "kept"
        again = await rig.clone(await rig.checkpoint(clone))
        assert await rig.read(again, "/dev/shm/memory") == "kept"

    async def test_waking_makes_each_clone_its_own_before_its_first_process(self, rig: VmmRig) -> None:
        taken = await rig.checkpoint(await rig.fresh())
        in_a_year_secs = int(time.time()) + YEAR_SECS
        uuids = set()
        for name in ("first", "second"):
            clone = await rig.clone(taken)
            who = identity(name, in_a_year_secs * 10**9)
            async with rig.guest(clone) as guest:
                woken = time.monotonic()
                receipt = await guest.wake(who)
                uuids.add((await run(guest, "cat", "/proc/sys/kernel/random/uuid")).stdout)
                now_secs = int((await run(guest, "date", "+%s")).stdout)
                names = (await run(guest, "cat", "/proc/sys/kernel/hostname", "/etc/machine-id")).stdout.decode()
            assert receipt.items
            assert receipt.complete, receipt
            assert 0 <= now_secs - in_a_year_secs <= time.monotonic() - woken + 1
            assert names.split() == [name, who.machine_id]
        assert len(uuids) == 2

    async def test_a_capture_is_finished_once(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        (into := rig.data_dir / "once").mkdir()
        await running.machine.pause()
        capture = await running.machine.capture(into)
        await running.machine.resume()
        await capture.finish()

        with pytest.raises(BackendError):
            await capture.finish()
        capture.discard()

        assert (into / "memory").exists()
        assert (into / "state").exists()

    async def test_a_capture_can_be_finished_after_its_machine_has_ended(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.write(source, "/dev/shm/memory", "last words")
        (into := rig.data_dir / "last").mkdir()
        (into / "disk").mkdir()
        prepared = await rig.storage.prepare_freeze(rig.volume(source), into / "disk")
        await source.machine.pause()
        capture = await source.machine.capture(into)
        disk = await rig.storage.freeze(prepared, source.machine)
        await source.machine.kill()
        await capture.finish()

        clone = await rig.clone(Taken(directory=into, disk=disk))
        assert await rig.read(clone, "/dev/shm/memory") == "last words"

    async def test_a_discarded_capture_leaves_the_machine_as_it_was(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        (into := rig.data_dir / "discarded").mkdir()
        await running.machine.pause()
        capture = await running.machine.capture(into)
        await running.machine.resume()

        capture.discard()
        capture.discard()

        assert not (into / "memory").exists()
        assert (await rig.run(running, "true")).status == 0
        await rig.checkpoint(running)

    async def test_a_capture_that_fails_leaves_a_machine_that_resumes_and_can_be_captured(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.pause()

        with pytest.raises(BackendError):
            await running.machine.capture(rig.data_dir / "missing")

        await running.machine.resume()
        assert (await rig.run(running, "true")).status == 0
        clone = await rig.clone(await rig.checkpoint(running))
        assert (await rig.run(clone, "true")).status == 0

    async def test_a_full_disk_fails_the_capture_and_nothing_else(self, rig: VmmRig, full_disk: Path) -> None:
        running = await rig.fresh()
        fill(full_disk)
        await running.machine.pause()

        with pytest.raises(NoSpace):
            await running.machine.capture(full_disk)

        await running.machine.resume()
        assert (await rig.run(running, "true")).status == 0
        await rig.checkpoint(running)

    async def test_a_disk_that_fills_up_fails_the_finish_and_nothing_else(self, rig: VmmRig, full_disk: Path) -> None:
        running = await rig.fresh()
        await running.machine.pause()
        capture = await running.machine.capture(full_disk)
        await running.machine.resume()
        fill(full_disk)

        with pytest.raises(NoSpace):
            await capture.finish()

        capture.discard()
        assert (await rig.run(running, "true")).status == 0
        await rig.checkpoint(running)


class VmmConformance(LaunchSpecification, GuestSpecification, LifeSpecification, CheckpointSpecification):
    """All of it."""
