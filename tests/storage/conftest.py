"""Filesystems for the storage tests: real ext4, btrfs and xfs, one of each for the whole run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from noid.testing.loop_filesystem import loop_filesystem

_numbers = itertools.count()


@pytest.fixture(scope="session")
def filesystem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return a new empty directory on a filesystem of the kind that is asked for."""
    mounted: dict[str, Path] = {}
    with ExitStack() as stack:

        def directory_on(kind: str) -> Path:
            if kind not in mounted:
                mounted[kind] = stack.enter_context(loop_filesystem(kind, tmp_path_factory.mktemp("loop")))
            directory = mounted[kind] / f"test{next(_numbers)}"
            directory.mkdir()
            return directory

        yield directory_on
