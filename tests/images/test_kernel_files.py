"""Kernels in the wrappings distributions ship them in, and the modules that go with them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable

import pytest

from noid.core.guestbuild import programs
from noid.core.guestbuild.modules import boot_modules, initrd_files, module_name
from noid.core.guestbuild.vmlinux import unwrapped
from noid.errors import InvalidRequest
from noid.testing.guests import FAKE_RELEASE, fake_kernel, fake_module


def by_program(*argv: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        program = programs.find(argv[0])
        if program is None:
            pytest.skip(f"{argv[0]} is missing")
        return subprocess.run([program, *argv[1:]], input=data, stdout=subprocess.PIPE, check=True).stdout

    return pack


def bzimage(payload: bytes) -> bytes:
    """Return *payload* behind the header of the x86 boot protocol, with something after it, as signed kernels have."""
    sectors = 4
    header = bytearray((sectors + 1) * 512)
    header[0x1F1] = sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, 0x20F)
    struct.pack_into("<II", header, 0x248, 16, len(payload))
    return bytes(header) + bytes(16) + payload + b"a signature"


PACKERS = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": by_program("zstd", "-cq"),
    "lz4": by_program("lz4", "-lcq", "-", "-"),
    "lzo": by_program("lzop", "-cq"),
}


@pytest.mark.parametrize("packer", PACKERS)
def test_the_kernel_inside_a_bzimage_is_found_whatever_packed_it(packer: str) -> None:
    kernel = fake_kernel(architecture="x86_64", filling=bytes(range(256)) * 40)
    payload = PACKERS[packer](kernel)
    if packer != "gzip":
        payload += struct.pack("<I", len(kernel))

    found = unwrapped(bzimage(payload), "vmlinuz")

    assert (found.content, found.release, found.architecture) == (kernel, FAKE_RELEASE, "x86_64")


def test_a_bare_kernel_stays_as_it_is() -> None:
    kernel = fake_kernel(architecture="x86_64")
    assert unwrapped(kernel, "vmlinux").content == kernel


@pytest.mark.parametrize("wrap", [lambda image: image, gzip.compress], ids=["plain", "gzip"])
def test_an_arm64_image_is_known_by_its_header(wrap: Callable[[bytes], bytes]) -> None:
    image = bytearray(b"Linux version 6.12.0-arm64 (x)".rjust(120, b"\0"))
    image[56:60] = b"ARM\x64"
    found = unwrapped(wrap(bytes(image)), "Image")
    assert (found.architecture, found.release, found.content) == ("aarch64", "6.12.0-arm64", bytes(image))


def test_an_arm64_efi_zboot_image_is_unpacked() -> None:
    image = bytearray(b"Linux version 6.12.0-arm64 (x)".rjust(120, b"\0"))
    image[56:60] = b"ARM\x64"
    payload = gzip.compress(bytes(image))
    zboot = b"MZ\0\0zimg" + struct.pack("<II", 64, len(payload))
    assert unwrapped(zboot.ljust(64, b"\0") + payload + b"tail", "vmlinuz").content == bytes(image)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"root:x:0:0", "begins with b'root'"),
        (b"\x7fELF\x02\x01" + bytes(100), "an ELF file without Linux in it"),
        (gzip.compress(b"a text"), "begins with"),
        (gzip.compress(fake_kernel())[:40], "cannot be unpacked"),
        (bzimage(gzip.compress(fake_kernel()))[:2600], "cannot be unpacked"),
        (bzimage(lzma.compress(fake_kernel()) + b"\x01\0\0\0"), "cannot be unpacked"),
        (bzimage(bytes(100)), "cannot be unpacked"),
        (b"MZ", "begins with b'MZ'"),
    ],
    ids=["empty", "text", "program", "packed text", "cut gzip", "cut bzImage", "wrong length", "no payload", "stub"],
)
def test_what_is_no_kernel_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        unwrapped(data, "the kernel x")
    assert str(refused.value).startswith("the kernel x")
    assert "\n" not in str(refused.value)


def test_modules_come_after_what_they_depend_on() -> None:
    files = {
        "lib/modules/x/kernel/virtio_net.ko": fake_module("net_failover,virtio"),  # virtio is built in: no file
        "lib/modules/x/kernel/net_failover.ko.xz": lzma.compress(fake_module("failover")),
        "lib/modules/x/kernel/failover.ko.gz": gzip.compress(fake_module()),
        "lib/modules/x/kernel/virtio_mmio.ko": fake_module(),
        "lib/modules/x/kernel/virtio-rng.ko": fake_module(),
        "lib/modules/x/kernel/floppy.ko": fake_module(),
        "lib/modules/x/modules.builtin": b"kernel/virtio.ko\n",
    }

    chosen = boot_modules(files, files.__getitem__)

    assert [m.name for m in chosen] == ["virtio_mmio", "virtio_rng", "failover", "net_failover", "virtio_net"]
    assert {m.release for m in chosen} == {FAKE_RELEASE}
    assert list(initrd_files(chosen))[:2] == ["noid/modules/00-virtio_mmio.ko", "noid/modules/01-virtio_rng.ko"]
    assert chosen[2].content == fake_module()


def test_modules_that_depend_on_each_other_do_not_hang_the_build() -> None:
    files = {"virtio_net.ko": fake_module("ext4"), "ext4.ko": fake_module("virtio_net")}
    assert {m.name for m in boot_modules(files, files.__getitem__)} == {"virtio_net", "ext4"}


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b/virtio-rng.ko.zst", "virtio_rng"), ("ext4.ko", "ext4"), ("modules.dep", None), ("x.ko.sig", None)],
)
def test_a_module_is_called_as_the_kernel_calls_it(path: str, name: str | None) -> None:
    assert module_name(path) == name
