"""The smallest guest there is for Firecracker: it counts, says a word on the serial line and resets the machine.

Opening ``/dev/kvm``, and even starting a machine on it, proves nothing: there are hosts where the instructions of a
guest are interpreted one by one, and a Linux dies after minutes while Firecracker ends with status 0. So code has to
run, and at a CPU's speed. Counting to six and a half million takes a real CPU a few milliseconds.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

WORD = b"kvm works"
_ADDRESS = 0x100_0000
_SERIAL = 0x3F8
_MARK = b"noid-kvm-trial:"  # for whoever looks into the file, and for the simulated Firecracker
_COUNT = bytes.fromhex(
    "b9 80 96 98 00"  # mov ecx, 10000000
    "ff c9"  # dec ecx
    "75 fc"  # jnz to the dec
)
_RESET = bytes.fromhex(
    "b0 fe"  # mov al, 0xfe: pulse the CPU's reset line
    "e6 64"  # out 0x64, al: by the keyboard controller, which ends Firecracker
    "f4"  # hlt
    "eb fd"  # jmp to the hlt
)


def kernel() -> bytes:
    """Return an ELF file that Firecracker boots in 64-bit mode."""
    say = b"\x66\xba" + struct.pack("<H", _SERIAL)  # mov dx, the port
    for byte in WORD:
        say += bytes([0xB0, byte, 0xEE])  # mov al, byte; out dx, al
    code = _COUNT + say + _RESET + b"\0" + _MARK + WORD + b"\n"
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, _ADDRESS, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0x1000, _ADDRESS, _ADDRESS, len(code), len(code), 0x1000)
    return (header + segment).ljust(0x1000, b"\0") + code


def write_files(directory: Path) -> Path:
    """Write what a trial needs into *directory* and return the configuration file."""
    (directory / "kernel").write_bytes(kernel())
    config = directory / "config.json"
    source = {"kernel_image_path": str(directory / "kernel"), "boot_args": "console=ttyS0"}
    shape = {"vcpu_count": 1, "mem_size_mib": 32}
    config.write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": shape}))
    return config
