"""What a guest's program has switched on in a terminal is switched off; whatever pieces it came in."""

from __future__ import annotations

import pytest

from noid.cli.screen import Screen, without_questions

EDITOR = b"text \x1b[31m\x1b[?1049h\x1b[?1;2004h\x1b[?25l more"
UNDONE = b"\x1b[?1l\x1b[?25h\x1b[?1049l\x1b[?2004l\x1b[0m\x1b(B\x0f"


@pytest.mark.parametrize("size", range(1, 12))
def test_what_is_on_is_switched_off_once(size: int) -> None:
    screen = Screen()
    for at in range(0, len(EDITOR), size):
        screen.feed(EDITOR[at : at + size])
    assert screen.is_alternate
    assert screen.undo() == UNDONE
    assert screen.undo() == b""


@pytest.mark.parametrize(
    ("shown", "undone"),
    [
        (b"plain", b""),
        (EDITOR + b"\x1b[?1049l\x1b[?2004;1l\x1b[?25h", b"\x1b[0m\x1b(B\x0f"),
        (b"\x1b[?999999h\x1b[?3h\x1b[?;h", b"\x1b[0m\x1b(B\x0f"),  # unknown to us, so none of ours
        (b"\x1b[?7l", b"\x1b[?7h\x1b[0m\x1b(B\x0f"),
    ],
)
def test_what_a_program_has_switched_off_itself_is_left_alone(shown: bytes, undone: bytes) -> None:
    screen = Screen()
    screen.feed(shown)
    assert screen.undo() == undone


def test_history_asks_a_terminal_nothing() -> None:
    asked = [
        b"\x1b[6n", b"\x1b[5n", b"\x1b[?6n", b"\x1b[c", b"\x1b[>c", b"\x1b[0c", b"\x1b[18t", b"\x1b[?2004$p",
        b"\x1b[>q", b"\x1b[?u", b"\x1b]11;?\x07", b"\x1b]4;1;?\x1b\\", b"\x1bP+q544e\x1b\\",
        b"\x1bP$qm\x1b\\", b"\x1bZ", b"\x05",
    ]  # fmt: skip
    kept = b"~ # \x1b[31mred\x1b[0m\x1b[2J\x1b[1;1H\x1b[?1049h\x1b]0;title\x07 5n c"
    assert without_questions(kept + b"".join(asked) + kept) == kept + kept
