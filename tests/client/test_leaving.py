"""What leaves a console: keys, ``~.`` on a new line and ``exit``; and what only looks like it."""

from __future__ import annotations

import pytest

from noid.client.leaving import Leaving, WaysOut, parsed
from noid.errors import InvalidRequest

EVERYTHING = parsed("ctrl-] ctrl-p,ctrl-q ~. exit")
LEFT = "left"


def after(*pieces: bytes, ways: WaysOut = EVERYTHING, words_count: bool = True) -> tuple[bytes, str]:
    """Return what the guest gets of what is typed piece by piece, and whether that left, or asked for help."""
    leaving = Leaving(ways)
    typed = b""
    said = ""
    for piece in pieces:
        found = leaving.feed(piece, words_count=words_count)
        typed += found.data
        said += "?" * found.asks
        if found.leaves:
            return typed, said + LEFT
    return typed, said


def by_key(line: bytes) -> list[bytes]:
    return [bytes((key,)) for key in line]


def test_enter_and_tilde_that_come_together_are_the_beginning_of_a_way_out() -> None:
    assert after(b"ls", b"\r~", b".") == (b"ls\r", LEFT)


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        (b"\x1d", b""),
        (b"ab\x10\x11", b"ab"),
        (b"~.", b""),
        (b"ls\r~.", b"ls\r"),
        (b"ls\n~.", b"ls\n"),
        (b"exit\r", b"exit\x15"),
        (b"  exit \r", b"  exit \x15"),
        (b"exxx\x7f\x7f\x7fxit\r", b"exxx\x7f\x7f\x7fxit\x15"),
        (b"no\x15exit\r", b"no\x15exit\x15"),
        (b"no\x03exit\r", b"no\x03exit\x15"),
        (b"\x04exit\r", b"\x04exit\x15"),
        (b"ls\rexit\r", b"ls\rexit\x15"),
        (b"\x1b[24;80Rexit\r", b"\x1b[24;80Rexit\x15"),  # the terminal's answer to a question of the guest's shell
        (b"ls\r\x1b[24;80R~.", b"ls\r\x1b[24;80R"),
        (b"\x1b[Aexit\rexit\r", b"\x1b[Aexit\rexit\x15"),  # a line from the history is not known, the next one is
    ],
)
def test_these_leave(line: bytes, typed: bytes) -> None:
    assert after(*by_key(line)) == (typed, LEFT)
    if b"\r" not in line[:-1] or line.endswith(b"\r~."):
        assert after(line) == (typed, LEFT)  # in one piece, as a network may bring it


@pytest.mark.parametrize(
    "line",
    [
        b"ls ~.\r",  # not at the beginning of a line
        b"\x10a",
        b"exit 1\r",
        b"myexit\r",
        b"ex\tit\r",  # what completion made of it nobody knows
        b"\x1b[Dexit\r",
        b"no\x04exit\r",
        b"\x1bOAexit\r",
    ],
)
def test_these_do_not(line: bytes) -> None:
    assert after(*by_key(line)) == (line, "")
    assert after(line) == (line, "")


def test_two_tildes_are_one_and_a_question_mark_asks() -> None:
    assert after(*by_key(b"~~.\r~x~.\r~?ls\r~.")) == (b"~.\r~x~.\rls\r", f"?{LEFT}")


@pytest.mark.parametrize("paste", [b"a\rexit\r", b"exit\r~.\rb", b"exit\rb", b"a\r~.\r", b"0123456789abcdef\x1d"])
def test_a_short_paste_that_nobody_marks_is_seen_to_be_one(paste: bytes) -> None:
    assert after(paste) == (paste, "")


@pytest.mark.parametrize("size", [100, 4096, 100_000])
def test_nothing_of_what_is_pasted_leaves_or_is_lost(size: int) -> None:
    script = (b"line\rexit\r~.\r\x1d\x10\x11\r" * (size // 20))[:size]
    for marked in (script, b"\x1b[200~" + script + b"\x1b[201~"):
        pieces = [marked[at : at + 4095] for at in range(0, len(marked), 4095)]
        assert after(*pieces) == (marked, "")
    short = b"\x1b[200~exit\r~.\x1d\x1b[201~"
    assert after(short) == (short, "")
    for cut in range(1, len(b"\x1b[200~")):
        assert after(short[:cut], short[cut:]) == (short, "")
    assert after(short, *by_key(b"\rexit\r")) == (short + b"\rexit\x15", LEFT)  # and then one can type again


def test_what_was_held_back_comes_before_what_is_pasted() -> None:
    paste = b"x" * 100
    assert after(b"\x10", paste) == (b"\x10" + paste, "")
    assert after(b"~", paste) == (b"~" + paste, "")


def test_where_no_prompt_can_be_a_word_is_only_a_word() -> None:
    assert after(*by_key(b"exit\r"), words_count=False) == (b"exit\r", "")
    assert after(*by_key(b"exit\r\r~."), words_count=False) == (b"exit\r\r", LEFT)


def test_only_what_was_asked_for_leaves() -> None:
    assert after(b"\x1d", b"~", b".", b"\r", b"exit\r", ways=parsed("")) == (b"\x1d~.\rexit\r", "")
    assert after(b"\x1d", b"~", b".", ways=parsed("~.")) == (b"\x1d~.", "")
    assert after(b"\x1d", b"exit\r", ways=parsed("exit")) == (b"\x1dexit\r", "")
    assert after(b"exit\r", ways=parsed("ctrl-q")) == (b"exit\r", "")


@pytest.mark.parametrize("text", ["ctrl-]]", "exit!", "~..", "leave"])
def test_what_is_no_way_out_is_told(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no key"):
        parsed(f"ctrl-q {text}")
