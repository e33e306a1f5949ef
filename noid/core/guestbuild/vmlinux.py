"""Recognises kernels and takes them out of their wrapping: VMMs boot the bare kernel, distributions ship it compressed.

x86: a ``bzImage`` says where its compressed ``vmlinux`` is (``Documentation/arch/x86/boot.rst``). arm64: an ``Image``,
plain, gzipped, or as EFI zboot (``drivers/firmware/efi/libstub/zboot-header.S``).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import struct
import zlib
from dataclasses import dataclass, field

from noid.core.guestbuild import programs
from noid.errors import BackendError, InvalidRequest

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_BANNER = re.compile(rb"Linux version (\S+) ")
_BZIMAGE_MAGIC = b"HdrS"
_ARM64_MAGIC = b"ARM\x64"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFile:
    """A kernel as a VMM takes it. *release* is as in ``uname -r``, *architecture* as in ``uname -m``."""

    architecture: str
    release: str
    content: bytes = field(repr=False)


def unwrapped(data: bytes, name: str) -> KernelFile:
    """Return the bare kernel in *data*; *name* is for messages.

    Raises:
        InvalidRequest: it is no kernel; says what it looks like and what is accepted.
        DependencyDown: it is packed with something that needs a program that is not installed.
    """
    accepted = "A kernel is an ELF vmlinux or a bzImage (as in /boot/vmlinuz-*), or an Image on arm64."
    if not data:
        raise InvalidRequest(f"{name} is empty, so it is no kernel. {accepted}")
    try:
        content = _bare(data)
    except (_NotPacked, lzma.LZMAError, zlib.error, OSError, EOFError, BackendError, struct.error) as error:
        raise InvalidRequest(f"{name} looks like a kernel but cannot be unpacked ({error}). Is it complete?") from error
    architecture = _architecture(content)
    banner = _BANNER.search(content)
    if architecture is None or banner is None:
        what = "an ELF file without Linux in it" if content.startswith(b"\x7fELF") else f"it begins with {data[:4]!r}"
        raise InvalidRequest(f"{name} is no Linux kernel for x86_64 or aarch64: {what}. {accepted}")
    return KernelFile(architecture=architecture, release=banner[1].decode(errors="replace"), content=content)


def decompressed(data: bytes) -> bytes:
    """Return *data* unpacked by whatever its first bytes say, or as it is. Garbage after the end is not tolerated.

    Raises:
        DependencyDown: needs a program that is not installed.
        BackendError, OSError, lzma.LZMAError, zlib.error, EOFError: it is damaged.
    """
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    if data.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return lzma.decompress(data)
    if data.startswith(b"BZh"):
        return bz2.decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return programs.run(["zstd", "-dcq"], "unpacking zstd", stdin=data)
    if data.startswith((b"\x02\x21\x4c\x18", b"\x04\x22\x4d\x18")):
        return programs.run(["lz4", "-dcq", "-", "-"], "unpacking lz4", stdin=data)
    if data.startswith(b"\x89LZO"):
        return programs.run(["lzop", "-dcq"], "unpacking lzo", stdin=data)
    return data


class _NotPacked(Exception):
    """The header promises a payload that is not there."""


def _bare(data: bytes) -> bytes:
    if data[0x202:0x206] == _BZIMAGE_MAGIC:
        return _bzimage_payload(data)
    if data[4:8] == b"zimg":
        offset, size = struct.unpack_from("<II", data, 8)
        return decompressed(data[offset : offset + size])
    return decompressed(data)


def _bzimage_payload(data: bytes) -> bytes:
    protocol = struct.unpack_from("<H", data, 0x206)[0]
    if protocol < 0x208:
        raise _NotPacked(f"boot protocol {protocol >> 8}.{protocol & 0xFF} does not say where the payload is")
    sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = data[start : start + length]
    if len(payload) < length or not length:
        raise _NotPacked(f"it has {len(data)} bytes, but its payload ends at {start + length}")
    if payload.startswith(b"\x1f\x8b"):
        # zlib knows where the stream ends; some builds leave the length after it, some do not
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        content = stream.decompress(payload)
        if not stream.eof:
            raise _NotPacked("its payload ends too early")
        return content
    if payload.startswith(b"\x7fELF"):
        return payload
    # every other packer is followed by the unpacked length, which is not part of its stream
    content = decompressed(payload[:-4])
    promised = struct.unpack("<I", payload[-4:])[0]
    if len(content) != promised:
        raise _NotPacked(f"{len(content)} bytes came out of its payload instead of {promised}")
    return content


def _architecture(content: bytes) -> str | None:
    if content.startswith(b"\x7fELF\x02\x01") and len(content) > 64:
        return _ELF_MACHINES.get(struct.unpack_from("<H", content, 18)[0])
    if content[56:60] == _ARM64_MAGIC:
        return "aarch64"
    return None
