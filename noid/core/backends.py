"""What a backend must be able to do. A plugin's hook returns a `BackendSpec`; the agent opens and closes it.

All methods run under trio. Cancellation may strike at any await: after it, the thing a method was building may exist
in part, and the method's counterpart (``delete``, ``kill``, ``abandon_freeze``) removes it. Errors are `NoidError`s.
Blocking work belongs in ``trio.to_thread``; a method without ``async`` must not block.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import trio

from noid.core.model.connections import ConnectRequest
from noid.core.model.files import FileTransfer
from noid.core.model.guest_processes import GuestProcessInfo, OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest, Gap, TerminalSize
from noid.core.model.sandbox import SandboxSettings
from noid.core.model.storage import DiskUsage, FrozenDisk, Volume
from noid.core.model.users import DEFAULT_TOKEN, TOKEN_SCOPES, Credentials, Grant, Scope, TokenInfo, User
from noid.core.model.vms import Identity, NetLease, ProcessRef, Receipt

B_co = TypeVar("B_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentContext:
    """What a backend is given when opened. *database* is the store's file, for plugins with tables of their own.

    *sandbox* is for VMMs: what their processes are to be kept in.
    """

    data_dir: Path
    run_dir: Path
    database: Path
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)


@dataclass(frozen=True, slots=True)
class BackendSpec(Generic[B_co]):
    """An offer to run a backend.

    Attributes:
        name: What ``[backends]`` selects.
        config: A dataclass for ``[plugins.<kind>_<name>]``; unknown keys are refused and the known ones listed.
        open: Called with an instance of *config* and the context; the backend lives as long as the context manager.
    """

    name: str
    config: type[Any]
    open: Callable[[Any, AgentContext], AbstractAsyncContextManager[B_co]]


# --- VMM ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VmmFeatures:
    """What this VMM can do here. The core asks before it starts an operation and answers 501 otherwise.

    *vm_generation_id*: its machines have the device of that name, with a new id after every restore, so that a guest's
    kernel reseeds itself before anybody has told it.

    *capture_cuts_channel*: the connection of `Machine.channel` does not survive `Machine.capture`, also one that
    fails. A new one can be made at once.
    """

    accelerator: str
    disk_formats: frozenset[str]
    disk_pivot: bool
    network_kinds: frozenset[str]
    vm_generation_id: bool = False
    capture_cuts_channel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """What launching and restoring share.

    *directory* holds everything that lasts (disk, memory, logs), *run_dir* everything that dies with the process
    (sockets); *run_dir* is short enough for unix sockets. Both exist. *instance* must be visible in the VMM process'
    environment as ``NOID_INSTANCE`` and *data_dir* as ``NOID_DATA_DIR``: that is how orphans are found.
    """

    instance: str
    directory: Path
    run_dir: Path
    data_dir: Path
    cpus: int
    mem_mib: int
    volume: Volume
    lease: NetLease | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan(MachinePlan):
    """Boot from scratch. *cmdline* is appended to what the VMM itself needs (console, clock, ``noid.base=``)."""

    kernel: Path
    initrd: Path
    cmdline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan(MachinePlan):
    """Continue from a capture. *memory* is immutable and mapped privately, never copied; *state* is only read.

    *memory* lies in *directory* (a hard link), so that it lives as long as the VM. One that is *paused* stands still,
    its clocks too, until `Machine.resume`, which may be when it is loaded.
    """

    memory: Path
    state: Path
    paused: bool = False


class Capture(Protocol):
    """What a paused machine left behind: device state and changed memory, held until `finish`."""

    changed_bytes: int

    async def finish(self) -> None:
        """Build the memory image from the machine's parent image and what changed. The guest runs meanwhile.

        Leaves ``memory`` and ``state`` in the directory given to `Machine.capture`, both complete, not yet fsynced.
        Calling it twice is an error.

        Raises:
            NoSpace: the directory may hold a part, which the caller removes.
        """
        ...

    def discard(self) -> None:
        """Free what is held without building anything. Allowed after `finish`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineExit:
    """Why a machine ended. *reason* is ``shutdown``, ``reset``, ``killed`` or ``unknown``."""

    reason: str
    detail: str = ""


class Machine(Protocol):
    """One running VMM process. It outlives the agent; `VmmBackend.adopt` gives a new object for the same process.

    What its guest prints on its serial line is appended to ``serial.log`` in the plan's directory from the first byte
    on, whoever is connected. The VMM may give a part of a long log back to the disk by punching a hole.
    """

    ref: ProcessRef

    async def prepare_pause(self, new_top: Path | None) -> None:
        """Do while the guest runs what a checkpoint's pause would otherwise have to do: write out the disk, look up.

        *new_top* is the layer a `pivot_disk` in that pause will be given, if any. Nothing is promised about what the
        guest writes meanwhile, and no pause needs to follow.
        """
        ...

    async def pause(self) -> None:
        """Stop the vCPUs and settle the disk. Pausing a paused machine does nothing."""
        ...

    async def resume(self) -> None:
        """Let the vCPUs run. Resuming a running machine does nothing."""
        ...

    async def capture(self, into: Path) -> Capture:
        """Take hold of the device state and of changed memory, in part already in *into*. Only while paused.

        Time in here is time the guest loses: proportional to changed memory, not to memory.

        Raises:
            NoSpace: nothing but a part of *into* was changed.
            BackendError: the machine is still paused and can be resumed.
        """
        ...

    async def pivot_disk(self, new_top: Path, format: str) -> None:
        """Move the live disk onto *new_top*, an empty layer over the current one. Only while paused.

        Only where ``features.disk_pivot``. After an error the machine writes where it wrote before.
        """
        ...

    async def disk_path(self) -> Path:
        """Return the file the machine writes its disk to now."""
        ...

    async def channel(self) -> trio.abc.Stream:
        """Connect to the guest agent's byte stream. One connection at a time; closing it frees the place.

        Bytes may be of an earlier owner's conversation: the framing above resynchronises.

        Raises:
            DependencyDown: the machine is gone.
        """
        ...

    async def console(self) -> trio.abc.SendStream:
        """Return a way to type on the guest's serial line. Any number of them; closing one loses nothing that was sent.

        What is sent waits, beyond a few KiB, while the guest does not read, and breaks when the machine ends. What the
        guest prints is in ``serial.log`` in the plan's directory, appended at once and every byte once, from the first
        one on and whoever reads it; nothing that a reader does slows the guest.

        Raises:
            DependencyDown: the machine is gone, or has no serial line to type on.
        """
        ...

    async def press_power_button(self) -> None:
        """Do what pressing a power button does: a guest that listens shuts down, any other does nothing.

        Raises:
            DependencyDown: the machine is gone.
            Unsupported: it has no such button.
        """
        ...

    async def wait(self) -> MachineExit:
        """Return when the process has ended and its end is known. Any number of waiters."""
        ...

    async def kill(self) -> None:
        """End the process now and wait until it is gone. Killing a dead machine does nothing."""
        ...

    async def aclose(self) -> None:
        """Let go of the process without ending it."""
        ...


class VmmBackend(Protocol):
    """Runs machines."""

    name: str
    features: VmmFeatures

    def fingerprint(self) -> Mapping[str, str]:
        """Return what a checkpoint depends on: VMM, version, accelerator, machine type, CPU model. Equal or refused."""
        ...

    async def launch(self, plan: LaunchPlan) -> Machine:
        """Boot. Returns once the vCPUs run. After an error or cancellation no process is left.

        Raises:
            DependencyDown: the VMM's program is missing; says what to install.
            BackendError: the VMM refused; its own words are in the message.
        """
        ...

    async def restore(self, plan: RestorePlan) -> Machine:
        """Continue from a capture. Returns once the vCPUs run. After an error or cancellation no process is left."""
        ...

    async def adopt(self, ref: ProcessRef, plan: MachinePlan, memory: Path) -> Machine:
        """Take hold of a machine an earlier agent started. *memory* is the image it maps.

        Raises:
            NotFound: that process is gone.
            DependencyDown: it lives but does not answer within a few seconds; the caller kills it by *ref*.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupFinding:
    """What was found of a host: *status* is ok, warn or fail, *next* what to do about it."""

    what: str
    status: str
    text: str
    next: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmmSetup:
    """How the programs of a VMM come onto a host, for ``noid-server setup --vmm NAME``. noid downloads nothing.

    Attributes:
        name: What ``[backends] vmm`` selects; its section has a setting ``binary``.
        source: Where its release is and what its files are called, line by line.
        programs: What is installed, by name. The first is the VMM itself, the others may be missing.
        in_archive: What a program is called in a release's archive, with ``{program}`` for its name: a pattern of
            `re` that the whole path has to match.
        version_of: Called with a program's name and its file, which it runs. Raises `NoidError` for what is no such
            program, or is too old.
        examine: Called with the installed VMM: tries what it needs of the host. At most some seconds.
    """

    name: str
    source: tuple[str, ...]
    programs: tuple[str, ...]
    in_archive: str
    version_of: Callable[[str, Path], Awaitable[str]]
    examine: Callable[[Path], Awaitable[list[SetupFinding]]]


# --- storage ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageFeatures:
    """*format* is what volumes are, *freeze_is_constant* whether a freeze takes the same time for any disk size.

    *needs_agent*: only a guest that boots with what the ``initrd_files`` hooks offer can use the disk.
    """

    format: str
    freeze_is_constant: bool
    needs_pivot: bool
    needs_agent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezePlan:
    """A freeze that was prepared outside the pause. *prepared* is the new layer, when the storage needs one."""

    volume: Volume
    into: Path
    prepared: Path | None = None


class StorageBackend(Protocol):
    """Disks that can be cloned and frozen. Directories exist and are given; sizes are bytes."""

    name: str
    features: StorageFeatures

    async def clone(self, source: FrozenDisk, into: Path) -> Volume:
        """Make a writable disk in *into* that begins as *source*. *source* may be deleted afterwards.

        Raises:
            NoSpace: *into* may hold a part.
        """
        ...

    def volume(self, directory: Path) -> Volume:
        """Return the volume that lies in *directory* (after a restart, or after a freeze moved its top).

        Raises:
            Damaged: there is none.
        """
        ...

    async def prepare_freeze(self, volume: Volume, into: Path) -> FreezePlan:
        """Do the slow part of a freeze while the guest runs."""
        ...

    async def freeze(self, plan: FreezePlan, machine: Machine | None) -> FrozenDisk:
        """Make an immutable copy of the volume at this instant, in ``plan.into``.

        Runs while the guest is paused (*machine*) or not running (None), so the time it takes is time the guest
        loses: constant in the size of the disk, or ``features.freeze_is_constant`` is false. Data the guest has not
        flushed is included, because the memory that holds the rest is captured in the same pause.

        Raises:
            NoSpace: nothing was changed.
            BackendError: the volume is untouched; ``plan.into`` may hold a part.
        """
        ...

    async def abandon_freeze(self, plan: FreezePlan, machine: Machine | None) -> None:
        """Remove what `prepare_freeze` made, unless the machine already writes to it. Repeating it does nothing."""
        ...

    async def usage(self, thing: Volume | FrozenDisk) -> DiskUsage:
        """Return what *thing* occupies on the host."""
        ...

    async def delete(self, thing: Volume | FrozenDisk) -> None:
        """Remove *thing*'s files. What others share with it stays. Deleting twice does nothing."""
        ...


# --- exec ---------------------------------------------------------------------------------------------------------


STDIN_IN_FLIGHT_BYTES = 512 << 10
"""How much input may be on its way to a guest and not be there yet: more than any guest grants at once."""


class Process(Protocol):
    """A process in a guest, attached to one reader. Output that is not read stops the process, not its neighbours.

    *id* is the process' for the life of its guest, where ``Guest.features`` has ``sessions``; else the connection's.
    *stdin_taken* counts the input it has been given in its life, by whomever: what the guest had when this reader
    attached, and what was sent since. Of the latest `STDIN_IN_FLIGHT_BYTES`, a lost connection may have lost some;
    the next reader's count says how much.
    """

    id: int
    pid: int
    stdin_taken: int

    async def receive(self) -> OutputChunk | Gap | ProcessExit:
        """Return the next output, or how the process ended; after the end, `ProcessExit` again and again.

        Output comes in the order of its offsets, and where bytes are missing a `Gap` says so. Cancelled, it has taken
        nothing.

        Raises:
            DependencyDown: the guest or its VM went away; the process' fate is unknown.
        """
        ...

    async def send_stdin(self, data: bytes) -> None:
        """Write to the process' stdin; waits while the process does not read. Ignored once it has closed stdin."""
        ...

    async def close_stdin(self) -> None:
        """Let the process see the end of its input."""
        ...

    async def signal(self, signo: int) -> None:
        """Send *signo* to the process' group. Signalling an ended process does nothing."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Change the size of the process' terminal. Does nothing to a process without one, or an ended one."""
        ...

    async def end(self, grace_secs: float) -> None:
        """Ask the process' group to end: TERM now, KILL after the grace. Returns at once.

        Output goes on, and `receive` tells the end as ever.
        """
        ...


class GuestConnection(Protocol):
    """A TCP connection that a guest has made: bytes both ways, each way with an end of its own.

    What is not read here holds back whoever sends in the guest, what is not read there `send_all`; neither holds up
    anything else. Nobody in the guest takes a connection that is broken off for one that has ended.
    """

    async def send_all(self, data: bytes) -> None:
        """Send *data*; waits while it is not taken. What the other end no longer takes is dropped: see `wait_closed`.

        Cancelled, an unknown part was sent.

        Raises:
            DependencyDown: the guest or its VM went away.
        """
        ...

    async def send_eof(self) -> None:
        """Tell the other end that no more comes. It can still be received from."""
        ...

    async def receive_some(self) -> bytes:
        """Return what comes next, or nothing once the other end has said that no more does. One reader at a time.

        Cancelled, it has taken nothing.

        Raises:
            Unreachable: the other end, or the network between, has broken the connection off.
            DependencyDown: the guest or its VM went away.
            BackendError: the guest does not do its part.
        """
        ...

    async def wait_closed(self) -> None:
        """Return once both directions have ended in order. Only after `receive_some` has returned nothing.

        Raises: what `receive_some` raises.
        """
        ...

    async def aclose(self) -> None:
        """Let go of it; before both directions have ended, the other end sees it reset. Twice does nothing.

        Bounded: a guest that does not answer is not waited for.
        """
        ...


class Guest(Protocol):
    """The agent inside one VM: many processes at once.

    *features* is what this way into the guest can do. The core asks before it starts something and answers
    `Unsupported` otherwise:

    - ``sessions``: processes outlive their connection; `attach` and `processes` work.
    - ``tty``: processes can have a terminal.
    - ``stdin``, ``stderr``, ``signals``: processes take input, tell stderr from stdout, can be signalled.
    - ``files``: files are copied in and out.
    - ``ports``: TCP connections are made from inside the guest.
    - ``identity``: `wake` makes a clone its own.
    - ``power``: the guest can be asked to power off.
    """

    features: frozenset[str]

    @property
    def heard_at(self) -> float:
        """When it said something last, on trio's clock."""
        ...

    async def start(self, request: ExecRequest) -> Process:
        """Start a process and attach to it. Cancelled before it is known to run, it is ended.

        Raises:
            InvalidRequest: no such user, working directory not enterable.
            DependencyDown: the guest does not answer.

        A program that does not exist or may not run is no error here: the process exits with 127 or 126, as in a shell.
        """
        ...

    async def attach(self, process_id: int, offset: int) -> Process:
        """Attach to a process of this guest whose output is then received from *offset*.

        Where the guest has no longer kept all of that, `Process.receive` returns a `Gap` first. Whoever was attached
        before receives nothing more: a process has one reader.

        Raises:
            NotFound: there is no such process.
            DependencyDown: the guest does not answer.
        """
        ...

    async def processes(self) -> list[GuestProcessInfo]:
        """Return the processes that were started through this agent and not released, oldest first.

        Ended ones stay for a while; those that nobody is attached to go first. What is in it the guest says: it may
        be a lie, but it is bounded and well-formed.

        Raises:
            DependencyDown: the guest does not answer.
        """
        ...

    async def release(self, process: Process | int) -> None:
        """Forget a process: end its group (TERM, then KILL after a grace) if it still runs, and drop its output.

        An int is the id of one nobody needs to be attached to. Releasing what there is not does nothing.
        """
        ...

    async def transfer(self, request: FileTransfer) -> Process:
        """Start the guest's end of a copy, as the user whose files they are.

        What goes out begins with one line on stdout: ``error ERRNO TEXT``, or what the path is: ``KIND SIZE ALLOCATED
        MODE MTIME_NS TAG SUM``, with KIND one of ``file``, ``directory`` and ``other``, MODE octal, TAG what changes
        when the file does, SUM a SHA-256 or ``-``. The bytes follow. Into the guest, bytes go to stdin after the line
        ``ready`` or ``error``; the last line is ``done BYTES ENTRIES`` or ``error``. Lines on stderr name what was
        left out. The exit code is 0, 1 if something was left out, 2 after an error.

        Raises:
            InvalidRequest: no such user.
            Unsupported: `features` lacks ``files``.
            DependencyDown: the guest does not answer.
        """
        ...

    async def connect(self, request: ConnectRequest) -> GuestConnection:
        """Make a TCP connection from inside the guest. It is the caller's to close.

        Cancelled, there is none. It takes no network of the guest's: ``localhost`` always works.

        Raises:
            Unreachable: nothing takes connections there, or there is no way.
            InvalidRequest: no such user.
            Unsupported: `features` lacks ``ports``; says why, and what would help.
            DependencyDown: the guest does not answer.
        """
        ...

    async def wake(self, identity: Identity) -> Receipt:
        """Make the guest its own: clock, randomness, names, network, then the image's own hooks.

        Answered before any later `start`; it may take ``identity.hook_timeout_secs`` longer than a `ping`.
        """
        ...

    async def resize_console(self, size: TerminalSize) -> None:
        """Tell the guest how large the terminal at its serial console is. Only where *features* has ``tty``."""
        ...

    async def ping(self) -> float:
        """Return the round trip in seconds."""
        ...

    async def power_off(self) -> None:
        """Ask the guest to sync its file systems and power off. Returns when it has acknowledged."""
        ...

    async def reboot(self) -> None:
        """Ask the guest to sync its file systems and reboot: its machine ends, with ``reset``, and is made anew.

        Returns when it has acknowledged.
        """
        ...


class ConsoleListener(Protocol):
    """What a guest prints, from when the listening began."""

    async def receive_some(self) -> bytes:
        """Return what was printed since the last call, waiting for it; ``b""`` once the machine has ended.

        Raises:
            BackendError: so much was printed since the last call that a part of it is no longer kept.
        """
        ...


class ConsolePort(Protocol):
    """The serial line of one machine, which any number of writers and listeners share.

    Nothing is connected and nothing held for who does neither. Listening never slows the guest.
    """

    async def write(self, data: bytes) -> None:
        """Type *data*. Waits while the guest does not read; writers take turns. After a cancellation a part is typed.

        Raises:
            DependencyDown: see `Machine.console`.
        """
        ...

    def listen(self) -> AbstractAsyncContextManager[ConsoleListener]:
        """Listen to what the guest prints from now on."""
        ...


class ExecBackend(Protocol):
    """Reaches into guests. *needs_agent*: only into those that booted with what the ``initrd_files`` hooks offer."""

    name: str
    needs_agent: bool

    def connect(self, machine: Machine, console: ConsolePort) -> AbstractAsyncContextManager[Guest]:
        """Attach to the machine's guest agent; entering waits until it answers (bound it with ``fail_after``).

        *console* is the machine's serial line, for guests that have no agent.
        """
        ...


# --- network, auth ------------------------------------------------------------------------------------------------


class NetworkBackend(Protocol):
    """Connects VMs. Every verb can be repeated."""

    name: str
    kinds: frozenset[str]

    async def lease(self, instance: str) -> NetLease | None:
        """Return what the machine *instance* is to be connected to. The same instance gets the same lease."""
        ...

    async def release(self, instance: str) -> None:
        """Give the lease back. Releasing what is not leased does nothing."""
        ...


class AuthBackend(Protocol):
    """Knows whose a token is and what it allows. Peer credentials on the local socket are the server's own business.

    Other processes (``noid-server token``) make and revoke tokens of the same users; that counts from the next
    `authenticate` on.
    """

    name: str

    def authenticate(self, credentials: Credentials) -> Grant | None:
        """Return what the token grants, or None: there is no such token, or it has expired.

        Constant time in the token's value. Asked for every request, so it takes microseconds.
        """
        ...

    async def create_token(
        self,
        user: User,
        *,
        name: str = DEFAULT_TOKEN,
        scopes: frozenset[Scope] = TOKEN_SCOPES,
        expires_at: datetime | None = None,
        shown: str | None = None,
        most: int | None = None,
    ) -> str:
        """Return a new token, the only copy there will ever be. An expired one of that name goes away.

        With *shown*, the token of whoever asks, only if that is still one of *user*'s at the instant at which the new
        one begins to be: what is revoked leaves no heirs. With *most*, only if *user* has no more than that with it,
        those that have expired too; the same instant decides.

        Raises:
            Conflict: *user* has a valid token of that name, or *most* tokens.
            Unauthenticated: *shown* has been revoked, or has expired.
        """
        ...

    async def tokens(self, user: User) -> list[TokenInfo]:
        """Return *user*'s tokens, oldest first; those that have expired too, until they are revoked or replaced."""
        ...

    async def revoke_token(self, user: User, name: str) -> None:
        """Make *user*'s token *name* invalid.

        Raises:
            NotFound: there is none.
        """
        ...

    async def revoke_tokens(self, user: User) -> None:
        """Make every token of *user* invalid. Repeating it does nothing."""
        ...

    async def save_uses(self) -> None:
        """Write down which tokens were used since the last call, for `tokens`. The agent calls it every minute."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, after it was committed. *facts* is JSON-able."""

    kind: str
    owner: str
    vm: str
    facts: Mapping[str, Any] = field(default_factory=dict)
