"""Storage on filesystems that share blocks (btrfs, xfs with reflink): a clone and a freeze are one ioctl each."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import AgentContext, BackendSpec, StorageBackend
from noid.errors import ConfigError
from noid.hookspecs import hookimpl
from noid.hostfs import filesystem_name, os_errors, reflink_works
from noid.rawdisk import RawStorage

logger = logging.getLogger(__name__)

NAME = "btrfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class BtrfsConfig:
    """``[plugins.storage_btrfs]``: nothing to set."""


@contextlib.asynccontextmanager
async def open_storage(config: BtrfsConfig, context: AgentContext) -> AsyncIterator[StorageBackend]:
    """Open the storage.

    Raises:
        ConfigError: the data directory's filesystem cannot share blocks, found out by doing.
    """
    with os_errors(f"looking at the filesystem of {context.data_dir}"):
        if not await trio.to_thread.run_sync(reflink_works, context.data_dir):
            name = await trio.to_thread.run_sync(filesystem_name, context.data_dir)
            raise ConfigError(
                f'storage = "{NAME}" needs a filesystem that shares blocks between files, and {context.data_dir} lies '
                f'on {name}, which does not. Set storage = "auto" in server.toml [backends], or move data_dir to '
                "btrfs, or to xfs made with reflink=1."
            )
    yield RawStorage(NAME, shares_blocks=True, strict=True)


@hookimpl
def storage_backend() -> BackendSpec[StorageBackend]:
    """Offer ``btrfs``."""
    return BackendSpec(name=NAME, config=BtrfsConfig, open=open_storage)


@hookimpl(tryfirst=True)
def probe_storage(data_dir: Path, vmm_disk_formats: frozenset[str]) -> str | None:
    """Choose this wherever blocks can be shared: no other storage freezes as fast or needs as little of a VMM."""
    try:
        return NAME if reflink_works(data_dir) else None
    except OSError as error:
        logger.warning("storage %s: cannot try the filesystem of %s: %s", NAME, data_dir, error)
        return None
