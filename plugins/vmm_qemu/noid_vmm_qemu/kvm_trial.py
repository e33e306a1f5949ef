"""The smallest guest there is: a ROM that proves a CPU executes code, and says so by QEMU's exit status."""

from __future__ import annotations

_ROM_BYTES = 65536
_RESET_VECTOR = 0xFFF0
_VALUE = 0x2A
# mov al, _VALUE; out 0xf4, al (isa-debug-exit); hlt
_CODE = bytes([0xB0, _VALUE, 0xE6, 0xF4, 0xF4])

EXIT_STATUS = _VALUE << 1 | 1  # what isa-debug-exit makes of the value written to it


def rom() -> bytes:
    """Return the ROM, to be given as ``-bios``."""
    content = bytearray(b"\xf4" * _ROM_BYTES)  # hlt, wherever a CPU goes astray
    content[_RESET_VECTOR : _RESET_VECTOR + len(_CODE)] = _CODE
    return bytes(content)
