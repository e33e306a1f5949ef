"""Keeps what took long to build in ``~/.cache/noid``, by a key that names everything it was built from."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from noid import hostfs


def directory() -> Path:
    """Return ``$XDG_CACHE_HOME/noid``, else ``~/.cache/noid``. Nothing is created."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "noid" if base and Path(base).is_absolute() else Path.home() / ".cache" / "noid"


def cached(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the directory ``<kind>/<key>`` of the cache, made by *build* unless it is there.

    *build* gets an empty directory that is published when it returns; a failed or killed build leaves nothing that
    counts. Two processes that want the same thing build it once: the second waits.

    Raises:
        NoSpace: the disk of the cache is full.
        BackendError: the cache cannot be written.
    """
    shelf = directory() / kind
    final = shelf / key
    if final.is_dir():
        return final
    with hostfs.os_errors(f"writing to the cache {shelf}"):
        shelf.mkdir(parents=True, exist_ok=True)
        with locked(shelf / f".{key}.lock"):
            if final.is_dir():
                return final
            for left in shelf.glob(f".{key}.*.partial"):  # under the lock nobody works there: a killed build
                hostfs.remove_tree(left)
            partial = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".partial", dir=shelf))
            try:
                build(partial)
                partial.chmod(0o755)
                hostfs.publish_directory(partial, final)
            except BaseException:
                hostfs.remove_tree(partial)
                raise
    return final


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file *path*, made if missing. Ends with the process, however that ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
