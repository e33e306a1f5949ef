"""What this user has set for the command line itself, in ``config.toml``: the keys, each with what it may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noid.client import config_file
from noid.client.servers import config_path
from noid.errors import ConfigError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


def _existing_file(value: str) -> str:
    path = Path(value).expanduser().absolute()
    if not path.is_file():
        raise InvalidRequest(f"there is no file {path}.")
    return str(path)


def _update_url(value: str) -> str:
    from noid.client.selfupdate import checked_url

    return checked_url(value)


def _ways_out(value: str) -> str:
    from noid.client import leaving

    leaving.parsed(value)
    return value


KEYS: dict[str, Callable[[str], str]] = {
    "kernel": _existing_file,
    "rootfs": _existing_file,
    "console.detach": _ways_out,
    "update.url": _update_url,
}
"""What makes a value of what was typed, or raises `InvalidRequest`; by key, a dot between table and name."""


def get(key: str) -> str | None:
    """Return what *key* is set to, or None.

    Raises:
        NotFound: there is no such key.
        ConfigError: the file is broken, or the value is not a string.
    """
    checked_key(key)
    return _value_in(config_file.read(config_path()), key)


def every() -> dict[str, str]:
    """Return what is set, by key.

    Raises:
        ConfigError: as of `get`.
    """
    said = config_file.read(config_path())
    return {key: value for key in KEYS if (value := _value_in(said, key)) is not None}


def put(key: str, value: str | None) -> str | None:
    """Set *key* to *value*, which is checked, or to nothing if it is None; return what it is now.

    Raises:
        NotFound: there is no such key.
        InvalidRequest: it cannot be that.
        ConfigError: the file is broken or cannot be written. The old settings still hold.
    """
    checked_key(key)
    checked = None if value is None else KEYS[key](value)
    with config_file.alone_in(config_path().parent), config_file.changed(config_path()) as document:
        _put_into(document, key, checked)
    return checked


def checked_key(key: str) -> str:
    """Return *key* if there is such a one.

    Raises:
        NotFound: there is none; the message says which there are.
    """
    if key not in KEYS:
        raise NotFound(f"there is no setting {key!r}. There are: {', '.join(KEYS)}.")
    return key


def _value_in(said: Any, key: str) -> str | None:
    for part in key.split("."):
        said = said.get(part) if isinstance(said, dict) else None
    if said is None or isinstance(said, str):
        return said
    raise ConfigError(f"{config_path()}: {key} is not a string. Run: noid config set {key} VALUE")


def _put_into(document: TOMLDocument, key: str, value: str | None) -> None:
    import tomlkit

    *tables, name = key.split(".")
    table: Any = document
    for part in tables:
        if part not in table:
            if value is None:
                return
            table[part] = tomlkit.table()
        table = table[part]
    if value is None:
        table.pop(name, None)
    elif table.get(name) != value:
        table[name] = value
