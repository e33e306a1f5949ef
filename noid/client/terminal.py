"""What a stream to a guest knows of the terminal in front of it: its size, and the keys that leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from noid.errors import InvalidRequest

_CONTROLS = "abcdefghijklmnopqrstuvwxyz@[\\]^_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """A terminal in front of the guest's.

    Attributes:
        size: Returns columns and rows.
        wakeup_fd: Becomes readable when the size may have changed.
        keys: Typed one after the other, they detach; empty for none.
    """

    size: Callable[[], tuple[int, int]]
    wakeup_fd: int | None
    keys: bytes


def parsed_keys(text: str) -> bytes:
    """Return the bytes a terminal sends for keys as people write them: ``ctrl-]``, ``ctrl-p,ctrl-q``, ``~,.``.

    Raises:
        InvalidRequest: one of them is none.
    """
    keys = bytearray()
    for word in text.split(",") if text else ():
        control = word[5:].lower() if word[:5].lower() == "ctrl-" else ""
        if control and control in _CONTROLS and len(control) == 1:
            keys.append(ord(control.upper()) & 0x1F)
        elif len(word) == 1 and word.isascii() and word != "\n":
            keys += word.encode()
        else:
            raise InvalidRequest(f"{word!r} is no key. Write single characters or ctrl-X, separated by commas.")
    return bytes(keys)


class DetachKeys:
    """Finds the keys that detach in what is typed; what could be their beginning is held back until it is not."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._matched = 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what is to be typed of *data*, and whether the keys were pressed, after which nothing is."""
        if not self._keys or (not self._matched and self._keys[0] not in data):
            return data, False
        typed = bytearray()
        for byte in data:
            while self._matched and byte != self._keys[self._matched]:
                shorter = self._shorter()
                typed += self._keys[: self._matched - shorter]
                self._matched = shorter
            if byte != self._keys[self._matched]:
                typed.append(byte)
                continue
            self._matched += 1
            if self._matched == len(self._keys):
                self._matched = 0
                return bytes(typed), True
        return bytes(typed), False

    def release(self) -> bytes:
        """Return what is held back, because what follows is not looked at."""
        held, self._matched = self._keys[: self._matched], 0
        return held

    def _shorter(self) -> int:
        """Return how much of the end of what was matched is a beginning of the keys again."""
        matched = self._keys[: self._matched]
        return next(n for n in range(self._matched - 1, -1, -1) if matched.endswith(self._keys[:n]))
