"""A guest that talks for ever does not fill the host's disk."""

from __future__ import annotations

from pathlib import Path

from noid_vmm_qemu.console_log import OCCUPIED_BYTES_MAX, shorten


def test_a_long_log_gives_its_beginning_back_and_keeps_end_and_length(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    content = b"0123456789abcdef" * ((OCCUPIED_BYTES_MAX + (1 << 20)) // 16)
    path.write_bytes(content)

    assert shorten(path)

    facts = path.stat()
    assert facts.st_size == len(content)
    assert facts.st_blocks * 512 < OCCUPIED_BYTES_MAX // 2
    assert path.read_bytes()[-(4 << 20) :] == content[-(4 << 20) :]
    assert not shorten(path)


def test_a_short_or_missing_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    assert not shorten(path)
    path.write_bytes(b"login: ")

    assert not shorten(path)
    assert path.read_bytes() == b"login: "
