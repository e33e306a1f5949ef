"""Finds in what is typed at a console that its user wants to leave: keys, ``~.`` on a new line, a word like ``exit``.

What is pasted is never taken for that. A terminal says what is pasted if the guest's program asked it to (ESC[200~);
otherwise a piece is that is longer than anybody types between two looks, or goes on behind an Enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from noid.client.terminal import DetachKeys, parsed_keys

TYPED_BYTES_MAX = 16
SEQUENCE_BYTES_MAX = 64
LINE_BYTES_MAX = 256
_TILDE, _WORDS = "~.", ("exit",)
_PASTE_BEGINS, _PASTE_ENDS = b"\x1b[200~", b"\x1b[201~"
_ENTER = b"\r\n"
_ESC, _CTRL_D, _CTRL_U, _BACKSPACE = 0x1B, 0x04, 0x15, (0x08, 0x7F)
_SIGNALS = (0x03, 0x1A, 0x1C)
"""Ctrl+C, Ctrl+Z and Ctrl+\\, behind which there is a new prompt."""
_ANSWER_ENDS = b"RcnxyItOMm"
"""What a control sequence ends with that nobody has typed: positions, states, focus, mouse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaysOut:
    """What leaves: any of *keys*, each one or more in a row; ``~.`` if *tilde*; a line that is one of *words*."""

    keys: tuple[bytes, ...] = ()
    tilde: bool = False
    words: tuple[bytes, ...] = ()


def parsed(text: str) -> WaysOut:
    """Return the ways out in *text*, with blanks between: keys (``ctrl-]``, ``ctrl-p,ctrl-q``), ``~.``, ``exit``.

    Raises:
        InvalidRequest: says which one is none.
    """
    words = text.split()
    keys = [word for word in words if word not in (_TILDE, *_WORDS)]
    return WaysOut(
        keys=tuple(parsed_keys(word) for word in keys),
        tilde=_TILDE in words,
        words=tuple(word.encode() for word in _WORDS if word in words),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Typed:
    """What became of a piece: *data* is for the guest, and after that the user wants to leave, or *asks* for help."""

    data: bytes
    leaves: bool = False
    asks: bool = False


class Leaving:
    """Reads what is typed, piece by piece; what may be the beginning of a way out is held back until it is clear."""

    def __init__(self, ways: WaysOut) -> None:
        self._keys = [DetachKeys(keys) for keys in ways.keys]
        self._tilde = _TildeKeys() if ways.tilde else None
        self._line = _Line(ways.words)
        self._is_pasting = False
        self._end = b""  # of what came last: a mark may be cut

    def feed(self, data: bytes, *, words_count: bool = True) -> Typed:
        """Take what was typed. *words_count*: whether a prompt may be there, where a word is a command."""
        if self._is_pasted(data):
            return Typed(data=self._pass(data))
        leaves = False
        for keys in self._keys:
            data, found = keys.feed(data)
            leaves = leaves or found
        asks = False
        if self._tilde is not None:
            data, found, asks = self._tilde.feed(data)
            leaves = leaves or found
        if self._line.feed(data) and words_count and not leaves:
            return Typed(data=data[:-1] + bytes((_CTRL_U,)), leaves=True)  # the word is wiped, not entered
        return Typed(data=data, leaves=leaves, asks=asks)

    def _is_pasted(self, data: bytes) -> bool:
        seen = self._end + data
        self._end = seen[-len(_PASTE_ENDS) + 1 :]
        begins, ends = seen.rfind(_PASTE_BEGINS), seen.rfind(_PASTE_ENDS)
        was_pasting = self._is_pasting
        if begins >= 0 or ends >= 0:
            self._is_pasting = begins > ends
        if was_pasting or self._is_pasting or ends >= 0 or len(data) > TYPED_BYTES_MAX:
            return True
        goes_on = any(byte in _ENTER for byte in data[:-1])
        # The last line of which is what one came for, or begins so: keys pressed one by one may come together.
        return goes_on and not data.endswith((b"\r~.", b"\n~.", b"\r~", b"\n~"))

    def _pass(self, data: bytes) -> bytes:
        """Return *data* behind what was held back, none of which was a way out."""
        held = b"".join(keys.release() for keys in self._keys)
        if self._tilde is not None:
            held += self._tilde.release(data)
        self._line.skip(data)
        return held + data


class _Piece(Enum):
    """What a byte that was typed is part of: nothing larger, or a sequence that goes on or ends with it."""

    PLAIN = auto()
    INSIDE = auto()
    KEY = auto()
    ANSWER = auto()
    """Of the terminal, to a question of the guest: nobody has typed it."""


class _Sequences:
    """Tells the sequences a terminal sends, byte by byte."""

    def __init__(self) -> None:
        self._begun: bytes | None = None

    def take(self, byte: int) -> _Piece:
        """Return what *byte* is."""
        if self._begun is None:
            if byte != _ESC:
                return _Piece.PLAIN
            self._begun = b""
            return _Piece.INSIDE
        is_control = self._begun.startswith(b"[")
        if (not self._begun and byte in b"[O") or (
            is_control and not 0x40 <= byte <= 0x7E and len(self._begun) < SEQUENCE_BYTES_MAX
        ):
            self._begun += bytes((byte,))
            return _Piece.INSIDE
        self._begun = None
        return _Piece.ANSWER if is_control and byte in _ANSWER_ENDS else _Piece.KEY

    def skip(self) -> None:
        """Begin anew: what came was not looked at."""
        self._begun = None


class _TildeKeys:
    """``~.`` leaves, ``~?`` asks, ``~~`` is one tilde; all at the beginning of a line only, as in ssh."""

    def __init__(self) -> None:
        self._sequences = _Sequences()
        self._at_beginning = True
        self._held = False

    def feed(self, data: bytes) -> tuple[bytes, bool, bool]:
        """Return what is to be typed of *data*, whether it leaves, after which nothing is, and whether it asks."""
        typed, asks = bytearray(), False
        for byte in data:
            piece = self._sequences.take(byte)
            if self._held:
                self._held = False
                if byte == ord("."):
                    return bytes(typed), True, asks
                if byte == ord("?"):
                    asks = True
                    continue
                typed += b"~" if byte == ord("~") else bytes((ord("~"), byte))
            elif byte == ord("~") and self._at_beginning and piece is _Piece.PLAIN:
                self._held = True
                continue
            else:
                typed.append(byte)
            if piece in (_Piece.PLAIN, _Piece.KEY):
                self._at_beginning = piece is _Piece.PLAIN and byte in _ENTER
        return bytes(typed), False, asks

    def release(self, data: bytes) -> bytes:
        """Return the tilde that is held back, because *data* follows, in which nothing is looked for."""
        held, self._held = b"~" * self._held, False
        self._at_beginning = data[-1:] in (b"\r", b"\n")
        self._sequences.skip()
        return held


class _Line:
    """The line that is being typed, as far as one can know it: editing and completion are the guest's."""

    def __init__(self, words: tuple[bytes, ...]) -> None:
        self._words = words
        self._sequences = _Sequences()
        self._line: bytearray | None = bytearray()

    def feed(self, data: bytes) -> bool:
        """Take what goes to the guest. Return whether its last byte is an Enter behind one of the words."""
        for at, byte in enumerate(data):
            piece = self._sequences.take(byte)
            if piece is _Piece.KEY:
                self._line = None  # a cursor key: the line is unknown until the next one
            elif piece is not _Piece.PLAIN:
                continue
            elif byte in _ENTER:
                found = self._line is not None and bytes(self._line).strip() in self._words
                self._line = bytearray()
                if found and at == len(data) - 1:
                    return True
            elif byte in (*_SIGNALS, _CTRL_U):
                self._line = bytearray()
            elif self._line is None or (byte == _CTRL_D and not self._line):
                continue
            elif byte in _BACKSPACE:
                del self._line[-1:]
            elif byte < 0x20 or len(self._line) >= LINE_BYTES_MAX:
                self._line = None
            else:
                self._line.append(byte)
        return False

    def skip(self, data: bytes) -> None:
        """Take what was pasted."""
        self._sequences.skip()
        self._line = bytearray() if data[-1:] in (b"\r", b"\n") else None
