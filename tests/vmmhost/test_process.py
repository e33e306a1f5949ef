"""VMM processes: not tied to noid, never confused with another, reaped when they are ours."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from noid.core.model.vms import ProcessRef
from noid.errors import NotFound
from noid.vmmhost.process import VmmProcess, boot_id, start_ticks


@pytest.fixture
def spawned(tmp_path: Path) -> Iterator[list[VmmProcess]]:
    processes: list[VmmProcess] = []
    yield processes
    for process in processes:
        process.send_kill()
        process.close()


def spawn(spawned: list[VmmProcess], log: Path, *argv: str) -> VmmProcess:
    process = VmmProcess.spawn(argv, environment={"PATH": os.environ["PATH"], "A": "b"}, log_path=log, pass_fds=())
    spawned.append(process)
    return process


async def test_a_process_has_its_own_session_no_input_and_writes_to_its_log(
    spawned: list[VmmProcess], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    process = spawn(spawned, log, "sh", "-c", "cat; echo $A; cut -d' ' -f6 /proc/$$/stat; echo err >&2; pwd; exit 3")

    with trio.fail_after(10):
        await process.wait()

    assert log.read_text() == f"before\nb\n{process.ref.pid}\nerr\n/\n"
    assert process.exit_text == "exit status 3"


async def test_many_may_wait_and_the_process_is_reaped_once(spawned: list[VmmProcess], tmp_path: Path) -> None:
    process = spawn(spawned, tmp_path / "log", "sleep", "1000")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(process.wait)
            process.send_kill()
        await process.wait()

    assert process.exit_text == "signal 9 (SIGKILL)"
    with pytest.raises(ProcessLookupError):
        os.kill(process.ref.pid, 0)
    process.send_kill()


@pytest.fixture
def stranger() -> ProcessRef:
    """A process that is not our child, as after noid was started anew. The test ends it."""
    pid = int(subprocess.check_output(["setsid", "-f", "sh", "-c", "echo $$; exec sleep 1000 >&-"], text=True))
    return ProcessRef(pid=pid, start_ticks=start_ticks(pid), boot_id=boot_id())


async def test_what_somebody_else_started_can_be_adopted_watched_and_ended(stranger: ProcessRef) -> None:
    process = VmmProcess.adopt(stranger)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.wait)
            process.send_kill()
    process.close()

    with pytest.raises(NotFound):
        VmmProcess.adopt(stranger)


async def test_a_pid_that_now_belongs_to_another_process_is_not_adopted(
    spawned: list[VmmProcess], tmp_path: Path
) -> None:
    ref = spawn(spawned, tmp_path / "log", "sleep", "1000").ref

    for other in (
        dataclasses.replace(ref, start_ticks=ref.start_ticks - 1),
        dataclasses.replace(ref, boot_id="another"),
        dataclasses.replace(ref, pid=2**22 - 1),
    ):
        with pytest.raises(NotFound):
            VmmProcess.adopt(other)
    VmmProcess.adopt(ref).close()


async def test_a_name_with_parentheses_does_not_hide_the_start_time(spawned: list[VmmProcess], tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")

    ref = spawn(spawned, tmp_path / "log", str(program), "1000").ref

    VmmProcess.adopt(ref).close()


def test_a_missing_program_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        VmmProcess.spawn(["/no/such/program"], environment={}, log_path=tmp_path / "log", pass_fds=())
