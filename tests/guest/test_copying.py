"""Files in and out through the real agent: what comes back is what went in, and nothing leads out of the tree."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import tarfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noid_exec_vsock.guest import AgentGuest, connect

from noid.client.packing import Packing
from noid.client.tarstream import TarReader
from noid.client.unpacking import Limits, Unpacking
from noid.core.guests import files
from noid.core.guests.files import Written
from noid.core.model.files import FileTransfer
from noid.errors import BackendError, Conflict, InvalidRequest, NotFound

from .conftest import NativeAgent, to, until

NAMES = st.binary(min_size=1, max_size=120).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
)


async def some(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def unpack(guest: AgentGuest, archive: Iterator[bytes], directory: Path) -> Written:
    request = FileTransfer(incoming=True, form="tar", path=str(directory))
    async with files.writing(guest, request) as writing:
        return await writing.fill(some(archive), lambda _: None)


async def pack(guest: AgentGuest, directory: Path) -> bytes:
    stream = bytearray()
    async with files.reading(guest, str(directory), user=None, tar=True) as reading:
        while data := await reading.receive():
            stream += data
    return bytes(stream)


async def put(guest: AgentGuest, path: Path, data: bytes, *, whole: bytes | None = None, offset: int = 0) -> Written:
    whole = data if whole is None else whole
    request = FileTransfer(
        incoming=True,
        form="file",
        path=str(path),
        offset=offset,
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
    )
    async with files.writing(guest, request) as writing:
        return await writing.fill(some(iter([data])), lambda _: None)


def here(stream: bytes, directory: Path) -> list[str]:
    left_out: list[str] = []
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        Unpacking(descriptor, Limits(), left_out.append, owners=False).run(TarReader(iter([stream])))
    finally:
        os.close(descriptor)
    return left_out


def seen(top: Path) -> dict[bytes, tuple[object, ...]]:
    """Return what a copy must keep of everything below *top*."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, bytes] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file():
            content = path.read_bytes(), inodes.setdefault(status.st_ino, os.fsencode(path.relative_to(top)))
        found[os.fsencode(path.relative_to(top))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def grow(top: Path, chance: random.Random) -> None:
    """Make a random tree: names of any bytes, holes, hard links, symlinks, modes, times before and after 1970."""
    below = top / "below"
    below.mkdir(parents=True)
    for number in range(chance.randrange(6)):
        name = bytes(chance.choice([b for b in range(1, 256) if b != 0x2F]) for _ in range(chance.randrange(3, 130)))
        path = below / os.fsdecode(name)
        with path.open("wb") as file:
            if chance.random() < 0.4:
                file.truncate(size := chance.randrange(1, 1 << 22))
                file.seek(size // 2)
                file.write(b"between two holes")
            else:
                file.write(chance.randbytes(chance.randrange(3000)))
        path.chmod(chance.choice([0o600, 0o755, 0o444, 0o640]))
        os.utime(path, ns=(0, chance.randrange(-(10**18), 4 * 10**18)))
        (top / f"link{number}").hardlink_to(path)
    (below / "symlink").symlink_to("../link0")
    below.chmod(0o555)


@pytest.mark.parametrize("seed", range(10))
async def test_a_tree_that_went_in_and_came_out_is_the_same(guest: AgentGuest, tmp_path: Path, seed: int) -> None:
    top = tmp_path
    grow(top / "from", random.Random(seed))  # noqa: S311  # repeatable, not secret
    (top / "back").mkdir()
    left_out: list[str] = []

    written = await unpack(guest, Packing(str(top / "from"), left_out.append).pieces(), top / "guest")
    stream = await pack(guest, top / "guest")
    assert (here(stream, top / "back"), left_out, written.left_out) == ([], [], ())

    assert seen(top / "guest") == seen(top / "from")
    assert seen(top / "back") == seen(top / "from")
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert len(archive.getmembers()) == len(seen(top / "from")) + 1


def archive_of(*members: tuple[str, bytes, str]) -> bytes:
    """Return a tar of (name, kind, link target or content)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, text in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
            else:
                info.linkname = text
                archive.addfile(info)
    return stream.getvalue()


HOSTILE = archive_of(
    ("good", tarfile.REGTYPE, "good"),
    ("/absolute", tarfile.REGTYPE, "bad"),
    ("../above", tarfile.REGTYPE, "bad"),
    ("a/../../above", tarfile.REGTYPE, "bad"),
    ("out", tarfile.SYMTYPE, "../outside"),
    ("out/through", tarfile.REGTYPE, "bad"),
    ("hard", tarfile.LNKTYPE, "../outside/secret"),
    ("hard", tarfile.LNKTYPE, "out/secret"),
    ("device", tarfile.CHRTYPE, ""),
    ("pipe", tarfile.FIFOTYPE, ""),
    ("last", tarfile.REGTYPE, "last"),
)


@pytest.mark.parametrize("side", ["guest", "host"])
async def test_what_a_hostile_archive_wants_outside_is_left_out_and_the_rest_is_there(
    guest: AgentGuest, tmp_path: Path, side: str
) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_text("secret")
    if side == "guest":
        left_out: list[str] = list((await unpack(guest, iter([HOSTILE]), inside)).left_out)
    else:
        left_out = here(HOSTILE, inside)
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]
    assert (outside / "secret").read_text() == "secret"
    assert {path.name for path in inside.iterdir()} - {"a", "out"} == {"good", "last"}
    # In the guest a link may point anywhere, as in what was copied; on the host one that leads out is left out.
    assert (inside / "out").is_symlink() == (side == "guest")
    assert len(left_out) >= 7


def test_links_whose_way_out_is_hidden_behind_other_links_are_left_out_on_the_host(tmp_path: Path) -> None:
    tricks = archive_of(
        ("deep/er/up", tarfile.SYMTYPE, "../.."),
        ("trick", tarfile.SYMTYPE, "deep/er/up/../outside"),
        ("fine", tarfile.SYMTYPE, "deep/er/up/deep"),
    )
    left_out = here(tricks, tmp_path)
    assert [line.partition(":")[0] for line in left_out] == ["trick"]
    assert (tmp_path / "fine").resolve() == tmp_path / "deep"


async def test_a_file_that_broke_off_keeps_its_old_content_and_can_be_gone_on_with(
    guest: AgentGuest, tmp_path: Path
) -> None:
    target, whole = tmp_path / "file", os.urandom(300_000)
    target.write_text("old")

    def disagree(_: str) -> None:
        raise InvalidRequest("not what was announced")

    request = FileTransfer(incoming=True, form="file", path=str(target), size=len(whole))
    with pytest.raises(InvalidRequest):
        async with files.writing(guest, request) as writing:
            await writing.fill(some(iter([whole[:200_000]])), disagree)
    assert target.read_text() == "old"
    part = tmp_path / "file.noid-part"
    size = part.stat().st_size
    assert part.read_bytes() == whole[:size]

    assert (await put(guest, target, whole[size:], whole=whole, offset=size)).size == len(whole)
    assert target.read_bytes() == whole
    assert not part.exists()


async def test_a_part_that_is_of_another_file_is_found_out(guest: AgentGuest, tmp_path: Path) -> None:
    (tmp_path / "file.noid-part").write_bytes(b"x" * 100)
    with pytest.raises(InvalidRequest, match="the sum of the whole is another"):
        await put(guest, tmp_path / "file", b"y" * 100, whole=b"y" * 200, offset=100)
    assert not (tmp_path / "file").exists()


async def test_what_a_guest_refuses_has_its_kind_and_its_words(guest: AgentGuest, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No such file"):
        await files.look(guest, str(tmp_path / "nothing"), user=None)
    with pytest.raises(Conflict, match="Is a directory"):
        await put(guest, tmp_path, b"")
    with pytest.raises(InvalidRequest, match="no tar archive"):
        await unpack(guest, iter([b"\1" * 1024]), tmp_path / "x")
    with pytest.raises(InvalidRequest, match="middle of the archive"):
        await unpack(guest, iter([HOSTILE[:700]]), tmp_path / "x")


async def test_a_time_that_nanoseconds_do_not_reach_is_the_nearest_they_do(guest: AgentGuest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seconds = int(datetime(2400, 1, 1, tzinfo=UTC).timestamp())
    os.utime(tmp_path / "file", (seconds, seconds))
    if (tmp_path / "file").stat().st_mtime != seconds:
        pytest.skip("the file system of the tests ends before the year 2400")
    assert (await files.look(guest, str(tmp_path / "file"), user=None)).mtime_ns == 2**63 - 1


async def test_a_sum_is_what_the_host_computes(guest: AgentGuest, tmp_path: Path) -> None:
    for size in (0, 55, 56, 63, 64, 65, 119, 120, 100_000):
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        status = await files.look(guest, str(tmp_path / "file"), user=None, with_sum=True)
        assert status.sha256 == hashlib.sha256(data).hexdigest()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(at=st.integers(0, len(HOSTILE) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(HOSTILE)))
def test_a_damaged_stream_ends_in_an_error_of_ours_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
) -> None:
    stream = bytearray(HOSTILE)
    stream[at] = byte
    directory = tmp_path_factory.mktemp("damaged", numbered=True)
    with contextlib.suppress(BackendError):
        here(bytes(stream[:cut] if byte % 2 else stream), directory)
    assert not list(directory.rglob("*.noid-part"))


async def test_a_copy_ends_with_its_conversation(agent: NativeAgent, tmp_path: Path) -> None:
    request = FileTransfer(incoming=True, form="file", path=str(tmp_path / "file"), size=100)
    async with connect(to(agent)) as guest:
        await guest.transfer(request)
        await until(agent.children)
    async with connect(to(agent)):
        await until(lambda: not agent.children())
    assert not (tmp_path / "file").exists()
