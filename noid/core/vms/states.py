"""VM states and what may follow what. Pure.

::

    creating ──► running ◄──► paused
       │          │  ▲          │
       ▼          ▼  │          ▼
    (absent)    dead/stopped ◄──┘        running, paused, dead, stopped ──► destroying ──► (absent)

*What is true* is the state; *what is being done* is `Vm.busy`. An in-place restore builds a new machine beside the old
one, so the VM stays what it was until the new one takes its place.
"""

from __future__ import annotations

from noid.core.model.vms import VmState
from noid.errors import Conflict

_S = VmState

TRANSITIONS: dict[VmState, frozenset[VmState]] = {
    _S.CREATING: frozenset({_S.RUNNING, _S.DESTROYING}),
    _S.RUNNING: frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPED, _S.DEAD, _S.DESTROYING}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.STOPPED, _S.DEAD, _S.DESTROYING}),
    _S.STOPPED: frozenset({_S.RUNNING, _S.DEAD, _S.DESTROYING}),
    _S.DEAD: frozenset({_S.RUNNING, _S.STOPPED, _S.DESTROYING}),
    _S.RESTORING: frozenset({_S.RUNNING, _S.DEAD, _S.DESTROYING}),
    _S.DESTROYING: frozenset({_S.DESTROYING}),
}

#: What an operation needs the VM to be.
ALLOWED: dict[str, frozenset[VmState]] = {
    "checkpoint": frozenset({_S.RUNNING, _S.PAUSED}),
    "exec": frozenset({_S.RUNNING}),
    "connect": frozenset({_S.RUNNING}),
    "console": frozenset({_S.RUNNING, _S.PAUSED}),
    "restore": frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPED, _S.DEAD}),
    "destroy": frozenset(_S),
    "stop": frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPED, _S.DEAD}),
    "start": frozenset({_S.RUNNING, _S.STOPPED, _S.DEAD}),
    "reboot": frozenset({_S.RUNNING, _S.PAUSED}),
    "change": frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPED, _S.DEAD}),
    "pause": frozenset({_S.RUNNING, _S.PAUSED}),
    "resume": frozenset({_S.RUNNING, _S.PAUSED}),
}

_VERBS = {"connect": "connect to a port of", "console": "open the console of"}

_HINTS = {
    _S.DEAD: "Its machine has ended: boot its disk with `noid start {name}`, restore it from a checkpoint, or destroy "
    "it.",
    _S.STOPPED: "Start it with `noid start {name}`, restore it from a checkpoint, or destroy it.",
    _S.PAUSED: "Resume it with `noid resume {name}`.",
    _S.CREATING: "Wait until it is there.",
    _S.DESTROYING: "It is being destroyed; `noid destroy` again finishes that.",
    _S.RESTORING: "Wait until the restore has ended.",
    _S.RUNNING: "",
}


def may_follow(old: VmState, new: VmState) -> bool:
    """Return whether a VM that is *old* may become *new*."""
    return new in TRANSITIONS[old]


def require(action: str, name: str, state: VmState) -> None:
    """Let *action* pass on a VM in *state*.

    Raises:
        Conflict: says what the VM is and what to do about it.
    """
    if state not in ALLOWED[action]:
        verb = _VERBS.get(action, action)
        raise Conflict(f"cannot {verb} VM {name!r}: it is {state}. {_HINTS[state].format(name=name)}".rstrip())
