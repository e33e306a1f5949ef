"""Other ways to write a server.toml: sections and keys of older manuals, put where `settings` has them.

One manual of the predecessor describes flat keys, another one ``[server] [paths] [limits] [logging]``. Both are read,
also mixed; a key that is said twice is refused, because nobody can know which one was meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from noid.core.config.settings import NOT_FROM_FILE, Config
from noid.errors import ConfigError

Place = tuple[str, str]
"""A section, "" for the top level, and a key in it."""

_LISTEN_PARTS = ("host", "port")
_NO_EFFECT = {
    "workers": (
        "changes nothing: one process serves everything, and the VMs are processes of their own, so there is nothing "
        "that more workers could share out"
    )
}
"""Keys that are accepted, and why they have no effect."""

_MOVED: Mapping[str, tuple[str, ...]] = {
    "server": (
        *("listen", "trust_forwarded_for", "max_ws_sessions", "exec_timeout_secs", "console_timeout_secs"),
        *(*_LISTEN_PARTS, "timeout", *_NO_EFFECT),
    ),
    "paths": ("data_dir", "kernel", "rootfs", "initrd"),
    "limits": ("max_ws_sessions", "exec_timeout_secs", "console_timeout_secs"),
}
"""Keys of the top level that may also stand in a section."""

_FLAT = (*_LISTEN_PARTS, "timeout", *_NO_EFFECT)
"""Keys of the top level that `Config` does not have."""

_WORDS: Mapping[Place, Mapping[str, str]] = {("logging", "level"): {"warn": "warning"}}
"""Other words for a value."""


def settled(table: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return *table*, a server.toml, with everything where `Config` has it, and notes on what has no effect.

    Raises:
        ConfigError: a key that there is not, one that is given twice, or one that cannot be translated.
    """
    flat, sections = _taken_apart(table, where)
    notes = [f"{name(place)} = {flat.pop(place[1])[1]!r} {why}." for place, why in _without_effect(flat)]
    result = {key: value for key, (_, value) in flat.items() if key not in (*_LISTEN_PARTS, "timeout")}
    if any(part in flat for part in _LISTEN_PARTS):
        result["listen"] = _listen(flat, where)
    if "timeout" in flat:
        if "exec_timeout_secs" in flat:
            raise _twice(flat["timeout"][0], flat["exec_timeout_secs"][0], where)
        result["exec_timeout_secs"] = _seconds(*flat["timeout"], where)
    for (section, key), words in _WORDS.items():
        value = sections.get(section, {}).get(key)
        if isinstance(value, str):
            sections[section] = {**sections[section], key: words.get(value.lower(), value.lower())}
    return result | sections, tuple(notes)


def name(place: Place) -> str:
    """Return how *place* is written: ``key`` or ``[section] key``."""
    section, key = place
    return f"[{section}] {key}" if section else key


def unknown_key(place: Place, where: str, known: Iterable[Place]) -> ConfigError:
    """Return the error that *place* is not among the *known*, with the nearest that is."""
    section, key = place
    everything = sorted(known)
    here = [other for within, other in everything if within == section]
    elsewhere = [other for other in everything if other[0] != section]
    hint = f" Known keys: {', '.join(here)}."
    if exact := [other for other in elsewhere if other[1] == key]:
        hint = f" It is {name(exact[0])}."
    elif near := difflib.get_close_matches(key, here, n=1):
        hint = f" Did you mean {near[0]!r}?"
    elif far := difflib.get_close_matches(key, [other[1] for other in elsewhere], n=1):
        hint = f" Did you mean {name(next(other for other in elsewhere if other[1] == far[0]))}?"
    return ConfigError(f"{where}: {section + ': ' if section else ''}unknown key {key!r}.{hint}")


def known_places() -> Iterator[Place]:
    """Yield everything that a server.toml may say, in every spelling; of ``[plugins]`` only that there is one."""
    for field in fields(Config):
        if field.name in NOT_FROM_FILE:
            continue
        yield "", field.name
        record = field.default_factory
        if record is not MISSING and is_dataclass(record):
            yield from ((field.name, below.name) for below in fields(record))
    yield from (("", key) for key in (*_FLAT, "server", "paths"))
    yield from ((section, key) for section, keys in _MOVED.items() for key in keys)


def _taken_apart(table: Mapping[str, Any], where: str) -> tuple[dict[str, tuple[Place, Any]], dict[str, Any]]:
    """Return the keys that belong to the top level, each with where it stood, and the sections without those."""
    known = set(known_places())
    flat: dict[str, tuple[Place, Any]] = {}
    sections: dict[str, Any] = {}

    def add(place: Place, value: Any) -> None:
        if place[1] in flat:
            raise _twice(flat[place[1]][0], place, where)
        flat[place[1]] = (place, value)

    for key, value in table.items():
        if ("", key) not in known:
            raise unknown_key(("", key), where, known)
        if key in _MOVED and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be a section.")
        if not isinstance(value, Mapping):
            add(("", key), value)
            continue
        moved = _MOVED.get(key, ())
        for inner, inner_value in value.items():
            if inner in moved:
                add((key, inner), inner_value)
            elif key in ("server", "paths"):
                raise unknown_key((key, inner), where, known)
        if key not in ("server", "paths"):
            sections[key] = {inner: inner_value for inner, inner_value in value.items() if inner not in moved}
    return flat, sections


def _without_effect(flat: Mapping[str, tuple[Place, Any]]) -> list[tuple[Place, str]]:
    return [(flat[key][0], why) for key, why in _NO_EFFECT.items() if key in flat]


def _listen(flat: Mapping[str, tuple[Place, Any]], where: str) -> str:
    """Return the address that ``host`` and ``port`` make; what is missing is as in the default."""
    given = next(flat[part][0] for part in _LISTEN_PARTS if part in flat)
    if "listen" in flat:
        raise _twice(given, flat["listen"][0], where)
    default_host, _, default_port = next(str(f.default) for f in fields(Config) if f.name == "listen").rpartition(":")
    place, host = flat.get("host", (given, default_host))
    if not isinstance(host, str) or not host:
        raise ConfigError(f'{where}: {name(place)} is {host!r}; it must be an address or a name, as in "0.0.0.0".')
    place, port = flat.get("port", (given, int(default_port)))
    if type(port) is not int or not 0 < port < 1 << 16:
        raise ConfigError(f"{where}: {name(place)} is {port!r}; it must be a whole number from 1 to 65535.")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _seconds(place: Place, value: Any, where: str) -> float:
    if type(value) is not int or value <= 0:
        raise ConfigError(
            f"{where}: {name(place)} is {value!r}; it must be a whole number of milliseconds above 0."
            " (exec_timeout_secs says the same in seconds.)"
        )
    return float(value / 1000)


def _twice(one: Place, other: Place, where: str) -> ConfigError:
    return ConfigError(f"{where}: {name(one)} and {name(other)} say the same. Leave one of them out.")
