"""The smallest guest there is: a ROM that proves a CPU executes code, and at a CPU's speed, by QEMU's exit status.

Counting to six and a half million takes a real CPU 10 ms and an emulated one 100. A nested KVM whose instructions are
interpreted one by one runs the ROM's first lines as well as any other, but needs minutes to count; a Linux on it
seems to hang. Emulation is faster there, so not coming to the end in time counts as not working.
"""

from __future__ import annotations

_ROM_BYTES = 65536
_RESET_VECTOR = 0xFFF0
_VALUE = 0x2A
_TO_START = bytes.fromhex("e9 0d 00")  # jmp to the beginning of the segment: 0xfff0 + 3 + 0x0d = 0x10000
_COUNT = bytes.fromhex(
    "ba 64 00"  # mov dx, 100
    "b9 ff ff"  # mov cx, 65535
    "e2 fe"  # loop to itself
    "4a"  # dec dx
    "75 f8"  # jnz to mov cx
)
_SAY_SO = bytes([0xB0, _VALUE, 0xE6, 0xF4, 0xF4])  # mov al, _VALUE; out 0xf4, al (isa-debug-exit); hlt

EXIT_STATUS = _VALUE << 1 | 1  # what isa-debug-exit makes of the value written to it


def rom() -> bytes:
    """Return the ROM, to be given as ``-bios``."""
    content = bytearray(b"\xf4" * _ROM_BYTES)  # hlt, wherever a CPU goes astray
    content[: len(_COUNT) + len(_SAY_SO)] = _COUNT + _SAY_SO
    content[_RESET_VECTOR : _RESET_VECTOR + len(_TO_START)] = _TO_START
    return bytes(content)
