"""Tar streams nobody should send, against what writes them to this machine: nothing gets out, and nothing grows."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noid.client.tarstream import DIRECTORY, END, FILE, HARD_LINK, SYMLINK, Entry, TarReader, headers_of, padding
from noid.client.unpacking import Limits, Unpacking
from noid.errors import BackendError, NoidError, TooLarge

NAMES = (
    b"a",
    b"a/b",
    b"a/b/c",
    b"b",
    b"link",
    b"link/x",
    b"../outside/new",
    b"/absolute",
    b"a/../../outside/new",
    b".",
)
TARGETS = (b"a", b"b", b"a/b", b"..", b"../outside", b"../outside/secret", b"/", b"link", b"link/../..", b"../..")
KINDS = (FILE, HARD_LINK, SYMLINK, DIRECTORY, b"3", b"6", b"S")

ENTRIES = st.builds(
    Entry,
    kind=st.sampled_from(KINDS),
    path=st.sampled_from(NAMES),
    link=st.sampled_from(TARGETS),
    mode=st.integers(0o700, 0o7777),
    uid=st.integers(0, (1 << 32) - 2),
    size=st.just(600),
    mtime_ns=st.integers(-(1 << 70), 1 << 70),
    segments=st.none() | st.just([(5, 10), (100, 50), (600, 0)]),
)


def stream_of(entries: list[Entry]) -> bytes:
    stream = bytearray()
    for entry in entries:
        if entry.kind != FILE:
            entry.segments = None
        stream += headers_of(entry)
        if entry.kind not in (HARD_LINK, SYMLINK, DIRECTORY):
            size = entry.size if entry.segments is None else sum(length for _, length in entry.segments)
            stream += bytes(size) + padding(size)
    return bytes(stream + END)


def unpack(pieces: Iterator[bytes], directory: Path, limits: Limits | None = None) -> list[str]:
    left_out: list[str] = []
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        Unpacking(descriptor, limits or Limits(size=1 << 20), left_out.append, owners=False).run(TarReader(pieces))
    finally:
        os.close(descriptor)
    return left_out


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    entries=st.lists(ENTRIES, max_size=12),
    damage=st.just([]) | st.just([]) | st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=2),
)
def test_whatever_a_stream_says_nothing_outside_changes_and_no_link_leads_there(
    entries: list[Entry], damage: list[tuple[float, int]]
) -> None:
    stream = bytearray(stream_of(entries))
    for where, byte in damage:
        stream[int(where * (len(stream) - 1))] = byte
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        (top / "inside").mkdir()
        (top / "outside").mkdir()
        (top / "outside" / "secret").write_text("secret")
        before = (top / "outside" / "secret").stat()

        with contextlib.suppress(NoidError):
            unpack(iter([bytes(stream)]), top / "inside")

        after = (top / "outside" / "secret").stat()
        assert (after.st_nlink, after.st_ctime_ns) == (before.st_nlink, before.st_ctime_ns)
        assert {path.name for path in (top / "outside").iterdir()} == {"secret"}
        assert {path.name for path in top.iterdir()} == {"inside", "outside"}
        for path in (top / "inside").rglob("*"):
            assert not path.name.endswith(".noid-part")
            if path.is_symlink():
                assert os.path.realpath(path).startswith(str(top / "inside")), path.readlink()
            else:
                assert path.is_file() or path.is_dir()
                assert not path.stat().st_mode & 0o6000


def test_modes_are_kept_but_for_what_would_lend_somebody_the_owner_s_rights(inside: Path) -> None:
    shared = Entry(kind=DIRECTORY, path=b"shared", mode=0o3777)
    program = Entry(kind=FILE, path=b"program", mode=0o6755)
    assert unpack(iter([stream_of([shared, program])]), inside) == []
    assert (inside / "shared").stat().st_mode & 0o7777 == 0o1777
    assert (inside / "program").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("segments", [None, [((1 << 50), 0)]])
def test_a_size_that_is_declared_counts_before_a_byte_of_it_is_written(
    inside: Path, segments: list[tuple[int, int]] | None
) -> None:
    bomb = Entry(kind=FILE, path=b"bomb", size=1 << 50, segments=segments)
    with pytest.raises(TooLarge, match="--max-bytes"):
        unpack(iter([headers_of(bomb)]), inside)
    assert list(inside.iterdir()) == []


def test_entries_without_end_end_at_the_limit(inside: Path) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield headers_of(Entry(kind=DIRECTORY, path=b"same"))

    with pytest.raises(TooLarge, match="more than 1000 entries"):
        unpack(endless(), inside, Limits(entries=1000))


def test_headers_without_an_entry_end_before_they_fill_the_memory(inside: Path) -> None:
    def endless() -> Iterator[bytes]:
        for number in range(1_000_000):
            record = b"%d key%07d=%s\n" % (1032, number, b"v" * 1015)
            head = bytearray(headers_of(Entry(kind=b"x", path=b"header", size=len(record))))
            yield bytes(head + record + padding(len(record)))

    with pytest.raises(BackendError, match="a header of"):
        unpack(endless(), inside)


def test_directories_without_end_below_each_other_are_left_out(inside: Path) -> None:
    deep = b"/".join([b"d"] * 2000)
    left_out = unpack(iter([stream_of([Entry(kind=FILE, path=deep, size=5), Entry(kind=FILE, path=b"last")])]), inside)
    assert len(left_out) == 1
    assert [path.name for path in inside.iterdir()] == ["last"]


@pytest.mark.parametrize(
    "segments", [[(500, 10), (0, 10)], [(0, 200), (100, 200)], [(900, 200)], [(0, 10)] * 20_000, [(1 << 62, 1 << 62)]]
)
def test_a_sparse_map_that_lies_ends_the_copy(inside: Path, segments: list[tuple[int, int]]) -> None:
    lie = Entry(kind=FILE, path=b"lie", size=1000, segments=segments)
    with pytest.raises(BackendError, match="sparse"):
        unpack(iter([headers_of(lie) + bytes(4096)]), inside)
    assert list(inside.iterdir()) == []


def test_a_name_that_is_a_directory_then_a_link_then_a_directory_leads_nowhere(inside: Path) -> None:
    outside = inside.parent / "outside"
    outside.mkdir()
    turns = [
        Entry(kind=DIRECTORY, path=b"x"),
        Entry(kind=FILE, path=b"x/file"),
        Entry(kind=SYMLINK, path=b"x", link=b"../outside"),
        Entry(kind=SYMLINK, path=b"y", link=b"x"),
        Entry(kind=FILE, path=b"y/file"),
        Entry(kind=DIRECTORY, path=b"y"),
    ]
    assert len(unpack(iter([stream_of(turns)]), inside)) == 3
    assert list(outside.iterdir()) == []
    assert (inside / "x" / "file").is_file()
