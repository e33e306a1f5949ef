"""Finds our records in what a serial line brings: prompts, echoes, kernel messages and anybody's output lie between.

A record is one line, ``@<nonce> <kind> [fields] <nonce>@``. The nonce is random and new for each command, and typed
lines never hold the marks, so neither an echo nor the output of another command is taken for a record.

Whatever else writes to the line can do so in the middle of a record. The kernel always prints whole lines, so what it
put in ends with a line feed; a record is mended by taking that out again, if what is left is a record of the length it
says. Records that carry output are checked by sum above this (`noid_exec_serial.output`), so a wrong guess is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: How far back the beginning of a torn record is looked for; whole ones are at most 800 bytes long.
_REGION_BYTES = 4096
#: How many line ends are tried, and how many records are mended in one command: what a hostile guest can make us do.
_ENDS_MAX = 4
_MENDINGS_MAX = 32
_KERNEL_MESSAGE = re.compile(rb"\[ *\d+\.\d{6}\][^\n]*\n")
_FIELDS = {
    "n": rb"",  # no stty, so the echo cannot be turned off
    "r": rb"",  # the reader reads and does not echo
    "k": rb" ([ -~]{1,64})",  # everything before that line was taken
    "f": rb" (user|cwd|root \d{1,10}|tool [a-z0-9]{1,16})",  # refused, nothing was started
    "o": rb" (base64|hex) (group|process)",  # how output comes, and what a signal reaches
    "t": rb" (\d{1,10})",  # an encoder's pid
    "p": rb" (\d{1,10})",  # the command's pid
    "d": rb" ([12]) (\d{1,18}) (\d{1,4}) (\d{1,4}) ([A-Za-z0-9+/=]{1,1024})",  # stream, block, index, length, piece
    "b": rb" ([12]) (\d{1,18}) (\d{1,4}) (\d{1,6}) (\d{1,10}|[0-9a-f]{32}|-)",  # stream, block, pieces, characters, sum
    "z": rb" ([12]) (\d{1,18})",  # stream, number of blocks: it is at its end
    "x": rb" (\d{1,3}) (\d{1,3})",  # status, twice
    "a": rb"",  # a line of input was taken
    "c": rb"",  # nobody reads input any more
    "q": rb"",  # the shell is back at its prompt
}


@dataclass(frozen=True, slots=True)
class Record:
    """One record; *fields* are as the guest wrote them, of the shape their kind has."""

    kind: str
    fields: tuple[str, ...] = ()


class RecordDecoder:
    """Turns bytes into the records of *nonce*, wherever they are cut.

    Holds a few KiB. Garbage costs O(length), and so do torn records: only the first `_MENDINGS_MAX` are mended.
    """

    def __init__(self, nonce: str) -> None:
        name = nonce.encode("ascii")
        shapes = b"|".join(kind.encode("ascii") + fields for kind, fields in _FIELDS.items())
        self._record = re.compile(rb"@" + name + rb" (" + shapes + rb") " + name + rb"@")
        self._begin = b"@" + name + b" "
        self._end = b" " + name + b"@"
        self._mendings_left = _MENDINGS_MAX
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[Record]:
        """Yield the records that end in *data*."""
        self._pending += data
        while (end := self._pending.find(self._end)) >= 0:
            region, self._pending = self._pending[: end + len(self._end)], self._pending[end + len(self._end) :]
            yield from self._records(region)
        if b"@" not in self._pending:
            self._pending = b""
        elif len(self._pending) > 2 * _REGION_BYTES:
            self._pending = self._pending[-_REGION_BYTES:]

    def _records(self, region: bytes) -> Iterator[Record]:
        """Yield the record at the end of *region*, and before it those without end marks, if they can be read."""
        start = region.rfind(self._begin)
        found = self._parsed(region[start:]) if start >= 0 else None
        if found is None:
            yield from self._mended(region)
            return
        if b"@" in region[:start]:
            yield from self._mended(region[:start])
        yield found

    def _parsed(self, text: bytes) -> Record | None:
        """Return the record that *text* is, or None."""
        match = self._record.fullmatch(text)
        if match is None:
            return None
        body: bytes = match[1]
        fields = tuple(group.decode("ascii") for group in match.groups()[1:] if group is not None)
        record = Record(chr(body[0]), fields)
        if record.kind == "d" and int(fields[3]) != len(fields[4]):
            return None
        if record.kind == "x" and fields[0] != fields[1]:
            return None
        return record

    def _mended(self, region: bytes) -> list[Record]:
        """Return the records *region* holds once what somebody else wrote is taken out: first whole kernel messages.

        Then one stretch that ends with a line feed, if there is just one record it can have torn.
        """
        if b"\n" not in region:
            return []
        region = region[-_REGION_BYTES:].replace(b"\r", b"").rstrip(b"\n")
        cleaned = _KERNEL_MESSAGE.sub(b"", region + b"\n").rstrip(b"\n")
        whole = [self._parsed(match[0]) for match in self._record.finditer(cleaned)]
        if whole:
            return [record for record in whole if record is not None]
        if not self._mendings_left:
            return []
        self._mendings_left -= 1
        ends = [at for at, byte in enumerate(region) if byte == 0x0A][-_ENDS_MAX:]
        candidates = set()
        for end in ends:
            for begin in range(end + 1):
                text = region[:begin] + region[end + 1 :]
                start = text.rfind(self._begin)
                if start >= 0 and (found := self._parsed(text[start:])) is not None:
                    candidates.add(found)
        return list(candidates) if len(candidates) == 1 else []
