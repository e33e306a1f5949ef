"""Every storage backend that comes with noid, on every filesystem it is for, does what a storage backend must."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import noid_storage_btrfs
import noid_storage_copy
import noid_storage_overlay
import pytest

from noid.core.backends import AgentContext, StorageBackend
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
