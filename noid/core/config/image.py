"""The predecessor's way to say what VMs boot: ``kernel``, ``rootfs`` and ``initrd`` in server.toml are image `NAME`."""

from __future__ import annotations

import hashlib

from noid.core.config.settings import Config
from noid.core.images import Images
from noid.errors import ConfigError, Damaged, InvalidRequest, NotFound

NAME = "default"
_MARK = "from server.toml, "


def take_up(config: Config, images: Images) -> None:
    """Make the configured files the image `NAME`, when they are named and not the ones it was made of. Blocking.

    A changed file is noticed by its path, size or modification time.

    Raises:
        ConfigError: one of the two files is missing from the file or the disk, or is not what it should be; or there is
            an image of that name that was made otherwise, which is not for us to replace.
        NoSpace: nothing was changed.
    """
    where = config.source or "configuration"
    if config.kernel is None and config.rootfs is None and config.initrd is None:
        return
    if config.kernel is None or config.rootfs is None:
        raise ConfigError(f"{where}: kernel and rootfs belong together. Give both, or use noid-server image import.")
    try:
        files = [path for path in (config.kernel, config.rootfs, config.initrd) if path is not None]
        facts = [(str(path), status.st_size, status.st_mtime_ns) for path in files for status in (path.stat(),)]
    except OSError as error:
        raise ConfigError(f"{where}: cannot use {error.filename}: {error.strerror}.") from error
    mark = _MARK + hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    try:
        found = images.get(NAME).description
    except NotFound:
        found = _MARK
    except Damaged:
        found = _MARK  # it can only be made again
    if found == mark:
        return
    if not found.startswith(_MARK):
        raise ConfigError(
            f"{where}: kernel and rootfs mean the image {NAME!r}, but there is one that was built or imported. Remove "
            f"these keys, or that image (noid-server image remove {NAME})."
        )
    try:
        images.add(
            NAME,
            kernel=config.kernel,
            rootfs=config.rootfs,
            initrd=config.initrd,
            description=mark,
            replace=True,
        )
    except InvalidRequest as error:
        raise ConfigError(f"{where}: {error}") from error
