"""Waiting for a guest: a machine that ends is told at once, with what its console said last."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from noid.core.backends import Machine, MachineExit
from noid.core.waiting import console_tail, is_cancellation, plain_nursery, until_it_ends
from noid.errors import BackendError, DependencyDown


class Ending:
    """As much of a machine as is waited for."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.broken: Exception | None = None

    async def wait(self) -> MachineExit:
        await self.ended.wait()
        if self.broken is not None:
            raise self.broken
        return MachineExit(reason="reset", detail="triple fault")


def waiting(machine: Ending, directory: Path):  # type: ignore[no-untyped-def]  # a context manager, as it comes
    return until_it_ends(cast("Machine", machine), directory)  # it needs no more of a machine than `wait`


async def wait_for_ever(machine: Ending, directory: Path) -> None:
    async with waiting(machine, directory):
        machine.ended.set()
        await trio.sleep_forever()


async def test_the_block_runs_to_its_end_while_the_machine_does(tmp_path: Path) -> None:
    async with waiting(Ending(), tmp_path):
        await trio.lowlevel.checkpoint()


async def test_a_machine_that_ends_interrupts_the_block_and_its_console_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "serial.log").write_bytes(b"booting\r\n\x1b[31mKernel panic\x1b[0m - not syncing\r\n")
    machine = Ending()
    with pytest.raises(DependencyDown, match=r"\(reset: triple fault\).*Kernel panic - not syncing"):
        await wait_for_ever(machine, tmp_path)


async def test_a_guest_that_goes_away_as_its_machine_ends_is_the_machines_end(tmp_path: Path) -> None:
    machine = Ending()

    async def connection_breaks_first() -> None:
        async with waiting(machine, tmp_path):
            nursery.start_soon(end_soon, machine)
            raise DependencyDown("connection lost")

    async with trio.open_nursery() as nursery:
        with pytest.raises(DependencyDown, match="the VM ended before its guest answered") as raised:
            await connection_breaks_first()
    assert isinstance(raised.value.__cause__, DependencyDown)


async def end_soon(machine: Ending) -> None:
    await trio.testing.wait_all_tasks_blocked()
    machine.ended.set()


async def test_an_error_of_the_block_comes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="mine"):
        async with waiting(Ending(), tmp_path):
            raise BackendError("mine")
    with pytest.raises(DependencyDown, match="connection lost"):
        async with waiting(Ending(), tmp_path):
            raise DependencyDown("connection lost")


async def test_a_wait_that_fails_is_an_error_and_no_group(tmp_path: Path) -> None:
    machine = Ending()
    machine.broken = BackendError("the VMM's log cannot be read")
    with pytest.raises(BackendError, match="log cannot be read"):
        await wait_for_ever(machine, tmp_path)


@pytest.mark.parametrize("ends_too", [False, True])
async def test_a_cancellation_from_outside_goes_on_and_no_error_hides_it(tmp_path: Path, ends_too: bool) -> None:
    machine = Ending()
    with trio.CancelScope() as scope:
        async with waiting(machine, tmp_path):
            scope.cancel()
            if ends_too:
                machine.ended.set()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_cancellation_is_recognised_alone_and_in_a_group() -> None:
    caught: list[BaseException] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        except BaseException as error:
            caught.append(error)
            raise
    assert isinstance(caught[0], BaseExceptionGroup), "trio has changed: is_cancellation may go"
    assert is_cancellation(caught[0])
    assert not is_cancellation(BaseExceptionGroup("", [*caught[0].exceptions, ValueError()]))
    assert not is_cancellation(ValueError())


async def test_one_error_leaves_a_plain_nursery_plainly() -> None:
    with pytest.raises(BackendError, match="mine"):
        async with plain_nursery():
            raise BackendError("mine")


async def test_an_error_leaves_a_plain_nursery_plainly_even_while_it_is_cancelled() -> None:
    async def fail_while_cancelled() -> None:
        with trio.CancelScope() as outside:
            async with plain_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                outside.cancel()
                raise BackendError("mine")

    with pytest.raises(BackendError, match="mine"):
        await fail_while_cancelled()


async def test_a_cancellation_passes_a_plain_nursery() -> None:
    with trio.CancelScope() as outside:
        async with plain_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            outside.cancel()
            await trio.sleep_forever()
    assert outside.cancelled_caught


def test_a_console_that_does_not_exist_or_said_nothing(tmp_path: Path) -> None:
    assert console_tail(tmp_path) == ""
    (tmp_path / "serial.log").write_bytes(b"\r\n\x00")
    assert console_tail(tmp_path) == " Its console said nothing."


def test_of_a_long_console_the_last_lines_are_quoted(tmp_path: Path) -> None:
    (tmp_path / "serial.log").write_text("".join(f"line {n}\n" for n in range(5000)))
    assert (
        console_tail(tmp_path) == " Its console said last: 'line 4995 | line 4996 | line 4997 | line 4998 | line 4999'."
    )


def test_of_a_panic_the_reason_is_quoted_and_not_the_trace_after_it(tmp_path: Path) -> None:
    trace = "".join(f"[    0.65]  function{n}+0x31/0x50\n" for n in range(60))
    (tmp_path / "serial.log").write_text(f"no place\n[    0.6] Kernel panic - not syncing: no memory\n{trace}")
    assert (
        console_tail(tmp_path)
        == " Its console said last: 'no place | [    0.6] Kernel panic - not syncing: no memory'."
    )
