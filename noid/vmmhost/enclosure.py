"""What one VM's process is kept in, from before it starts until after it has ended.

A process with a user of its own reaches files through its room alone: the VM's directory is there under the name it
has on the host. Whose a file is decides what the process may do to it: its own it may write, shared ones belong to the
agent and are readable for the group of all VMs' processes, anything else is closed to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.hostfs import clone_file
from noid.vmmhost.cgroups import Cgroup
from noid.vmmhost.identities import Identities
from noid.vmmhost.launcher import LAUNCHER
from noid.vmmhost.limits import Limits

log = logging.getLogger(__name__)

#: Where the dynamic linker of an ordinary program looks.
SYSTEM = tuple(map(Path, ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")))
_DEVICES = {"null": (1, 3), "random": (1, 8), "urandom": (1, 9), "net/tun": (10, 200), "kvm": (10, 232)}
_ROOM_KIB = 64 << 10
_REMOVE_SECS = 2.0
_REMOVE_LOOK_SECS = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a VMM needs to see of the host besides the VM's directory.

    Attributes:
        read: Files and directories it may read. What is not there is left out.
        write: Directories it may write to.
        devices: Names below ``/dev``.
        connected: Whether it is to reach the host's network.
        becomes_user: It gives up root by itself, once it has opened what it needs; told how by `Enclosure.user`.
        memory_kib: How much it may keep in its root directory: what `Enclosure.outgoing` hands over.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    devices: tuple[str, ...] = ()
    connected: bool = False
    becomes_user: bool = False
    memory_kib: int = _ROOM_KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A file for a VMM to write: *path* is what to tell it, *fd* what the agent reads from."""

    path: Path
    fd: int

    def keep(self, target: Path) -> None:
        """Write what it holds to *target*, a file of the agent's. Blocks.

        Raises:
            OSError: *target* may hold a part.
        """
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            size, offset = os.fstat(self.fd).st_size, 0
            while offset < size:
                offset += os.sendfile(file.fileno(), self.fd, offset, size - offset)


class Enclosure:
    """What one process is in. Without *user* it has the agent's and sees its files, without *cgroup* it has no limits.

    *user* is a user and a group id; with *identities* the user id is given back to them at the end.
    """

    def __init__(
        self,
        *,
        directory: Path,
        limits: Limits | None = None,
        cgroup: Cgroup | None = None,
        user: tuple[int, int] | None = None,
        identities: Identities | None = None,
        readable: tuple[Path, ...] = (),
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._cgroup = cgroup
        self._user = user
        self._identities = identities
        self._readable = readable
        self._entering: threading.Thread | None = None
        self._why_ended = ""

    @property
    def is_room(self) -> bool:
        """Whether the process has a user and a root directory of its own."""
        return self._user is not None

    @property
    def user(self) -> str:
        """The process' user as ``UID:GID``. Only where `is_room`."""
        return "{}:{}".format(*self._ids)

    @property
    def _ids(self) -> tuple[int, int]:
        return self._user or (os.geteuid(), os.getegid())

    def command(self, argv: Sequence[str], room: Room, *, directory: Path = Path("/")) -> list[str]:
        """Return the command that starts *argv* in here, working in *directory*. ``argv[0]`` is a path."""
        if self._limits is None and not self.is_room:
            return list(argv)
        options: list[str] = []
        for number, value in self._limits.as_rlimits() if self._limits else ():
            options += ["--limit", f"{number}:{value}"]
        if self.is_room:
            options += self._room_options(room)
        return [str(LAUNCHER), *options, "--directory", str(directory), "--", *argv]

    def _room_options(self, room: Room) -> list[str]:
        options = ["--room", str(room.memory_kib), "--then" if room.becomes_user else "--user", self.user]
        if not room.connected:
            options.append("--lonely")
        for path in (*room.read, *self._readable):
            if os.path.lexists(path):
                options += ["--read", str(path)]
        for path in room.write:
            options += ["--write", str(path)]
        for name in room.devices:
            major, minor = _DEVICES[name]
            options += ["--device", f"{name}:{major}:{minor}"]
        return options

    def prepare(self, *, own: Sequence[Path], shared: Sequence[Path]) -> None:
        """Let the process pass through the VM's directory, write to *own* and read *shared*, as far as they are there.

        Blocks for microseconds.

        Raises:
            OSError: a file cannot be given away.
        """
        if self.is_room:
            self._directory.chmod(0o711)  # nobody else gets to it: what lies above is the agent's alone
            for path in own:
                self.give(path)
            for path in shared:
                self.share(path)

    def give(self, path: Path) -> None:
        """Make a file, or a directory, the process' own. One that is not there is passed over."""
        if self.is_room:
            with contextlib.suppress(FileNotFoundError), _held(path) as fd:
                os.fchown(fd, *self._ids)

    def share(self, path: Path) -> None:
        """Let every VM's process read a file, and none write it. One that is not there is passed over."""
        if self.is_room:
            with contextlib.suppress(FileNotFoundError), _held(path) as fd:
                os.fchown(fd, os.geteuid(), self._ids[1])
                os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & ~0o027 | 0o440)

    @contextlib.contextmanager
    def lent(self, path: Path) -> Iterator[Path]:
        """Yield a name under which the process can read the file *path* while the block lasts.

        Raises:
            OSError: it cannot be put into the VM's directory.
        """
        if not self.is_room:
            yield path
            return
        there = self._directory / f"lent-{secrets.token_hex(4)}"
        try:
            try:
                there.hardlink_to(path)
            except OSError:  # another filesystem, or one without hard links
                clone_file(path, there)
            self.share(there)
            yield there
        finally:
            there.unlink(missing_ok=True)

    @contextlib.contextmanager
    def outgoing(self, pid: int, *, in_memory: bool = True) -> Iterator[Outgoing]:
        """Yield a file for the process *pid* to write, in its root directory, which is in memory. Only in a room.

        If it is not to be *in_memory* it is in the VM's directory. It has no name any more afterwards, and nobody but
        the process and the agent ever had one for it.

        Raises:
            OSError: it cannot be made; the process may have ended.
        """
        name = f"out-{secrets.token_hex(4)}"
        place = Path(f"/proc/{pid}/root") if in_memory else self._directory
        root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=root)
            try:
                os.fchown(fd, *self._ids)
                yield Outgoing(path=Path("/" if in_memory else self._directory, name), fd=fd)
            finally:
                os.close(fd)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=root)
        finally:
            os.close(root)

    def enter(self, pid: int) -> None:
        """Begin to move the new process *pid*, a child of ours, into its cgroup. If that fails, it is ended.

        Nobody waits for it, for the kernel lets whoever moves a process wait for some 20 ms, but not the process.
        `entered` does.
        """
        cgroup = self._cgroup
        if cgroup is None:
            return
        pidfd = os.pidfd_open(pid)

        def move() -> None:
            try:
                cgroup.enter(pid)
            except OSError as error:
                self._why_ended = f"noid ended it, because it could not be moved into its cgroup: {error}"
                log.exception("machine %s cannot have its limits and is ended", self._directory.name)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

        self._entering = threading.Thread(target=move, name=f"cgroup of {pid}", daemon=True)
        self._entering.start()

    async def entered(self) -> None:
        """Return once the process is in its cgroup, or has been ended because it could not be."""
        if self._entering is not None:
            if self._entering.is_alive():
                await trio.to_thread.run_sync(self._entering.join)
            self._entering = None

    def why_ended(self) -> str:
        """Return why the host has ended the process, as far as its limits tell; empty: not for these."""
        if not self._why_ended and self._cgroup is not None and self._cgroup.killed_for_memory():
            self._why_ended = (
                "the kernel ended it, because guest and VMM together needed more memory than the VM's cgroup allows; "
                "see overhead_mib in server.toml [sandbox]"
            )
        return self._why_ended

    async def release(self) -> None:
        """Give back cgroup and user id. The process has ended. Repeating it does nothing.

        A cgroup that does not go away stays for the agent's next start; the log says so.
        """
        await self.entered()
        if self._identities is not None and self._user is not None:
            self._identities.release(self._user[0])
            self._identities = None
        self.why_ended()
        if self._cgroup is None:
            return
        try:
            # Shielded: who waits for the machine's end is no longer needed once it is known, and then cancelled.
            with trio.move_on_after(_REMOVE_SECS, shield=True):
                while not self._cgroup.remove():  # noqa: ASYNC110  # the kernel tells nobody when it is empty
                    await trio.sleep(_REMOVE_LOOK_SECS)
                return
            log.warning("the cgroup of %s still has a process in it", self._directory.name)
        except OSError as error:
            log.warning("the cgroup of %s cannot be removed: %s", self._directory.name, error)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int]:
    """Open *path* itself, whatever it is: not what a symbolic link in its place names, and waiting for nobody."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
