"""The records everything in noid talks about. Frozen, keyword-only, without behaviour beyond derived values.

Units are in the names; times are aware UTC; identifiers are strings. A record that is stored or sent has exactly the
fields its table or JSON object has.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from noid.errors import InvalidRequest

NAME_LENGTH_MAX = 64
DEFAULT_CPUS = 1
DEFAULT_MEM_MIB = 2048
CPUS_MAX = 32
MEM_MIB_MIN = 64
ENV_ENTRIES_MAX = 64
ENV_VALUE_BYTES_MAX = 32768
LOG_BYTES = 1 << 20
LOG_BYTES_MIN = 4096
LOG_BYTES_MAX = 16 << 20
LABEL_BYTES_MAX = 8192
LABELS_MAX = 64
CHECKPOINT_LABEL_LENGTH_MAX = 4096
LABEL_VALUE_LENGTH_MAX = 256
PORT_MAX = 65535

#: Ends when systemd has finished booting. The agent answers long before systemd can be asked, hence the patience; a
#: guest whose PID 1 is something else is ready at once, one whose PID 1 stays our own init after five seconds.
DEFAULT_READY = (
    "sh",
    "-c",
    "i=0; while [ $i -lt 50 ]; do "
    'case "$(readlink /proc/1/exe)" in */systemd) break;; */init|"") ;; *) exit 0;; esac; '
    "i=$((i+1)); sleep 0.1; done; [ $i -lt 50 ] || exit 0; "
    "until [ -S /run/systemd/private ]; do sleep 0.2; done; "
    "until state=$(systemctl is-system-running --wait 2>/dev/null) || "
    '[ "$state" = degraded ] || [ "$state" = maintenance ]; do sleep 0.5; done',
)

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LABEL_KEY = re.compile(r"[A-Za-z0-9_./-]{1,63}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class VmState(enum.StrEnum):
    """What is true of a VM. What is being done with it is `Vm.busy`."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    RESTORING = "restoring"
    STOPPED = "stopped"
    DEAD = "dead"
    DESTROYING = "destroying"


class Scope(enum.StrEnum):
    """What a token allows. Each includes none of the others; a token has a set of them."""

    READ = "read"
    """Look: VMs, checkpoints, operations, events, and what the server can do."""
    EXEC = "exec"
    """Be in a guest: processes, console, files, logs."""
    MANAGE = "manage"
    """Change what there is: VMs, checkpoints, tokens."""
    ADMIN = "admin"
    """Change who there is. No token has it: only who comes through the local socket."""


TOKEN_SCOPES = frozenset({Scope.READ, Scope.EXEC, Scope.MANAGE})
"""What a token can allow at most, and does unless somebody asked for less."""
DEFAULT_TOKEN = "default"  # noqa: S105  # a name, no secret
"""What a user's first token is called."""


def checked_name(name: str, what: str = "VM name") -> str:
    """Return *name* if it is a legal name, 1 to 64 of ``A-Z a-z 0-9 _ - .``, not beginning with ``.`` or ``-``.

    Raises:
        InvalidRequest: says which rule is broken.
    """
    if not name:
        raise InvalidRequest(f"{what} is empty. Give it 1 to {NAME_LENGTH_MAX} characters.")
    if len(name) > NAME_LENGTH_MAX:
        raise InvalidRequest(f"{what} has {len(name)} characters; at most {NAME_LENGTH_MAX} are allowed.")
    if name[0] in ".-":
        raise InvalidRequest(f"{what} {name!r} begins with {name[0]!r}. Begin with a letter, a digit or '_'.")
    if ".." in name:
        raise InvalidRequest(f"{what} {name!r} contains '..', which is not allowed.")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{what} {name!r} has invalid characters. Allowed are A-Z a-z 0-9 _ - and '.'.")
    return name


def checked_env(entries: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Turn ``KEY=VALUE`` entries into a mapping. The last of two entries with one key wins.

    Raises:
        InvalidRequest: too many entries, no ``=``, an invalid name, a value too long or with a NUL.
    """
    if len(entries) > ENV_ENTRIES_MAX:
        raise InvalidRequest(f"too many environment entries: {len(entries)}; at most {ENV_ENTRIES_MAX} are allowed.")
    env: dict[str, str] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals:
            raise InvalidRequest(f"environment entry {key!r} is not in the form KEY=VALUE.")
        if not _ENV_NAME.fullmatch(key):
            raise InvalidRequest(f"invalid environment variable name {key!r}: letters, digits and '_' only.")
        try:
            size = len(value.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the value of {key} contains half a surrogate pair.") from error
        if size > ENV_VALUE_BYTES_MAX:
            raise InvalidRequest(f"the value of {key} is too long; at most {ENV_VALUE_BYTES_MAX} bytes are allowed.")
        if "\0" in value:
            raise InvalidRequest(f"the value of {key} contains a NUL byte, which no environment can hold.")
        env[key] = value
    return env


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return *labels*, sorted by key, if they are legal: what owners tell their VMs and checkpoints apart by.

    Raises:
        InvalidRequest: too many, a key that is not 1 to 63 of ``A-Z a-z 0-9 _ . / -``, a value too long.
    """
    if len(labels) > LABELS_MAX:
        raise InvalidRequest(f"too many labels: {len(labels)}; at most {LABELS_MAX} are allowed.")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidRequest(f"label key {key[:80]!r} is not 1 to 63 characters of A-Z a-z 0-9 _ . / and '-'.")
        if len(value) > LABEL_VALUE_LENGTH_MAX:
            raise InvalidRequest(
                f"the value of label {key!r} has {len(value)} characters; at most {LABEL_VALUE_LENGTH_MAX} are allowed."
            )
    return dict(sorted(labels.items()))


def checked_label(label: str | None) -> str | None:
    """Return what is said of a checkpoint, if it is short enough to be in every list of them.

    Raises:
        InvalidRequest: it is not.
    """
    if label is not None and len(label) > CHECKPOINT_LABEL_LENGTH_MAX:
        raise InvalidRequest(
            f"the label has {len(label)} characters; at most {CHECKPOINT_LABEL_LENGTH_MAX} are allowed."
        )
    return label


def checked_argv(argv: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return *argv* as a tuple.

    Raises:
        InvalidRequest: it is empty, its program is empty, or an argument contains a NUL.
    """
    if not argv or not argv[0]:
        raise InvalidRequest("command cannot be empty")
    for argument in argv:
        if "\0" in argument:
            raise InvalidRequest("an argument of the command contains a NUL byte, which no program can be given.")
    return tuple(argv)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Whoever owns things."""

    id: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a caller showed: a bearer token, or the uid at the other end of a unix socket."""

    token: str | None = None
    peer_uid: int | None = None
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a token gives whoever shows it. *expires_at* None means never."""

    user_id: str
    token_name: str
    scopes: frozenset[Scope]
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo:
    """A token, without the token. *last_used_at* may be some minutes old; None: never, as far as anybody knows."""

    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. *token* is the name of the token they showed; None: they came through the local socket."""

    user: User
    scopes: frozenset[Scope]
    token: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """A process for sure: a pid alone may have been reused. *start_ticks* is field 22 of ``/proc/<pid>/stat``."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetLease:
    """What a VM's network card is connected to. *kind* is ``none``, ``user`` or ``tap``."""

    kind: str
    mac: str | None = None
    guest_address: str | None = None
    gateway: str | None = None
    tap_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """What a VM shall be. `checked` is the one place that says whether it can be."""

    name: str
    cpus: int = DEFAULT_CPUS
    mem_mib: int = DEFAULT_MEM_MIB
    image: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def checked(self, host_mem_mib: int) -> VmSpec:
        """Return self.

        Raises:
            InvalidRequest: names the field and its range.
        """
        checked_name(self.name)
        checked_name(self.image, "image name")
        checked_labels(self.labels)
        if not 1 <= self.cpus <= CPUS_MAX:
            raise InvalidRequest(f"cpus is {self.cpus}; it must be between 1 and {CPUS_MAX}.")
        if not MEM_MIB_MIN <= self.mem_mib <= host_mem_mib:
            raise InvalidRequest(
                f"mem_mib is {self.mem_mib}; it must be between {MEM_MIB_MIN} and {host_mem_mib}, the host's memory."
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptItem:
    """One thing that makes a clone its own. *status* is ``done``, ``failed`` or ``not_possible``.

    *required* ones must be done where ``require_unique`` is strict.
    """

    name: str
    status: str
    before: str = ""
    after: str = ""
    detail: str = ""
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the guest agent changed before the first user command could run (clock, randomness, names)."""

    items: tuple[ReceiptItem, ...] = ()

    @property
    def complete(self) -> bool:
        """No item failed."""
        return all(item.status != "failed" for item in self.items)

    @property
    def lacking(self) -> tuple[ReceiptItem, ...]:
        """The required items that are not done: what the guest may still share with its twins."""
        return tuple(item for item in self.items if item.required and item.status != "done")


class WakeReason(enum.StrEnum):
    """Why a guest is told who it is. The image's hooks are told, too."""

    CREATE = "create"
    RESTORE = "restore"
    CLONE = "clone"
    BOOT = "boot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a woken guest is told to be. *entropy* is fresh host randomness, at least 32 bytes.

    *generation* is greater with every wake, wherever the guest came from: a program that sees it grow was cloned.
    *hook_timeout_secs* is what the image's own programs may take together before the guest answers; 0: none is run.
    *vm_generation_id* says that the machine has that device, see `noid.core.backends.VmmFeatures`.
    """

    hostname: str
    machine_id: str
    unix_ns: int
    entropy: bytes = field(repr=False)
    generation: int = 0
    lease: NetLease | None = None
    reason: WakeReason = WakeReason.CREATE
    hook_timeout_secs: float = 0.0
    vm_generation_id: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """A VM as the store knows it.

    *instance* names the VM's directory and run directory; an in-place restore gives the VM a new one. *origin* is the
    checkpoint or template it was restored from. *generation* grows with every change of the row. *ended* says how its
    last machine ended. *labels* are its owner's words. What follows is of the moment and not stored: *busy* names the
    operation that holds the VM, *responding* says whether its guest answers (None: not known), and
    *unresponsive_since* when it was first asked in vain.
    """

    id: str
    owner: str
    name: str
    state: VmState
    generation: int
    cpus: int
    mem_mib: int
    image: str
    instance: str
    network: str = "none"
    lease: NetLease | None = None
    process: ProcessRef | None = None
    origin: str | None = None
    receipt: Receipt | None = None
    created_at: datetime
    ended: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    busy: str | None = None
    responding: bool | None = None
    unresponsive_since: datetime | None = None

    def __hash__(self) -> int:
        """Return what tells rows apart; the rest is compared."""
        return hash((self.id, self.generation))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A frozen VM: memory, devices, disk. It belongs to its owner and outlives its VM.

    *id* is 16 lowercase hex digits. *parent* is the checkpoint its VM was restored from, so history is a graph.
    """

    id: str
    owner: str
    vm_id: str
    vm_name: str
    label: str | None
    cpus: int
    mem_mib: int
    image: str
    parent: str | None
    created_at: datetime
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A VM's writable disk: *files* in *directory*, of which the VMM opens *top*. *format* is ``raw`` or ``qcow2``."""

    directory: Path
    format: str
    top: str
    files: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file the VMM opens."""
        return self.directory / self.top


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenDisk:
    """An immutable disk: *files* in *directory*, self-contained, of which *top* is the one to clone."""

    directory: Path
    format: str
    top: str
    files: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file that stands for the whole disk."""
        return self.directory / self.top


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """Bytes on the host: *unique* would be freed by deleting the thing, *shared* are used by others too."""

    unique_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A bootable guest: kernel, initrd with the guest agent, ext4 root. All files are immutable once published.

    *digest* identifies the content of all three. *user* is who commands run as when the caller names nobody. *ready*
    is the command that ends when the guest has finished booting; its exit status does not matter, and a guest without
    that program counts as ready once its agent answers. *agent* is whether the initrd has that agent; without it, the
    guest is reached by exec backends that need none.
    """

    name: str
    directory: Path
    kernel: Path
    initrd: Path
    rootfs: Path
    digest: str
    architecture: str = "x86_64"
    kernel_release: str = ""
    cmdline: str = ""
    agent: bool = True
    user: str = "root"
    ready: tuple[str, ...] = DEFAULT_READY
    description: str = ""
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalSize:
    """How large a terminal is, in characters; 0 where nobody knows. Both fit 16 bits."""

    columns: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """A process to start in a guest. *argv* goes to ``execve`` as it is; no shell is involved.

    *user* None means the image's default user; *cwd* None means that user's home, or ``/``. *tty* gives it a terminal
    of that size, and stdout is then all it has. *log_bytes* is how much of its latest output the guest keeps. *label*
    is text of ours, at most `LABEL_BYTES_MAX`, that the guest keeps with the process and gives back.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    user: str | None = None
    stdin: bool = False
    timeout_secs: float | None = None
    tty: TerminalSize | None = None
    log_bytes: int = LOG_BYTES
    label: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChunk:
    """Bytes a process wrote. *stream* is 1 for stdout, 2 for stderr.

    A process' output is one log: the bytes of both streams in the order the guest read them, counted together from 0.
    *offset* is that of the first byte of *data*.
    """

    stream: int
    data: bytes = field(repr=False)
    offset: int = 0

    @property
    def end(self) -> int:
        """The offset of what follows."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Bytes of a log, from *start* up to *end*, that nobody has any more."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process used in its life."""

    user_secs: float
    system_secs: float
    rss_max_kib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExit:
    """How a process in a guest ended: with *code*, or by *signal*. *status* is what a shell would show."""

    code: int | None
    signal: int | None = None
    usage: Usage | None = field(default=None, compare=False)

    @property
    def status(self) -> int:
        """The exit code, or 128 plus the signal."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestProcessInfo:
    """A process as its guest tells of it. The guest keeps bytes *log_start* up to *log_end* of its output.

    *id* was chosen by the host that started it and is the same for the life of the guest, in checkpoints and clones
    too. *stdin* is whether it still takes input. *exit* is None while it runs.
    """

    id: int
    pid: int
    running: bool
    tty: bool
    stdin: bool
    log_start: int
    log_end: int
    exit: ProcessExit | None
    started_at_unix_ns: int
    label: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTransfer:
    """What a guest shall copy out of itself, or into itself. *path* is the guest's; its bytes are any but NUL.

    *form* of what goes out: ``look`` (nothing but what it is), ``sum`` (and the SHA-256 of its first *length* bytes),
    ``file`` (and *length* bytes from *offset*), ``tar`` (and a tar stream of it and all below it). Of what comes in:
    ``file`` (all of *size* bytes but the *offset* ones that an earlier transfer left, then one byte that says that it
    is complete; *sha256* of the whole is compared where there were earlier ones) and ``tar`` (into the directory
    *path*, which is made if it is missing; *owners* are restored only if asked for, by root).
    """

    incoming: bool
    form: str
    path: str
    user: str | None = None
    offset: int = 0
    length: int | None = None
    size: int = 0
    mode: int | None = None
    mtime_ns: int | None = None
    sha256: str = ""
    owners: bool = False


LOCALHOST = "localhost"
"""Both loopback addresses of a guest, 127.0.0.1 first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectRequest:
    """A TCP connection that a guest shall make, as *user*. *host* is an IP address, or `LOCALHOST`."""

    port: int
    host: str = LOCALHOST
    user: str | None = None

    @property
    def target(self) -> str:
        """Where it goes, for people: ``localhost:80``, ``[::1]:80``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def checked_port(text: str) -> int:
    """Return the TCP port that *text* says.

    Raises:
        InvalidRequest: it says none.
    """
    if not (re.fullmatch(r"[1-9][0-9]{0,4}", text) and int(text) <= PORT_MAX):
        raise InvalidRequest(f"{text[:40]!r} is no port: it is a number from 1 to {PORT_MAX}.")
    return int(text)


def checked_host(text: str) -> str:
    """Return the host *text* as a guest can be told it.

    Raises:
        InvalidRequest: it is no IP address; names are not looked up.
    """
    import ipaddress  # which commands that connect nowhere need not wait for

    if text == LOCALHOST:
        return text
    try:
        address = ipaddress.ip_address(text[1:-1] if text[:1] + text[-1:] == "[]" else text)
        if "%" in text:
            raise ValueError("an address with a zone, which is the guest's to name")
    except ValueError as error:
        raise InvalidRequest(
            f"{text[:80]!r} is no IP address. Give one that the guest can reach, or {LOCALHOST!r}: names are not "
            "looked up."
        ) from error
    return str(address)


def now() -> datetime:
    """Return the current time, aware, UTC."""
    return datetime.now(UTC)


def wire_time(moment: datetime) -> str:
    """Return *moment* as the predecessor's clients expect it: ``YYYY-MM-DD HH:MM:SS`` in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
