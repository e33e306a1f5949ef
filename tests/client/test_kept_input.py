"""Input is sent again from where the agent has it, and kept no longer than it may be asked for."""

from __future__ import annotations

import pytest

from noid.client import kept_input
from noid.client.kept_input import KeptInput


def sent(kept: KeptInput) -> bytes:
    data = b""
    while piece := kept.take(3):
        data += piece
    return data


def test_what_did_not_arrive_is_sent_again_and_nothing_else() -> None:
    kept = KeptInput()
    kept.begin(told=True)
    kept.add(b"0123456789")
    assert sent(kept) == b"0123456789"
    kept.arrived(4)
    assert kept.resume(6)
    kept.add(b"ab")
    assert sent(kept) == b"6789ab"
    assert kept.resume(12)
    assert sent(kept) == b""


@pytest.mark.parametrize("arrived", [3, 11])
def test_input_that_is_no_longer_here_or_is_not_ours_is_noticed(arrived: int) -> None:
    kept = KeptInput()
    kept.begin(told=True)
    kept.add(b"0123456789")
    sent(kept)
    kept.arrived(4)
    assert not kept.resume(arrived)
    assert sent(kept) == b""


def test_a_process_that_takes_no_more_gets_no_more() -> None:
    kept = KeptInput()
    kept.begin(told=True)
    kept.add(b"0123456789")
    assert kept.resume(None)
    assert sent(kept) == b""


def test_what_is_kept_is_bounded_and_an_agent_that_does_not_tell_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_input, "KEPT_BYTES_MAX", 8)
    kept = KeptInput()
    kept.begin(told=True)
    kept.add(b"01234567")
    sent(kept)
    assert not kept.has_room
    kept.arrived(5)
    assert kept.has_room
    assert kept.is_complete

    old = KeptInput()
    assert old.is_complete
    old.begin(told=False)
    for _ in range(3):
        assert old.has_room
        old.add(b"01234567")
        assert sent(old) == b"01234567"
    assert not old.is_complete
