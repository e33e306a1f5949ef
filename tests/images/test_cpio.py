"""The initrd's archive format, read back by an independent reader."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noid.core.guestbuild import cpio

NAMES = st.text("abcz-_.", min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))
FILES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=50), max_size=6)


def read(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Return mode and content by path, as the kernel's ``init/initramfs.c`` walks through an archive."""
    entries: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_at = at + 110
        name = data[name_at : name_at + fields[11] - 1].decode()
        content_at = (name_at + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        entries[name] = (fields[1], data[content_at : content_at + fields[6]])
        at = (content_at + fields[6] + 3) & ~3


@given(FILES)
def test_what_goes_in_comes_out_after_the_directories_it_is_in(files: dict[str, bytes]) -> None:
    if any(f"{a}/" in b for a in files for b in files if b.startswith(f"{a}/")):
        with pytest.raises(ValueError, match="a file and a directory"):
            cpio.archive(files)
        return

    entries = read(cpio.archive(files))

    assert {path: content for path, (mode, content) in entries.items() if stat.S_ISREG(mode)} == files
    seen = set()
    for path, (mode, _) in entries.items():
        parent = path.rpartition("/")[0]
        assert not parent or parent in seen
        if stat.S_ISDIR(mode):
            seen.add(path)


def test_only_init_is_executable() -> None:
    entries = read(cpio.archive({"init": b"x", "sub/init": b"x", "data": b"x"}))
    assert {path: oct(mode) for path, (mode, _) in entries.items()} == {
        "init": "0o100755",
        "sub": "0o40755",
        "sub/init": "0o100755",
        "data": "0o100644",
    }


def test_the_order_of_the_files_makes_no_difference() -> None:
    assert cpio.archive({"a": b"1", "b": b"2"}) == cpio.archive({"b": b"2", "a": b"1"})


@pytest.mark.parametrize("path", ["", "/init", "a//b", "../a", "a/./b", "a/", "a\0b"])
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be a path"):
        cpio.archive({path: b""})
