"""What tests of images share: a registry, a kernel as far as can be seen from outside, and a small disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from noid.core.guestbuild import ext4, programs
from noid.core.images import Images
from noid.testing.guests import fake_kernel


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 file system of 4 MiB with one file in it."""
    if programs.find("mke2fs") is None:
        pytest.skip("mke2fs is missing (apt-get install e2fsprogs)")
    place = tmp_path_factory.mktemp("disk")
    (place / "tree").mkdir()
    (place / "tree" / "hello").write_text("hello\n")
    ext4.make(place / "tree", place / "disk.ext4", 4 << 20)
    return place / "disk.ext4"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(fake_kernel())
    return path


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path / "images", {"init": b"the agent"})
