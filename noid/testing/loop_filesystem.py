"""A small filesystem of one's choice for a test: real ext4, btrfs or xfs, real reflinks, really full.

It is mounted in a mount namespace of its own, held by a child process and reached through ``/proc/<pid>/root``. When
the child ends, and it does when its stdin closes because the test process was killed, the kernel unmounts it and frees
the loop device: nothing can be left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
_SIZE_MIB_MIN = {"ext4": 8, "btrfs": 128, "xfs": 320}

# Mount, say so, and hold the namespace until stdin ends.
_HOLD = 'mount -o loop -t "$1" "$2" "$3" && echo mounted && read -r _; true'


@contextlib.contextmanager
def loop_filesystem(kind: str, scratch: Path, size_mib: int = 512) -> Iterator[Path]:
    """Yield an empty directory on a new filesystem of *kind*; skip the test, naming what is missing, if none can be.

    The path leads through ``/proc``, so it must not be resolved. *size_mib* is raised to what *kind* needs; the image
    is a sparse file in *scratch*.
    """
    for program in ("unshare", "mount", _MAKE[kind][0]):
        if shutil.which(program) is None:
            pytest.skip(f"the program {program} is not installed")
    image = scratch / f"{kind}.img"
    mount_point = scratch / f"{kind}.mount"
    mount_point.mkdir()
    with image.open("xb") as file:
        file.truncate(max(size_mib, _SIZE_MIB_MIN[kind]) << 20)
    subprocess.run([*_MAKE[kind], str(image)], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _HOLD, "sh", kind, str(image), str(mount_point)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with holder:  # closes the pipes, which ends it, and waits
        said = holder.stdout.readline().strip() if holder.stdout else ""
        if said != "mounted":
            pytest.skip(f"mounting a {kind} image needs root and a loop device: {said or 'no namespace'}")
        place = Path(f"/proc/{holder.pid}/root") / mount_point.relative_to("/") / "place"
        place.mkdir()
        yield place
    image.unlink()


@pytest.fixture(scope="session")
def filesystem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return a function from ``ext4``, ``btrfs`` or ``xfs`` to a new empty directory on one. Import it in a conftest.

    One filesystem of each kind serves all tests, so none of them may fill it.
    """
    mounted: dict[str, Path] = {}
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def directory_on(kind: str) -> Path:
            if kind not in mounted:
                mounted[kind] = stack.enter_context(loop_filesystem(kind, tmp_path_factory.mktemp("loop")))
            directory = mounted[kind] / f"test{next(numbers)}"
            directory.mkdir()
            return directory

        yield directory_on
