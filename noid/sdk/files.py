"""Single files of a guest, as bytes."""

from __future__ import annotations

from contextlib import closing
from hashlib import sha256

from noid.client import files
from noid.client.files import GuestPath
from noid.client.link import Link
from noid.errors import TooLarge


async def read_file(link: Link, vm: str, path: str, user: str | None, bytes_max: int) -> bytes:
    """See `Vm.read_file`."""
    place = GuestPath(vm=vm, path=path, user=user)
    content = bytearray()
    with closing(await files.download(link, place, tar=False)) as answer:
        while piece := await answer.piece():
            content += piece
            if len(content) > bytes_max:
                raise TooLarge(
                    f"{place} has more than {bytes_max} bytes. Copy it, or read it with a greater bytes_max."
                )
    return bytes(content)


async def write_file(link: Link, vm: str, path: str, data: bytes, mode: int | None, user: str | None) -> None:
    """See `Vm.write_file`."""
    place = GuestPath(vm=vm, path=path, user=user)
    digest = sha256(data).hexdigest()
    await files.upload(link, place, [data], size=len(data), mode=mode, mtime_ns=None, sha256=digest)
