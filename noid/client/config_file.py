"""TOML files that belong to the user: read with line and column of what is wrong, changed without losing a comment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noid.errors import ConfigError

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


def read(path: Path) -> dict[str, Any]:
    """Return what the file says; nothing if there is none.

    Raises:
        ConfigError: names the file, and line and column if it is not TOML.
    """
    return _parsed(path, _text(path))


@contextmanager
def changed(path: Path) -> Iterator[TOMLDocument]:
    """Yield the file as a document to change, and put the new one in the old one's place when the block ends.

    The new file is for its owner alone. The old one, and a link that leads to it, is whole until then and stays if
    anything fails. Whoever changes what was read before holds `alone_in`.

    Raises:
        ConfigError: the present file is broken, or the new one cannot be written.
    """
    import tomlkit  # 60 ms that only those pay who change a setting

    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError until Python 3.13
        raise _unwritable(path, error) from error
    text = _text(path)
    _parsed(path, text)  # its complaints are the better ones
    document = tomlkit.parse(text)
    yield document
    new, meant = tomlkit.dumps(document), document.unwrap()
    if new == text:
        return
    if _parsed(path, new) != meant:
        raise ConfigError(f"{path} is written in a way that cannot be changed safely. Change it with an editor.")
    _replace(target, new)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Make *directory* if need be, and wait until nobody else is in such a block with it.

    Raises:
        ConfigError: it cannot be made or read.
    """
    import fcntl

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise _unwritable(directory, error) from error
    try:
        yield
    finally:
        os.close(lock)


def _replace(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}-{os.urandom(4).hex()}")
    try:
        try:
            with open(temporary, "x", encoding="utf-8", opener=_owner_only) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(path: Path, error: OSError | RuntimeError) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else None
    return ConfigError(f"cannot write {path}: {reason or error}. The old settings still hold.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except UnicodeDecodeError as error:
        why = f"it is no text (byte {error.start + 1} is not UTF-8)"
        raise ConfigError(f"cannot read {path}: {why}. Repair or remove it, or use --local.") from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}. Repair or remove it, or use --local."
        ) from error


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if not text:
        return {}
    import tomllib  # 10 ms that a machine without a config file does not pay

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is broken: {error}. Repair or remove it, or use --local.") from error


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
