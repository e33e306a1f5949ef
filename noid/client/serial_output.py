"""What a command wrote that a server before 0.3.0 ran, which typed it at a prompt and may leave its marks in there."""

from __future__ import annotations

import re

from noid.core.wire import ExecResult

MARK = b"_".join((b"NOID", b"EXEC", b""))  # in one word, it would look like the name of an environment variable
_LEFT_OVER = re.compile(MARK + rb"[0-9a-f]{8}_EXIT(\d{1,3})\s*\Z")
_LEFT_OVER_BYTES_MAX = 40


class SerialOutput:
    """Output that came over a serial line, whose end may be the marker that was to tell the exit code.

    That is so when the output does not end its last line; the server then does not know the code, and it is here.
    """

    def __init__(self) -> None:
        self._kept = b""

    def feed(self, data: bytes) -> bytes:
        """Return what of the output so far is output for sure."""
        whole = self._kept + data
        start = whole.rfind(MARK, max(0, len(whole) - _LEFT_OVER_BYTES_MAX))
        self._kept = whole[start:] if start >= 0 else whole[-len(MARK) :]
        return whole[: len(whole) - len(self._kept)]

    def end(self, result: ExecResult) -> tuple[bytes, ExecResult]:
        """Return the rest of the output and the result, with its exit code if that was at the end of the output."""
        found = None if result.timed_out or result.exit_code is not None else _LEFT_OVER.search(self._kept)
        if found is None:
            return self._kept, result
        return self._kept[: found.start()], ExecResult(exit_code=int(found[1]), truncated=result.truncated)
