"""What can be set: every key of server.toml with its type, default and bounds, as records. All of it is here.

A key is a field; a section is a record that is a field. What a value must be like is said beside it, with `setting`.
How a file becomes these records is in `noid.core.config.reading`, and other ways to write keys in
`noid.core.config.spellings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from noid.core import paths
from noid.core.model.sandbox import DEFAULT_UIDS, SandboxMode, SandboxSettings
from noid.errors import ConfigError

T = TypeVar("T")

UID_END = 2**32 - 1
"""One more than the greatest user id: this one means none."""

NOT_FROM_FILE = frozenset({"local", "source", "notes"})
"""Fields of `Config` that no file can set."""


def setting(
    default: T,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] = (),
    networks: bool = False,
    why: str = "",
) -> T:
    """Return a field whose value, unless it is None, is finite and within these bounds, or one of these words.

    *networks*: what is in an array must be addresses of hosts or networks. *why* ends the sentence that refuses a value
    over *most*.
    """
    rules: dict[str, Any] = {"above": above, "least": least, "most": most}
    rules = {rule: bound for rule, bound in rules.items() if bound is not None}
    words = {"one_of": one_of, "networks": networks, "why": why}
    return field(default=default, metadata=rules | {rule: value for rule, value in words.items() if value})


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
    """How many machines of the last shape wait, woken, for the next create, and copies of the checkpoint restored last.

    0: none; each takes memory of its own.
    """

    size: int = setting(1, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """How much of the host all users together, one VM, or one client may take. None: as much as there is."""

    max_vms: int | None = setting(None, least=0)
    max_memory_per_vm: int | None = setting(None, above=0)
    """MiB."""
    max_connections: int = setting(4096, least=1)
    max_connections_per_address: int = setting(1024, least=1)
    max_ws_sessions_per_user: int | None = setting(None, least=0)
    max_tunnels_per_user: int | None = setting(256, least=0)
    requests_per_second: float = setting(500.0, least=0)
    requests_burst: int = setting(2000, least=1)
    max_header_bytes: int = setting(32 << 10, least=4 << 10, most=1 << 20)
    max_body_bytes: int = setting(1 << 20, least=4 << 10, most=64 << 20)
    max_message_bytes: int = setting(1 << 20, least=128 << 10, most=64 << 20)
    max_output_bytes: int = setting(1 << 20, least=1 << 10, most=64 << 20)
    header_timeout_secs: float = setting(5.0, above=0, most=600)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaConfig:
    """How much one user may have, unless a quota of their own says otherwise. None: as much as there is."""

    vms: int | None = setting(None, least=0)
    vcpus: int | None = setting(None, least=0)
    mem_mib: int | None = setting(None, least=0)
    checkpoints: int | None = setting(None, least=0)
    bytes: int | None = setting(None, least=0)
    exec_sessions: int | None = setting(None, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What goes into the server's log, and how it looks there."""

    level: str = setting("info", one_of=("debug", "info", "warning", "error"))
    format: str = setting("text", one_of=("text", "json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """PEM files: the certificate, with those between it and a root, and its key. None: no TLS."""

    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """What the processes of VMs are kept in. `settings` is what it says."""

    mode: str = setting("auto", one_of=tuple(SandboxMode))
    uids: str = f"{DEFAULT_UIDS.start}-{DEFAULT_UIDS.stop - 1}"
    cgroup: str | None = None
    overhead_mib: int = setting(256, least=64)
    readable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> SandboxSettings:
        """Return the settings.

        Raises:
            ConfigError: *uids* is no range of at least two user ids without root's, or a path is not absolute.
        """
        found = re.fullmatch(r"(\d{1,10})-(\d{1,10})", self.uids)
        first, last = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < first < last < UID_END:
            raise ConfigError(
                f"[sandbox] uids is {self.uids!r}; it must be FIRST-LAST, at least two user ids between 1 and "
                f"{UID_END - 1}."
            )
        for what, path in (("cgroup", self.cgroup), *(("readable", path) for path in self.readable)):
            if path is not None and (not path.startswith("/") or ".." in path.split("/")):
                raise ConfigError(f"[sandbox] {what} has {path!r}, which is not an absolute path.")
        return SandboxSettings(
            mode=SandboxMode(self.mode),
            uids=range(first, last + 1),
            cgroup=Path(self.cgroup) if self.cgroup else None,
            overhead_mib=self.overhead_mib,
            readable=tuple(map(Path, self.readable)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the agent was told. *local* agents listen on the unix socket only.

    *kernel* and *rootfs* (and *initrd*), the predecessor's keys, define the image ``default`` when they are given.
    *source* is the file that was read, and *notes* are sentences for the log about what was read.
    """

    data_dir: Path
    local: bool = False
    listen: str = "127.0.0.1:7654"
    kernel: Path | None = None
    rootfs: Path | None = None
    initrd: Path | None = None
    max_ws_sessions: int = setting(32, above=0)
    trust_forwarded_for: bool | tuple[str, ...] = setting(False, networks=True)
    metrics_users: tuple[str, ...] = ()
    exec_timeout_secs: float = setting(30.0, above=0)
    exec_reattach_secs: float = setting(10.0, above=0)
    console_timeout_secs: float = setting(3600.0, above=0)
    boot_timeout_secs: float = setting(180.0, above=0)
    wake_timeout_secs: float = setting(30.0, above=0)
    hook_timeout_secs: float = setting(
        10.0, above=0, most=120, why="so that an operation can end in order when hooks do not"
    )
    require_unique: str = setting("report", one_of=("report", "strict"))
    backends: Backends = field(default_factory=Backends)
    pool: PoolConfig = field(default_factory=PoolConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: Path | None = None
    notes: tuple[str, ...] = ()

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
