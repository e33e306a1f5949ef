"""A guest that talks for ever does not fill the host's disk."""

from __future__ import annotations

import os
from pathlib import Path

from noid.vmmhost.console_log import BEGINNING_BYTES, END_BYTES, OCCUPIED_BYTES_MAX, is_long, shorten


def test_a_long_log_gives_its_middle_back_and_keeps_beginning_end_and_length(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    content = b"0123456789abcdef" * ((OCCUPIED_BYTES_MAX + (1 << 20)) // 16)
    path.write_bytes(content)

    assert is_long(path)
    assert shorten(path)
    assert not is_long(path)

    facts = path.stat()
    assert facts.st_size == len(content)
    assert facts.st_blocks * 512 <= END_BYTES + BEGINNING_BYTES + (128 << 10)
    assert path.read_bytes()[-END_BYTES:] == content[-END_BYTES:]
    assert path.read_bytes()[:BEGINNING_BYTES] == content[:BEGINNING_BYTES]
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == BEGINNING_BYTES
        assert len(content) - END_BYTES - (64 << 10) < os.lseek(file.fileno(), BEGINNING_BYTES, os.SEEK_DATA)
    assert not shorten(path)


def test_a_short_or_missing_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    assert not is_long(path)
    assert not shorten(path)
    path.write_bytes(b"login: ")

    assert not shorten(path)
    assert path.read_bytes() == b"login: "
