"""Waiting for a guest without waiting for a dead one, and telling what its console said last."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from noid.core.backends import Machine, MachineExit
from noid.errors import DependencyDown

_END_SECS = 0.5
_TAIL_BYTES = 16384
_TAIL_LINES = 5
_PANIC = "Kernel panic - not syncing"
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[^\x20-\x7e\n]")


@contextlib.asynccontextmanager
async def plain_nursery() -> AsyncIterator[trio.Nursery]:
    """Yield a nursery out of which a single exception comes as it is, not inside a group.

    Also when a cancellation from outside arrives while the nursery ends because of it: the exception is the news, as
    it would be without a nursery.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        errors = group.split(trio.Cancelled)[1] or group
        if len(errors.exceptions) == 1:
            error = errors.exceptions[0]
            raise error from error.__cause__  # the group adds nothing to its story
        raise


def is_cancellation(error: BaseException) -> bool:
    """Return whether *error* is a cancellation: a nursery inside turns one into a group of several."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


@contextlib.asynccontextmanager
async def until_it_ends(machine: Machine, directory: Path) -> AsyncIterator[None]:
    """Run the block, unless *machine* ends first.

    Raises:
        DependencyDown: the machine ended; carries how, and the last lines of its console in *directory*.
    """
    ended: MachineExit | None = None
    scope = trio.CancelScope()
    failure: Exception | None = None

    async def watch() -> None:
        nonlocal ended, failure
        try:
            ended = await machine.wait()
        except Exception as error:  # as below
            failure = error
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        with scope:
            try:
                yield
            except Exception as error:  # raised below, outside the nursery, so that it arrives as it is
                failure = failure or error
                if isinstance(error, DependencyDown):  # the guest went away: perhaps because the machine is ending
                    with trio.move_on_after(_END_SECS):
                        await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    if failure is not None and not (ended and isinstance(failure, DependencyDown)):
        raise failure
    if ended is not None:
        raise DependencyDown(
            f"the VM ended before its guest answered ({ended.reason}{f': {ended.detail}' if ended.detail else ''})."
            f"{console_tail(directory)} Check the image's kernel and root file system, or give the VM more memory."
        ) from failure


def console_tail(directory: Path) -> str:
    """Return the last console lines of the machine in *directory* as a sentence, or an empty string.

    What a kernel prints after the reason of its panic (a call trace) helps nobody here, so the reason comes last.
    """
    try:
        with (directory / "serial.log").open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in _UNPRINTABLE.sub("", text.replace("\r", "")).split("\n")]
    panics = [number for number, line in enumerate(lines) if _PANIC in line]
    if panics:
        del lines[panics[0] + 1 :]
    shown = [line[:200] for line in lines if line][-_TAIL_LINES:]
    return f" Its console said last: {' | '.join(shown)!r}." if shown else " Its console said nothing."
