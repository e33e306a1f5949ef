"""Storage for VMMs that open raw disks only, where blocks cannot be shared: an image all read, a disk each writes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import AgentContext, BackendSpec, StorageBackend
from noid.core.model.storage import LAYERS
from noid.errors import ConfigError, DependencyDown
from noid.hookspecs import hookimpl
from noid.hostfs import hard_links_work, os_errors, reflink_works
from noid_storage_layers.backend import NAME, LayersStorage
from noid_storage_layers.emptydisk import MKE2FS, mke2fs_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig:
    """``[plugins.storage_layers]``: nothing to set."""


@contextlib.asynccontextmanager
async def open_storage(config: LayersConfig, context: AgentContext) -> AsyncIterator[StorageBackend]:
    """Open the storage.

    Raises:
        DependencyDown: ``mke2fs`` is missing; asked now and not when the first template is made.
        ConfigError: the data directory's filesystem has no hard links.
    """
    if mke2fs_path() is None:
        raise DependencyDown(
            f'storage = "{NAME}" needs the program {MKE2FS}. Install the package e2fsprogs, or set storage = "copy" in '
            "server.toml [backends]."
        )
    with os_errors(f"looking at the filesystem of {context.data_dir}"):
        if not await trio.to_thread.run_sync(hard_links_work, context.data_dir):
            raise ConfigError(
                f'storage = "{NAME}" needs hard links, which the filesystem of {context.data_dir} does not have. Set '
                'storage = "auto" in server.toml [backends], or move data_dir.'
            )
        shares_blocks = await trio.to_thread.run_sync(reflink_works, context.data_dir)
    yield LayersStorage(shares_blocks=shares_blocks)


@hookimpl
def storage_backend() -> BackendSpec[StorageBackend]:
    """Offer ``layers``."""
    return BackendSpec(name=NAME, config=LayersConfig, open=open_storage)


@hookimpl
def probe_storage(data_dir: Path, vmm_disk_formats: frozenset[str]) -> str | None:
    """Choose this for a VMM that opens no qcow2, where blocks cannot be shared (`storage_btrfs` is asked first).

    A VMM that does has a better one: qcow2 layers freeze in constant time, and their guests see one plain disk.
    """
    if LAYERS not in vmm_disk_formats or "qcow2" in vmm_disk_formats or mke2fs_path() is None:
        return None
    try:
        return NAME if hard_links_work(data_dir) else None
    except OSError as error:
        logger.warning("storage %s: cannot try the filesystem of %s: %s", NAME, data_dir, error)
        return None
