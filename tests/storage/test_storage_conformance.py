"""Every storage backend that comes with noid, on every filesystem it is for, does what a storage backend must."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import noid_storage_btrfs
import noid_storage_copy
import noid_storage_overlay
import pytest
from noid_storage_layers.backend import LayersStorage

from noid.core.backends import AgentContext, StorageBackend
from noid.hostfs import reflink_works
from noid.testing.storage_conformance import StorageConformance


def context(place: Path) -> AgentContext:
    return AgentContext(data_dir=place, run_dir=place, database=place / "noid.db")


class TestCopy(StorageConformance):
    @pytest.fixture(params=["ext4", "btrfs", "xfs"])
    def place(self, request: pytest.FixtureRequest, filesystem: Callable[[str], Path]) -> Path:
        return filesystem(request.param)

    @pytest.fixture
    async def storage(self, place: Path) -> AsyncIterator[StorageBackend]:
        async with noid_storage_copy.open_storage(noid_storage_copy.CopyConfig(), context(place)) as storage:
            yield storage


class TestBtrfs(StorageConformance):
    @pytest.fixture(params=["btrfs", "xfs"])
    def place(self, request: pytest.FixtureRequest, filesystem: Callable[[str], Path]) -> Path:
        return filesystem(request.param)

    @pytest.fixture
    async def storage(self, place: Path) -> AsyncIterator[StorageBackend]:
        async with noid_storage_btrfs.open_storage(noid_storage_btrfs.BtrfsConfig(), context(place)) as storage:
            yield storage


class TestOverlay(StorageConformance):
    @pytest.fixture(params=["ext4", "btrfs"])
    def place(self, request: pytest.FixtureRequest, filesystem: Callable[[str], Path]) -> Path:
        return filesystem(request.param)

    @pytest.fixture
    async def storage(self, place: Path) -> AsyncIterator[StorageBackend]:
        async with noid_storage_overlay.open_storage(noid_storage_overlay.OverlayConfig(), context(place)) as storage:
            yield storage


def make_hole(path: Path, size_bytes: int) -> None:
    with path.open("xb") as file:
        file.truncate(size_bytes)


class TestLayers(StorageConformance):
    @pytest.fixture(params=["ext4", "btrfs"])
    def place(self, request: pytest.FixtureRequest, filesystem: Callable[[str], Path]) -> Path:
        return filesystem(request.param)

    @pytest.fixture
    async def storage(self, place: Path) -> AsyncIterator[StorageBackend]:
        storage = LayersStorage(shares_blocks=reflink_works(place), make_top=make_hole)
        yield storage  # noqa: PT022  nothing to close, but an override is a generator as the suite's is
