"""Every saga, broken at every step and at every call to the VMM: the cells of the grid, and how each is broken.

`noid.testing.saga_world` runs them and says what must hold afterwards; `tests/core/test_saga_grid.py` draws the grid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

import trio

from noid.core.checkpoints import checkpointing, discarding
from noid.core.operations import saga as engine
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Work
from noid.core.vms import changing, lifecycle, pausing, power
from noid.errors import BackendError
from noid.testing.faults import Action, Faults, die, fail, kill_agent

#: The module and the name of each saga's table: the core looks it up there whenever it runs one.
SAGAS: Mapping[str, tuple[ModuleType, str]] = {
    "create": (lifecycle, "CREATE_VM"),
    "fork": (lifecycle, "FORK_VM"),
    "restore": (lifecycle, "RESTORE_VM"),
    "checkpoint": (checkpointing, "CHECKPOINT_VM"),
    "destroy": (lifecycle, "DESTROY_VM"),
    "stop": (power, "STOP_VM"),
    "start": (power, "START_VM"),
    "reboot": (power, "REBOOT_VM"),
    "pause": (pausing, "PAUSE_VM"),
    "resume": (pausing, "RESUME_VM"),
    "rename": (changing, "CHANGE_VM"),
    "relabel": (changing, "CHANGE_CHECKPOINT"),
    "discard": (discarding, "DELETE_CHECKPOINT"),
}

#: How a step is broken. ``killed in undo``: the last step fails, and the agent is killed right after this one's undo.
STEP_MODES = (
    "fails before",
    "fails after",
    "cancelled",
    "killed before",
    "killed after",
    "undo fails",
    "killed in undo",
)

#: How a call to the VMM or the guest is broken: in the middle of a step, where no step boundary helps.
CALL_MODES = ("refuses before", "refuses after", "VMM dies", "killed before", "killed after")

#: Which calls an operation makes. ``create`` is of a new shape here, so it boots and freezes a template first.
CALLS: Mapping[str, tuple[str, ...]] = {
    "create": (
        "launch",
        "connect",
        "start",
        "prepare_pause",
        "pause",
        "capture",
        "capture.finish",
        "kill",
        "restore",
        "wake",
    ),
    "fork": ("restore", "connect", "wake"),
    "restore": ("restore", "connect", "wake"),
    "checkpoint": ("prepare_pause", "pause", "capture", "capture.finish", "resume"),
    "destroy": ("kill",),
    "stop": ("power_off",),
    "start": ("launch", "connect", "start", "wake"),
    "reboot": ("reboot", "launch", "connect", "start", "wake"),
    "pause": ("pause",),
    "resume": ("resume",),
    "rename": (),
    "relabel": (),
    "discard": (),
}

_SENSELESS = {
    ("create", "kill"): ("refuses before", "refuses after", "VMM dies"),  # what cannot be killed stays until the sweep
    ("checkpoint", "prepare_pause"): ("VMM dies",),
    ("checkpoint", "pause"): ("VMM dies",),  # then it is the VM of before that died, and nobody can help it
    ("checkpoint", "capture"): ("VMM dies",),
    ("checkpoint", "capture.finish"): ("VMM dies",),
    ("checkpoint", "resume"): ("VMM dies", "refuses before"),
    ("pause", "pause"): ("VMM dies",),
    ("resume", "resume"): ("VMM dies",),
    # The machine may end before the agent knows that it was heard.
    ("stop", "power_off"): ("VMM dies", "refuses after", "killed after"),
    ("reboot", "reboot"): ("VMM dies", "refuses after", "killed after"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to break one place of one saga: a step, ``commit``, or with *is_call* a call to the VMM."""

    saga: str
    place: str
    mode: str
    is_call: bool = False

    @property
    def kills_agent(self) -> bool:
        """The operation's agent does not survive."""
        return "killed" in self.mode

    @property
    def after_commit(self) -> bool:
        """The operation has happened when it is broken."""
        return (self.place, self.mode) == ("commit", "killed after")

    def __str__(self) -> str:
        return f"{self.saga}-{'call_' if self.is_call else ''}{self.place}-{self.mode.replace(' ', '_')}"


def places(saga: str) -> list[str]:
    """Return the steps of a saga, and what follows the last."""
    return [*(step.name for step in table(saga).steps), "commit"]


def table(saga: str) -> Saga[Work]:
    """Return the saga as the core runs it."""
    found: Saga[Work] = getattr(*SAGAS[saga])
    return found


def cells() -> list[Cell]:
    """Return every cell that can be."""
    found = []
    for saga in SAGAS:
        for step in table(saga).steps:
            modes = [mode for mode in STEP_MODES if step.undo is not None or "undo" not in mode]
            found += [Cell(saga=saga, place=step.name, mode=mode) for mode in modes]
        found += [Cell(saga=saga, place="commit", mode=mode) for mode in ("killed before", "killed after")]
        for call in CALLS[saga]:
            modes = [mode for mode in CALL_MODES if mode not in _SENSELESS.get((saga, call), ())]
            found += [Cell(saga=saga, place=call, mode=mode, is_call=True) for mode in modes]
    return found


@contextlib.contextmanager
def broken(cell: Cell, faults: Faults) -> Iterator[None]:
    """Break the saga, or arm the call, for the block."""
    if cell.is_call:
        actions: dict[str, Action] = {"VMM dies": die, "killed before": kill_agent, "killed after": kill_agent}
        action = actions.get(cell.mode) or fail(BackendError(f"{cell}"))
        has_process_only_then = cell.mode == "VMM dies" and cell.place in ("launch", "restore")
        faults.arm(cell.place, action, after=cell.mode.endswith("after") or has_process_only_then)
        yield
        return
    saga = table(cell.saga)
    steps = [_broken_step(step, cell, last=step is saga.steps[-1]) for step in saga.steps]

    def commit(work: Work, facts: Facts, tx: Any) -> None:
        saga.commit(work, facts, tx)
        if (cell.place, cell.mode) == ("commit", "killed before"):
            _die()

    run = engine.run

    async def run_and_die(*arguments: Any, **options: Any) -> NoReturn:
        await run(*arguments, **options)
        _die()

    with contextlib.ExitStack() as patches:
        patches.enter_context(
            mock.patch.object(*SAGAS[cell.saga], dataclasses.replace(saga, steps=tuple(steps), commit=commit))
        )
        if cell.after_commit:
            patches.enter_context(mock.patch.object(engine, "run", run_and_die))
        yield


def _broken_step(step: Step[Work], cell: Cell, *, last: bool) -> Step[Work]:
    here, in_undo = step.name == cell.place, "undo" in cell.mode

    async def do(work: Work, facts: Facts) -> Mapping[str, Any] | None:
        if here and cell.mode == "fails before":
            raise BackendError(f"{cell}: before")
        if here and cell.mode == "killed before":
            _die()
        added = await step.do(work, facts)
        if here and cell.mode == "killed after":
            _die()
        if (here and cell.mode == "fails after") or (last and in_undo):
            raise BackendError(f"{cell}: after")
        if here and cell.mode == "cancelled":  # as at the end of a shutdown that waited long enough
            nursery = trio.lowlevel.current_task().parent_nursery
            assert nursery is not None
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()
        return added

    async def undo(work: Work, facts: Facts) -> None:
        assert step.undo is not None
        await step.undo(work, facts)
        if here and cell.mode == "undo fails":
            raise BackendError(f"{cell}: undo")
        if here and cell.mode == "killed in undo":
            _die()

    return dataclasses.replace(step, do=do, undo=None if step.undo is None else undo)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")
