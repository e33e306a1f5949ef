"""server.toml, read once into a frozen record: the predecessor's flat keys, ``[backends]`` and ``[plugins.*]``.

Every key is known by name and type; an unknown one is an error that names the nearest known key, because a misspelt
limit that is silently ignored is worse than no limit.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from noid.core import paths
from noid.errors import ConfigError

T = TypeVar("T")

HOOK_TIMEOUT_SECS_MAX = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """Which backend runs each layer. ``auto`` asks the plugins' probe hooks."""

    vmm: str = "auto"
    storage: str = "auto"
    exec: tuple[str, ...] = ("vsock",)
    network: str = "user"
    auth: str = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How many machines of the last shape wait, woken, for the next create. 0: none; each takes memory of its own."""

    size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the agent was told. *local* agents listen on the unix socket only.

    *kernel* and *rootfs* (and *initrd*), the predecessor's keys, define the image ``default`` when they are given.
    """

    data_dir: Path
    local: bool = False
    listen: str = "127.0.0.1:7654"
    kernel: Path | None = None
    rootfs: Path | None = None
    initrd: Path | None = None
    max_ws_sessions: int = 32
    trust_forwarded_for: bool = False
    exec_timeout_secs: float = 30.0
    exec_reattach_secs: float = 10.0
    console_timeout_secs: float = 3600.0
    boot_timeout_secs: float = 180.0
    wake_timeout_secs: float = 30.0
    hook_timeout_secs: float = 10.0
    require_unique: str = "report"
    backends: Backends = field(default_factory=Backends)
    pool: PoolConfig = field(default_factory=PoolConfig)
    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: Path | None = None

    @property
    def run_dir(self) -> Path:
        """Where sockets live; short enough for unix sockets."""
        return paths.run_dir(self.data_dir)

    @property
    def socket_path(self) -> Path:
        """The local agent socket."""
        return paths.socket_path(self.data_dir)

    @property
    def database(self) -> Path:
        """The store's file."""
        return self.data_dir / "noid.db"


_NOT_FROM_FILE = frozenset({"local", "source"})


def load_config(path: Path | None = None, *, data_dir: Path | None = None, local: bool = False) -> Config:
    """Read the configuration.

    Args:
        path: A server.toml that must exist. None takes ``<data_dir>/server.toml`` if there is one.
        data_dir: Takes precedence over the file's ``data_dir``, which takes precedence over ``$NOID_DATA_DIR`` and
            ``~/.noid``.
        local: Whether this is a per-user agent without a TCP listener.

    Raises:
        ConfigError: unreadable, not TOML (with line and column), an unknown key, a wrong type.
    """
    default = data_dir or paths.data_dir()
    if path is None and (default / "server.toml").is_file():
        path = default / "server.toml"
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}. Give another file with --config.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    where = str(path) if path else "configuration"
    for key in _NOT_FROM_FILE & table.keys():
        raise ConfigError(f"{where}: unknown key {key!r}.")
    config = build_record(Config, {"data_dir": str(default)} | table, where)
    # abspath and not resolve: two agents must agree on the name, and a link in it may be meant to move
    chosen = Path(os.path.abspath(data_dir or config.data_dir))  # noqa: PTH100
    config = dataclasses.replace(config, data_dir=chosen)
    for name, section in config.plugins.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where}: [plugins] {name} must be a section: [plugins.{name}].")
    for key in ("max_ws_sessions", *(f.name for f in dataclasses.fields(Config) if f.name.endswith("_secs"))):
        if not 0 < getattr(config, key) < math.inf:  # TOML knows nan and inf
            raise ConfigError(f"{where}: {key} is {getattr(config, key)}; it must be a number above 0.")
    if config.require_unique not in ("report", "strict"):
        raise ConfigError(f'{where}: require_unique is {config.require_unique!r}; it must be "report" or "strict".')
    if config.hook_timeout_secs > HOOK_TIMEOUT_SECS_MAX:
        raise ConfigError(
            f"{where}: hook_timeout_secs is {config.hook_timeout_secs:g}; it must be at most "
            f"{HOOK_TIMEOUT_SECS_MAX:g}, so that an operation can end in order when hooks do not."
        )
    return dataclasses.replace(config, local=local, source=path)


def build_record(record: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make a *record* (a dataclass) from a TOML *table*, refusing unknown keys and wrong types.

    Nested dataclasses are sections. ``Path`` fields take strings (``~`` is expanded), ``tuple[str, ...]`` fields take
    arrays, ``float`` fields take integers too.

    Raises:
        ConfigError: names *where*, the key, and the nearest known key or the expected type.
    """
    hints = typing.get_type_hints(record)
    known = [f.name for f in dataclasses.fields(record) if f.name not in _NOT_FROM_FILE]  # type: ignore[arg-type]  # T is a dataclass
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(sorted(known))}."
            raise ConfigError(f"{where}: unknown key {key!r}.{hint}")
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    return record(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check *value* against the annotation *hint*, turning TOML's types into the record's."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    origin = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return build_record(typing.cast("type[Any]", origin), value, where)
    if origin is Path and isinstance(value, str) and value:
        try:
            return Path(os.path.expandvars(value)).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{where} is {value!r}: there is no such home directory.") from error
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
    expected = {Path: "a path in quotes", tuple: "an array of strings", float: "a number", str: "a string"}
    name = expected.get(origin, {int: "an integer", bool: "true or false"}.get(origin, "a section"))
    raise ConfigError(f"{where} is {value!r}; it must be {name}.")
