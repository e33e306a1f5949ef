"""What a guest's program has switched on in the terminal, and what switches it off; and what it asks the terminal."""

from __future__ import annotations

import re

_MODE = re.compile(rb"\x1b\[\?([0-9;]{1,40})([hl])")
_TAIL_BYTES = 48
_ALTERNATE = frozenset((47, 1047, 1049))
_ON_BY_DEFAULT = frozenset((7, 25))
_KNOWN = _ALTERNATE | _ON_BY_DEFAULT | {1, 5, 66, 9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 2004, 2026}
"""Cursor keys, colours, keypad, mouse, focus, marks around what is pasted, held drawing."""


_QUESTIONS = (
    rb"\x05|\x1bZ",  # who are you?
    rb"\x1b\[[?>=]?[0-9;]*[cn]|\x1b\[>[0-9;]*q",  # what are you, and where is the cursor?
    rb"\x1b\[\??[0-9;]*\$p|\x1b\[[0-9;]*t|\x1b\[\?u",  # how are you set, and how large?
    rb"\x1bP[$+]q[^\x1b\x07]{0,256}\x1b\\|\x1b\][0-9;]{1,16};\?(?:\x07|\x1b\\)",  # which colours?
)
_QUESTION = re.compile(b"|".join(_QUESTIONS))


def without_questions(data: bytes) -> bytes:
    """Return *data* without what a terminal answers: who asked has its answer, and would take another one for keys."""
    return _QUESTION.sub(b"", data)


class Screen:
    """Watches what is written to a terminal. Only what is known is undone: the guest decides what is written."""

    def __init__(self) -> None:
        self._changed: set[int] = set()
        self._is_styled = False
        self._end = b""

    @property
    def is_alternate(self) -> bool:
        """Whether a program has the whole screen, as an editor does."""
        return bool(self._changed & _ALTERNATE)

    def feed(self, data: bytes) -> None:
        """Take what is written."""
        seen = self._end + data
        self._end = b""
        if b"\x1b" not in seen:
            return
        self._is_styled = True
        for found in _MODE.finditer(seen):
            for number in found[1].split(b";"):
                mode = int(number or b"0")
                if mode in _KNOWN:
                    is_usual = (found[2] == b"h") == (mode in _ON_BY_DEFAULT)
                    (self._changed.discard if is_usual else self._changed.add)(mode)
        last = seen.rfind(b"\x1b")
        if len(seen) - last <= _TAIL_BYTES and not _MODE.match(seen, last):
            self._end = seen[last:]  # it may be cut

    def undo(self) -> bytes:
        """Return what switches everything back that is still switched on: nothing if a program has done so itself."""
        undone = b"".join(
            b"\x1b[?%d%c" % (mode, ord("h") if mode in _ON_BY_DEFAULT else ord("l")) for mode in sorted(self._changed)
        )
        if self._is_styled:
            undone += b"\x1b[0m\x1b(B\x0f"
        self._changed.clear()
        self._is_styled = False
        return undone
