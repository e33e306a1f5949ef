"""VM states: which may follow which, and what each action needs, as two complete tables."""

from __future__ import annotations

import pytest

from noid.core.model.vms import VmState
from noid.core.vms.states import ALLOWED, may_follow, require
from noid.errors import Conflict

# From the row's state to the column's: c(reating) r(unning) p(aused) R(estoring) s(topped) d(ead) D(estroying).
FOLLOWS = {
    VmState.CREATING: "rD",
    VmState.RUNNING: "rpsdD",
    VmState.PAUSED: "rsdD",
    VmState.RESTORING: "rdD",
    VmState.STOPPED: "rdD",
    VmState.DEAD: "rsD",
    VmState.DESTROYING: "D",
}
LETTERS = dict(zip(VmState, "crpRsdD", strict=True))

MAY = {
    "checkpoint": "rp",
    "exec": "r",
    "connect": "r",
    "console": "rp",
    "restore": "rpsd",
    "destroy": "crpRsdD",
    "stop": "rpsd",
    "start": "rsd",
    "reboot": "rp",
    "change": "rpsd",
    "pause": "rp",
    "resume": "rp",
}


@pytest.mark.parametrize("new", VmState, ids=str)
@pytest.mark.parametrize("old", VmState, ids=str)
def test_a_state_is_followed_by_those_of_the_table_only(old: VmState, new: VmState) -> None:
    assert may_follow(old, new) is (LETTERS[new] in FOLLOWS[old])


@pytest.mark.parametrize("state", VmState, ids=str)
@pytest.mark.parametrize("action", MAY)
def test_an_action_passes_in_the_states_of_the_table_and_else_says_what_the_vm_is(action: str, state: VmState) -> None:
    if LETTERS[state] in MAY[action]:
        require(action, "web", state)
        return
    with pytest.raises(Conflict) as refused:
        require(action, "web", state)
    verb = {"console": "open the console of", "connect": "connect to a port of"}.get(action, action)
    assert f"cannot {verb} VM 'web': it is {state}." in str(refused.value)
    assert str(refused.value).count(".") >= 2, "the message ends without saying what to do"


def test_every_action_is_in_the_table() -> None:
    assert MAY.keys() == ALLOWED.keys()
