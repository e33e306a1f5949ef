"""Storage that works everywhere: raw disks, shared blocks where the filesystem can, sparse copies where it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import AgentContext, BackendSpec, StorageBackend
from noid.hookspecs import hookimpl
from noid.hostfs import os_errors, reflink_works
from noid.rawdisk import RawStorage

NAME = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyConfig:
    """``[plugins.storage_copy]``: nothing to set."""


@contextlib.asynccontextmanager
async def open_storage(config: CopyConfig, context: AgentContext) -> AsyncIterator[StorageBackend]:
    """Find out by doing whether a freeze will share blocks or copy them, and say so in ``features``."""
    with os_errors(f"looking at the filesystem of {context.data_dir}"):
        shares_blocks = await trio.to_thread.run_sync(reflink_works, context.data_dir)
    yield RawStorage(NAME, shares_blocks=shares_blocks, strict=False)


@hookimpl
def storage_backend() -> BackendSpec[StorageBackend]:
    """Offer ``copy``."""
    return BackendSpec(name=NAME, config=CopyConfig, open=open_storage)


@hookimpl(trylast=True)
def probe_storage(data_dir: Path, vmm_disk_formats: frozenset[str]) -> str:
    """Be what is left when nothing better fits: every VMM opens raw."""
    return NAME
