"""Tar streams, read and written: POSIX pax headers and GNU's sparse files 1.0, which is what guests speak.

Read is only what is bounded: a header of at most `EXTENSION_BYTES_MAX`, a sparse map of at most `SEGMENTS_MAX` pieces.
``tarfile`` takes whatever a header announces into memory, which is no way to meet a guest. Names are bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from noid.errors import BackendError

BLOCK = 512
PATH_BYTES_MAX = 4095
EXTENSION_BYTES_MAX = 65536
SEGMENTS_MAX = 16384
END = bytes(2 * BLOCK)

FILE, HARD_LINK, SYMLINK, DIRECTORY = b"0", b"1", b"2", b"5"
_PAX, _PAX_GLOBAL = b"x", b"g"
_COMMENT = b"noid: "
_ID_MAX = (1 << 32) - 2
_SIZE_MAX = (1 << 63) - 1
_SECONDS = re.compile(rb"(-?)(\d{1,18})(?:\.(\d*))?")


@dataclass(slots=True, kw_only=True)
class Entry:
    """One thing in a tar stream. *size* is a file's, holes included; *segments* say where a sparse one has data.

    *kind* is the format's own letter; what is none of the four above is for the reader to leave out.
    """

    kind: bytes
    path: bytes
    link: bytes = b""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    segments: list[tuple[int, int]] | None = None
    _data: int = field(default=0, repr=False)


def padding(size: int) -> bytes:
    """Return what fills the last block of *size* bytes."""
    return bytes(-size % BLOCK)


# --- writing --------------------------------------------------------------------------------------------------------


def headers_of(entry: Entry) -> bytes:
    """Return everything of *entry* that precedes its data, a sparse file's map included."""
    records: list[tuple[bytes, bytes]] = []
    size, name, sparse_map = entry.size, entry.path, b""
    if entry.segments is not None:
        numbers = [len(entry.segments), *(n for segment in entry.segments for n in segment)]
        sparse_map = b"".join(b"%d\n" % number for number in numbers)
        sparse_map += padding(len(sparse_map))
        size = len(sparse_map) + sum(length for _, length in entry.segments)
        name = b"GNUSparseFile.0"
        records += [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", entry.path),
            (b"GNU.sparse.realsize", b"%d" % entry.size),
        ]
    elif len(entry.path) > 100:
        records.append((b"path", entry.path))
    if len(entry.link) > 100:
        records.append((b"linkpath", entry.link))
    if any(not (key + value).isascii() for key, value in records):
        records.insert(0, (b"hdrcharset", b"BINARY"))  # names are bytes, not characters
    records += [
        (key, b"%d" % value)
        for key, value, digits in ((b"size", size, 11), (b"uid", entry.uid, 7), (b"gid", entry.gid, 7))
        if value >> 3 * digits
    ]
    seconds, nanos = divmod(entry.mtime_ns, 1_000_000_000)
    if nanos or seconds < 0 or seconds >> 33:
        whole, fraction = divmod(abs(entry.mtime_ns), 1_000_000_000)
        records.append((b"mtime", b"%s%d.%09d" % (b"-" if entry.mtime_ns < 0 else b"", whole, fraction)))
    extension = b"".join(_record(key, value) for key, value in records)
    head = _block(Entry(kind=_PAX, path=b"././@PaxHeader", mode=0o644), b"././@PaxHeader", len(extension))
    before = head + extension + padding(len(extension)) if extension else b""
    return before + _block(entry, name, size) + sparse_map


def _record(key: bytes, value: bytes) -> bytes:
    """Return a pax record, whose length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _block(entry: Entry, name: bytes, size: int) -> bytes:
    def octal(value: int, width: int) -> bytes:
        return b"%0*o\0" % (width - 1, value if 0 <= value < 8 ** (width - 1) else 0)

    block = bytearray(
        name[:100].ljust(100, b"\0")
        + octal(entry.mode & 0o7777, 8)
        + octal(entry.uid, 8)
        + octal(entry.gid, 8)
        + octal(size, 12)
        + octal(entry.mtime_ns // 1_000_000_000, 12)
        + b" " * 8
        + entry.kind
        + entry.link[:100].ljust(100, b"\0")
        + b"ustar\00000"
    ).ljust(BLOCK, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# --- reading --------------------------------------------------------------------------------------------------------


class TarReader:
    """Entries of a tar stream that arrives in *pieces*. The data of each may be read before the next is asked for.

    *comments* collects what the sender says it left out, up to a hundred lines.

    Raises:
        BackendError: from everything, if the stream is no tar stream, or ends before its end.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.comments: list[str] = []
        self._pieces = pieces
        self._buffer = memoryview(b"")
        self._left = self._padding = 0  # of the entry's data and padding

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries, until the archive's end."""
        extension: dict[bytes, bytes] = {}
        held = 0  # bytes of headers since the last entry: what `extension` may have been made of
        while True:
            self._skip(self._left)
            self._left = 0
            block = self._exactly(BLOCK)
            if not any(block):
                for _ in self._pieces:
                    pass  # padding behind the end, and that the stream itself ends well
                return
            entry = _parsed(block)
            if entry.kind in (_PAX, _PAX_GLOBAL):
                held += entry.size if entry.kind == _PAX else 0
                if max(held, entry.size) > EXTENSION_BYTES_MAX:
                    raise _broken(f"a header of {max(held, entry.size)} bytes")
                records = _records(self._exactly(entry.size))
                self._skip(-entry.size % BLOCK)
                if entry.kind == _PAX:
                    extension = extension | records
                elif (comment := records.get(b"comment", b"")).startswith(_COMMENT) and len(self.comments) < 100:
                    self.comments.append(shown(comment.removeprefix(_COMMENT)))
                continue
            self._extend(entry, extension)
            extension, held = {}, 0
            yield entry

    def data(self) -> Iterator[bytes]:
        """Yield the data of the entry that came last: of a sparse file, of its segments one after the other."""
        while self._left > self._padding:
            piece = self._some(self._left - self._padding)
            self._left -= len(piece)
            yield piece

    def _extend(self, entry: Entry, extension: dict[bytes, bytes]) -> None:
        try:
            entry.path = extension.get(b"GNU.sparse.name", extension.get(b"path", entry.path))
            entry.link = extension.get(b"linkpath", entry.link)
            if entry.kind == FILE:
                entry.size = _number(extension.get(b"size"), entry.size)
            entry.uid = _number(extension.get(b"uid"), entry.uid, _ID_MAX)
            entry.gid = _number(extension.get(b"gid"), entry.gid, _ID_MAX)
            entry.mtime_ns = _time(extension.get(b"mtime"), entry.mtime_ns)
        except ValueError:
            raise _broken("a header that makes no sense") from None
        if any(not len(name) <= PATH_BYTES_MAX or b"\0" in name for name in (entry.path, entry.link)):
            raise _broken("a name that makes no sense")
        self._padding = -entry.size % BLOCK
        self._left = entry.size + self._padding
        if b"GNU.sparse.major" in extension:
            self._take_map(entry, extension)
        elif any(key.startswith(b"GNU.sparse.") for key in extension):
            raise _broken("a sparse file of a kind not known here")

    def _take_map(self, entry: Entry, extension: dict[bytes, bytes]) -> None:
        """Read a sparse file's map, which is the beginning of its data; it must describe exactly the rest."""
        version = extension.get(b"GNU.sparse.major"), extension.get(b"GNU.sparse.minor")
        size = extension.get(b"GNU.sparse.realsize", b"")
        if entry.kind != FILE or version != (b"1", b"0") or not size.isdigit() or len(size) > 18:
            raise _broken("a sparse file of a kind not known here")
        stored, used, held = entry.size, 0, b""
        entry.size, entry.segments, end = int(size), [], 0

        def number() -> int:
            nonlocal used, held
            while b"\n" not in held:
                if len(held) > 20 or used + BLOCK > stored:
                    raise _broken("nonsense in a sparse file's map")
                held += self._exactly(BLOCK)
                used += BLOCK
            text, _, held = held.partition(b"\n")
            if not text.isdigit() or len(text) > 18:
                raise _broken("nonsense in a sparse file's map")
            return int(text)

        count = number()
        if count > SEGMENTS_MAX:
            raise _broken(f"a sparse file of {count} pieces")
        for _ in range(count):
            at, length = number(), number()
            if at < end or at + length > entry.size:
                raise _broken("a sparse file's map that does not fit the file")
            entry.segments.append((at, length))
            end = at + length
        if used + sum(length for _, length in entry.segments) != stored:
            raise _broken("a sparse file's map that does not fit its data")
        self._left -= used

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _some(self, most: int) -> bytes:
        while not self._buffer:
            piece = next(self._pieces, None)
            if piece is None:
                raise _broken("an end in the middle")
            self._buffer = memoryview(piece)
        found, self._buffer = self._buffer[:most], self._buffer[most:]
        return bytes(found)

    def _exactly(self, count: int) -> bytes:
        if len(self._buffer) >= count:
            return self._some(count) if count else b""
        found = bytearray()
        while len(found) < count:
            found += self._some(count - len(found))
        return bytes(found)

    def _skip(self, count: int) -> None:
        while count:
            count -= len(self._some(count))


def shown(name: bytes) -> str:
    """Return *name* so that a terminal can show it."""
    text = name.decode("utf-8", "replace")
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _broken(what: str) -> BackendError:
    return BackendError(f"the guest's stream has {what}. What came before it has been copied; the VM still runs.")


def _parsed(block: bytes) -> Entry:
    try:
        said = _octal(block[148:156])
        if said != sum(block) - sum(block[148:156]) + 8 * 32:
            raise ValueError
        kind = block[156:157]
        name = block[:100].partition(b"\0")[0]
        prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
        return Entry(
            kind=FILE if kind in (b"\0", b"7") else kind,
            path=prefix + b"/" + name if prefix else name,
            link=block[157:257].partition(b"\0")[0],
            mode=_octal(block[100:108]) & 0o7777,
            uid=_octal(block[108:116]),
            gid=_octal(block[116:124]),
            size=_octal(block[124:136]) if kind not in (HARD_LINK, SYMLINK, DIRECTORY) else 0,
            mtime_ns=_octal(block[136:148]) * 1_000_000_000,
        )
    except ValueError:
        raise _broken("something in it that is no tar") from None


def _octal(text: bytes) -> int:
    digits = text.partition(b"\0")[0].strip(b" ")
    if digits and not digits.isdigit():  # int() knows signs and underscores
        raise ValueError
    return int(digits or b"0", 8)


def _records(data: bytes) -> dict[bytes, bytes]:
    records = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        digits = data[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1 : end] != b"\n" or not equals or not key:
            raise _broken("a header that makes no sense")
        records[key] = value
        at = end
    return records


def _number(text: bytes | None, default: int, most: int = _SIZE_MAX) -> int:
    if text is None:
        return default
    if not text.isdigit() or len(text) > 19 or int(text) > most:
        raise ValueError
    return int(text)


def _time(text: bytes | None, default: int) -> int:
    if text is None:
        return default
    found = _SECONDS.fullmatch(text)
    if found is None:
        raise ValueError
    sign, whole, fraction = found.groups()
    nanos = int(whole) * 1_000_000_000 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -nanos if sign else nanos


def local_entry(path: bytes, status: os.stat_result, kind: bytes, link: bytes = b"") -> Entry:
    """Return the entry of a local thing that is *path* in the archive."""
    return Entry(
        kind=kind,
        path=path,
        link=link,
        mode=status.st_mode & 0o7777,
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind == FILE else 0,
        mtime_ns=status.st_mtime_ns,
    )
