"""Storage in qcow2 layers: clones on plain ext4 copy nothing, and a freeze takes a millisecond."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import AgentContext, BackendSpec, StorageBackend
from noid.errors import ConfigError, DependencyDown
from noid.hookspecs import hookimpl
from noid.hostfs import hard_links_work, os_errors
from noid_storage_overlay.backend import NAME, QEMU_IMG, OverlayStorage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayConfig:
    """``[plugins.storage_overlay]``: nothing to set."""


@contextlib.asynccontextmanager
async def open_storage(config: OverlayConfig, context: AgentContext) -> AsyncIterator[StorageBackend]:
    """Open the storage.

    Raises:
        DependencyDown: ``qemu-img`` is missing; asked now and not when the first deep chain needs it.
        ConfigError: the data directory's filesystem has no hard links.
    """
    if shutil.which(QEMU_IMG) is None:
        raise DependencyDown(
            f'storage = "{NAME}" needs the program {QEMU_IMG}. Install the package qemu-utils, or set storage = "auto" '
            "in server.toml [backends]."
        )
    with os_errors(f"looking at the filesystem of {context.data_dir}"):
        if not await trio.to_thread.run_sync(hard_links_work, context.data_dir):
            raise ConfigError(
                f'storage = "{NAME}" needs hard links, which the filesystem of {context.data_dir} does not have. Set '
                'storage = "auto" in server.toml [backends], or move data_dir.'
            )
    yield OverlayStorage()


@hookimpl
def storage_backend() -> BackendSpec[StorageBackend]:
    """Offer ``overlay``."""
    return BackendSpec(name=NAME, config=OverlayConfig, open=open_storage)


@hookimpl
def probe_storage(data_dir: Path, vmm_disk_formats: frozenset[str]) -> str | None:
    """Choose this where blocks cannot be shared (`storage_btrfs` is asked first) and the VMM opens qcow2."""
    if "qcow2" not in vmm_disk_formats or shutil.which(QEMU_IMG) is None:
        return None
    try:
        return NAME if hard_links_work(data_dir) else None
    except OSError as error:
        logger.warning("storage %s: cannot try the filesystem of %s: %s", NAME, data_dir, error)
        return None
