"""Finding server.toml, reading it into `noid.core.config.settings`'s records, and deciding where the data is.

Every key is known by name and type; an unknown one is an error that names the nearest known key, because a misspelt
limit that is silently ignored is worse than no limit.

A server and the commands of its admin must find the same data, whoever types them. So nothing that a file says is
taken relative to the person: ``~`` is the home of the file's owner, a relative path begins at the file, and a file
without ``data_dir`` has a default of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pwd
import re
import stat
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from noid.core import paths
from noid.core.config.settings import NOT_FROM_FILE, Config
from noid.core.config.spellings import Place, known_places, settled, unknown_key
from noid.core.people import networks
from noid.errors import ConfigError

T = TypeVar("T")

FILE_NAME = "server.toml"
SYSTEM_FILE = Path("/etc/noid", FILE_NAME)
SYSTEM_DATA_DIR = Path("/var/lib/noid")


def load_config(path: Path | None = None, *, data_dir: Path | None = None, local: bool = False) -> Config:
    """Read the configuration.

    Args:
        path: A server.toml that must exist. None takes the one in the data directory that *data_dir* or
            ``$NOID_DATA_DIR`` names, if one is named; else the first there is of ``./server.toml``,
            ``~/.noid/server.toml`` and `SYSTEM_FILE`; else none.
        data_dir: Takes precedence over the file's ``data_dir``, which takes precedence over ``$NOID_DATA_DIR`` and the
            default: `SYSTEM_DATA_DIR` for `SYSTEM_FILE`, the directory ``.noid`` for a file in one, otherwise ``.noid``
            in the home of the file's owner.
        local: Whether this is a per-user agent without a TCP listener.

    Raises:
        ConfigError: unreadable, not TOML (with line and column), an unknown key, a wrong type; or found by searching
            and not to be trusted.
    """
    if path is None:
        path = _named(data_dir) or _searched(data_dir)
    base = Base(path)
    table, notes = settled(_read(path), base.where) if path is not None else ({}, ())
    default = data_dir or _default_data_dir(path, base)
    config = build_record(Config, {"data_dir": str(default)} | table, base.where, base)
    # abspath and not resolve: two agents must agree on the name, and a link in it may be meant to move
    chosen = Path(os.path.abspath(data_dir or config.data_dir))  # noqa: PTH100
    for name, section in config.plugins.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{base.where}: [plugins] {name} must be a section: [plugins.{name}].")
    return dataclasses.replace(config, data_dir=chosen, local=local, source=path, notes=notes)


def load_admin_config(path: Path | None = None, *, data_dir: Path | None = None) -> Config:
    """Read the configuration for a command that looks after a server's data. Otherwise as `load_config`.

    Raises:
        ConfigError: also when nothing but the home of whoever types says where the data is, and that is most likely
            the wrong one: under sudo, without anything there.
    """
    config = load_config(path, data_dir=data_dir)
    named = config.source is not None or data_dir is not None or os.environ.get("NOID_DATA_DIR")
    if not named and os.environ.get("SUDO_UID") and not config.data_dir.exists():
        raise ConfigError(
            f"which server is meant? No {FILE_NAME} is here, in {config.data_dir} or in {SYSTEM_FILE.parent}, and "
            f"under sudo {config.data_dir} is root's, where there is nothing. Name the server's file with --config, or "
            "its data directory with --data-dir."
        )
    return config


class Base:
    """What names and paths in a server.toml are relative to; for no file, to whoever asks."""

    def __init__(self, path: Path | None = None) -> None:
        self.where = str(path) if path else "configuration"
        self.directory = Path(os.path.abspath(path)).parent if path else Path.cwd()  # noqa: PTH100  # keeps links
        try:
            self._owner = path.stat().st_uid if path else os.geteuid()
        except OSError:  # reading it tells why
            self._owner = os.geteuid()

    def home(self) -> Path:
        """Return the home directory of the file's owner.

        Raises:
            ConfigError: it has none.
        """
        if self._owner == os.geteuid():
            return paths.home()
        try:
            return Path(pwd.getpwuid(self._owner).pw_dir)
        except KeyError as error:
            raise ConfigError(
                f"{self.where} belongs to user id {self._owner}, who has no home directory. Write data_dir, and paths "
                "without ~, into it."
            ) from error

    def path(self, text: str, where: str) -> Path:
        """Return the path that *text* means: ``~`` and ``$VARIABLE`` expanded, relative to the file.

        Raises:
            ConfigError: there is no such home directory.
        """
        if re.match(r"\$(HOME\b|\{HOME\})", text):
            text = "~" + text.partition("HOME")[2].removeprefix("}")
        found = Path(os.path.expandvars(text))
        if found.parts[0] == "~":
            found = self.home().joinpath(*found.parts[1:])
        try:
            return self.directory / found.expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{where} is {text!r}: there is no such home directory.") from error


def build_record(record: type[T], table: Mapping[str, Any], where: str, base: Base | None = None) -> T:
    """Make a *record* (a dataclass) from a TOML *table*, refusing unknown keys, wrong types and values out of bounds.

    Nested dataclasses are sections. ``Path`` fields take strings, which *base* makes paths of, ``tuple[str, ...]``
    fields take arrays, ``float`` fields take integers too. Bounds are those of `noid.core.config.settings.setting`.

    Raises:
        ConfigError: names *where*, the key, and the nearest known key or what is expected.
    """
    known = known_places() if record is Config else (("", f.name) for f in dataclasses.fields(record))  # type: ignore[arg-type]  # T is a dataclass
    return _Reader(where, base or Base(), frozenset(known)).record(record, table)


class _Reader:
    """Makes records of one file, in which there may be the keys at *known* places."""

    def __init__(self, where: str, base: Base, known: frozenset[Place]) -> None:
        self._where = where
        self._base = base
        self._known = known

    def record(self, record: type[T], table: Mapping[str, Any], section: str = "") -> T:
        """Return *record* with what *table*, the contents of *section*, says."""
        hints = typing.get_type_hints(record)
        fields = {f.name: f for f in dataclasses.fields(record) if f.name not in NOT_FROM_FILE}  # type: ignore[arg-type]  # T is a dataclass
        where = f"{self._where}: {section}" if section else self._where
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in fields:
                raise unknown_key((section, key), self._where, self._known)
            values[key] = self._convert(hints[key], value, f"{where}: {key}", key)
            _check(fields[key].metadata, values[key], f"{where}: {key}")
        return record(**values)

    def _convert(self, hint: Any, value: Any, where: str, key: str) -> Any:
        """Check *value* against the annotation *hint*, turning TOML's types into the record's."""
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            possible = [a for a in typing.get_args(hint) if a is not type(None)]
            if len(possible) > 1 and not any(_may_be(a, value) for a in possible):
                words = " or ".join(_expected(a) for a in possible)
                raise ConfigError(f"{where} is {value!r}; it must be {words}.")
            hint = next((a for a in possible if a is type(value)), possible[-1])
        origin = typing.get_origin(hint) or hint
        if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
            return self.record(typing.cast("type[Any]", origin), value, key)
        if origin is Path and isinstance(value, str) and value:
            return self._base.path(value, where)
        if origin is tuple:
            if isinstance(value, str):
                return (value,)
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return tuple(value)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is Mapping and isinstance(value, Mapping):
            return value
        if origin in (str, int, bool) and type(value) is origin:
            return value
        raise ConfigError(f"{where} is {value!r}; it must be {_expected(hint)}.")


def _may_be(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return isinstance(value, str | list) if origin is tuple else type(value) is origin


def _expected(hint: Any) -> str:
    words = {Path: "a path in quotes", tuple: "an array of strings", float: "a number", str: "a string"}
    words |= {int: "an integer", bool: "true or false"}
    return words.get(typing.get_origin(hint) or hint, "a section")


def _check(rules: Mapping[str, Any], value: Any, where: str) -> None:
    """Hold *value* against the *rules* of its field."""
    if "networks" in rules and isinstance(value, tuple):
        for text in value:
            try:
                networks.network(text)
            except ValueError as error:
                raise ConfigError(f"{where}: {text!r} is no address of a host or a network: {error}.") from error
        return
    allowed = rules.get("one_of")
    if allowed and value not in allowed:
        words = [f'"{word}"' for word in allowed]
        raise ConfigError(f"{where} is {value!r}; it must be {', '.join(words[:-1])} or {words[-1]}.")
    for rule, phrase in (("above", "a number above"), ("least", "a number of at least"), ("most", "at most")):
        if rule in rules and not _fits(rule, value, rules[rule]):
            why = f", {rules['why']}" if rule == "most" and "why" in rules else ""
            raise ConfigError(f"{where} is {value}; it must be {phrase} {rules[rule]:g}{why}.")


def _fits(rule: str, value: float, bound: float) -> bool:
    if not math.isfinite(value):  # TOML knows nan and inf
        return False
    return {"above": value > bound, "least": value >= bound, "most": value <= bound}[rule]


def _named(data_dir: Path | None) -> Path | None:
    """Return the file in the data directory that somebody named."""
    if data_dir is None and not os.environ.get("NOID_DATA_DIR"):
        return None
    path = (data_dir or paths.data_dir()) / FILE_NAME
    return path if path.is_file() else None


def _searched(data_dir: Path | None) -> Path | None:
    """Return the first file there is where one is looked for unless somebody named a data directory.

    Raises:
        ConfigError: somebody else could have put it there. It decides which programs run.
    """
    if data_dir is not None or os.environ.get("NOID_DATA_DIR"):
        return None
    for path in (Path(FILE_NAME), paths.data_dir() / FILE_NAME, SYSTEM_FILE):
        if not path.is_file():
            continue
        facts = path.stat()
        if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"{path.absolute()} was found but not taken: it belongs to user id {facts.st_uid} and has mode "
                f"{stat.S_IMODE(facts.st_mode):o}, so somebody else decides what it says. If it is meant, name it with "
                "--config."
            )
        return path
    return None


def _default_data_dir(path: Path | None, base: Base) -> Path:
    """Return where the data is when neither an option nor *path* says it."""
    if path is None or os.environ.get("NOID_DATA_DIR"):
        return paths.data_dir()
    if Path(os.path.abspath(path)) == SYSTEM_FILE:  # noqa: PTH100  # keeps links
        return SYSTEM_DATA_DIR
    return base.directory if base.directory.name == ".noid" else base.home() / ".noid"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Give another file with --config.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
