"""What is left of the predecessor's marks in its output is found however it is cut; nothing else is taken for it."""

from __future__ import annotations

import pytest

from noid.client.serial_output import SerialOutput
from noid.core.wire import ExecResult

UNKNOWN = ExecResult(exit_code=None)
MARK = b"NOID_EXEC_0a1b2c3d_EXIT7"


def read(output: bytes, size: int, result: ExecResult) -> tuple[bytes, int | None]:
    serial = SerialOutput()
    shown = b"".join(serial.feed(output[at : at + size]) for at in range(0, len(output), size))
    rest, result = serial.end(result)
    return shown + rest, result.exit_code


@pytest.mark.parametrize("size", [1, 3, 24, 1000])
@pytest.mark.parametrize("output", [b"", b"out", b"NOID_EXEC_", b"NOID_EXEC_zz", b"x" * 100, MARK + b" and more "])
def test_a_code_that_was_lost_is_found_at_the_end(output: bytes, size: int) -> None:
    assert read(output + MARK, size, UNKNOWN) == (output, 7)
    assert read(output, size, UNKNOWN) == (output, None)


def test_output_that_looks_like_a_mark_stays_where_the_code_is_known() -> None:
    assert read(MARK, 5, ExecResult(exit_code=0)) == (MARK, 0)
    assert read(MARK, 5, ExecResult(exit_code=None, timed_out=True)) == (MARK, None)
