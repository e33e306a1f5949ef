"""A cgroup for each VM's process, in version 2's one hierarchy or version 1's several.

All of an agent's lie below one directory with a name made of its run directory, and each is named by its VM's
instance, so that what a killed agent leaves behind is found by name. A cgroup with processes cannot be removed, so
removing those without needs no list of who lives.

In version 2, a cgroup that has processes cannot have cgroups with limits below it (but for the root). So an agent
without root needs a place *beside* its own: with systemd, ``Delegate=yes`` and ``DelegateSubgroup=agent``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from noid.vmmhost.limits import CPU_PERIOD_US, Limits

CONTROLLERS = ("cpu", "memory", "pids")
_MOUNTS = Path("/proc/self/mountinfo")
_OWN = Path("/proc/self/cgroup")


class NoCgroups(Exception):
    """There is no cgroup for VMs here; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchies:
    """What is mounted: of version 2 one directory for all of `CONTROLLERS`, of version 1 one for each.

    *own* is the cgroup of this process in each, as a path below the mount.
    """

    version: int
    mounts: Mapping[str, Path]
    own: Mapping[str, str]


def mounted(mountinfo: str, own: str) -> Hierarchies:
    """Read ``/proc/self/mountinfo`` and ``/proc/self/cgroup``.

    Raises:
        NoCgroups: a controller is missing.
    """
    unified: tuple[Path, str] | None = None
    separate: dict[str, tuple[Path, str]] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, point = before.split(" ")[3:5]
        if kind == "cgroup2":
            unified = unified or (Path(point), root)
        elif kind == "cgroup":
            for option in options.split(","):
                separate.setdefault(option, (Path(point), root))
    paths = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(",") if names else ("",):
            paths[name] = path
    if unified is not None and _offered(unified[0]) >= set(CONTROLLERS):
        return Hierarchies(version=2, mounts={"": unified[0]}, own={"": _below(paths.get("", "/"), unified[1])})
    missing = [name for name in CONTROLLERS if name not in separate]
    if missing:
        raise NoCgroups(f"no cgroup controller {', '.join(missing)} is mounted")
    return Hierarchies(
        version=1,
        mounts={name: separate[name][0] for name in CONTROLLERS},
        own={name: _below(paths.get(name, "/"), separate[name][1]) for name in CONTROLLERS},
    )


def _offered(mount: Path) -> set[str]:
    try:
        return set((mount / "cgroup.controllers").read_text().split())
    except OSError:
        return set()


def _below(path: str, root: str) -> str:
    """Return *path* below a mount that shows the hierarchy from *root* on."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path if path.startswith("/") and not path.startswith("/..") else "/"


def own_name(run_dir: Path) -> str:
    """Return what the directory of the cgroups of the agent of *run_dir* is called."""
    return "noid-" + hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:12]


class Cgroup:
    """The cgroup of one VM. It may be gone, or never have been there: then there is nothing to say of it."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self._directories = directories

    def enter(self, pid: int) -> None:
        """Move the process *pid* in, with all its threads. One that has ended is no error. Blocks: 20 ms are usual.

        Raises:
            OSError: it cannot be moved.
        """
        for directory in self._directories.values():
            try:
                _write(directory / "cgroup.procs", str(pid))
            except ProcessLookupError:
                return

    def killed_for_memory(self) -> bool:
        """Whether the kernel has killed a process in it, because it would have used more memory than it may."""
        for directory in self._directories.values():
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)$", (directory / name).read_text(), re.MULTILINE)
                    if found and int(found[1]):
                        return True
        return False

    def remove(self) -> bool:
        """Remove it. Returns False while there is a process in it; removing it twice does nothing.

        Raises:
            OSError: for another reason.
        """
        gone = True
        for directory in self._directories.values():
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                gone = False
        return gone


class Cgroups:
    """The cgroups of one agent's VMs."""

    def __init__(self, version: int, directories: Mapping[str, Path]) -> None:
        self.version = version
        self._directories = directories
        self._leftovers = set(self._names())

    @classmethod
    def open(cls, run_dir: Path, below: Path | None) -> Cgroups:
        """Find or make the place for the VMs of the agent of *run_dir*, and try it. Blocks.

        *below* is a path in each hierarchy that is made if needed. None: of version 1 below the agent's own cgroup; of
        version 2 below the root, or, without root, beside the agent's own, if that is delegated.

        Raises:
            NoCgroups: there is no such place; says why.
        """
        try:
            hierarchies = mounted(_MOUNTS.read_text(), _OWN.read_text())
            name = own_name(run_dir)
            directories = {}
            for controller, mount in hierarchies.mounts.items():
                above = _place(hierarchies, controller, below)
                directory = mount / above.lstrip("/") / name
                if hierarchies.version == 2:
                    _hand_down(mount, directory)
                directory.mkdir(parents=True, exist_ok=True)
                if hierarchies.version == 2:
                    _enable(directory)
                directories[controller] = directory
            found = cls(hierarchies.version, directories)
            found._try()
        except OSError as error:
            raise NoCgroups(f"{error.filename or 'cgroups'}: {error.strerror}") from error
        return found

    def create(self, instance: str, limits: Limits) -> Cgroup:
        """Make the cgroup of the VM *instance*, which may be there already. Blocks for a millisecond.

        What earlier ones have left empty goes away at the same time.

        Raises:
            OSError: it cannot be made, or does not take the limits.
        """
        self.sweep()
        for controller, directory in self._directories.items():
            place = directory / instance
            place.mkdir(exist_ok=True)
            for name, value in _settings(self.version, controller, limits):
                try:
                    _write(place / name, value)
                except FileNotFoundError:
                    if name not in _WHERE_THERE_IS:
                        raise
        return self.of(instance)

    def of(self, instance: str) -> Cgroup:
        """Return the cgroup of the VM *instance*, there or not."""
        self._leftovers.discard(instance)
        return Cgroup({name: directory / instance for name, directory in self._directories.items()})

    def close(self) -> None:
        """Remove the agent's own place, if no VM is left in it."""
        self.sweep()
        Cgroup(self._directories).remove()

    def _try(self) -> None:
        trial = Cgroup({name: directory / "trial" for name, directory in self._directories.items()})
        probe = Limits(
            memory_bytes=1 << 26, cpu_weight=100, cpu_quota_us=CPU_PERIOD_US, threads=8, open_files=0, file_bytes=0
        )
        try:
            self.create("trial", probe)
        finally:
            trial.remove()

    def _names(self) -> Iterator[str]:
        for directory in self._directories.values():
            yield from (entry.name for entry in directory.iterdir() if entry.is_dir())

    def sweep(self) -> bool:
        """Remove what earlier agents have left empty; return whether they have left anything else. Blocks."""
        for name in list(self._leftovers):
            with contextlib.suppress(OSError):  # it is tried again
                if Cgroup({key: directory / name for key, directory in self._directories.items()}).remove():
                    self._leftovers.discard(name)
        return bool(self._leftovers)


def clear(run_dirs: Iterable[Path]) -> None:
    """Remove the cgroups that agents of *run_dirs* have left in the usual place, unless there is somebody in them.

    For agents that will not start again: one that does sees to it itself. Blocks.

    Raises:
        OSError: one cannot be removed for another reason.
    """
    try:
        hierarchies = mounted(_MOUNTS.read_text(), _OWN.read_text())
        above = {
            name: mount / _place(hierarchies, name, None).lstrip("/") for name, mount in hierarchies.mounts.items()
        }
    except NoCgroups:
        return
    for name in map(own_name, run_dirs):
        directories = {controller: directory / name for controller, directory in above.items()}
        if any(directory.is_dir() for directory in directories.values()):
            Cgroups(hierarchies.version, {key: path for key, path in directories.items() if path.is_dir()}).close()


_WHERE_THERE_IS = frozenset({"memory.oom.group", "cpu.cfs_quota_us", "cpu.cfs_period_us"})
"""What kernels are built without."""


def _place(hierarchies: Hierarchies, controller: str, below: Path | None) -> str:
    if below is not None:
        return str(below)
    own = hierarchies.own[controller]
    if hierarchies.version == 1:
        return own
    if os.geteuid() == 0:
        return "/"
    beside = Path(own).parent
    there = hierarchies.mounts[controller] / str(beside).lstrip("/")
    if own == "/" or not all(os.access(there / name, os.W_OK) for name in ("cgroup.procs", "cgroup.subtree_control")):
        raise NoCgroups(
            "no cgroup is delegated to this user; a service needs Delegate=yes and DelegateSubgroup=agent, which "
            "systemd knows from 254 on"
        )
    return str(beside)


def _hand_down(mount: Path, directory: Path) -> None:
    """Let every cgroup between *mount* and the new *directory* hand its controllers down."""
    above = [each for each in reversed(directory.parents) if each == mount or mount in each.parents]
    for each in above:
        each.mkdir(exist_ok=True)
        _enable(each)


def _enable(directory: Path) -> None:
    control = directory / "cgroup.subtree_control"
    missing = [name for name in CONTROLLERS if name not in control.read_text().split()]
    if missing:
        _write(control, " ".join(f"+{name}" for name in missing))


def _write(file: Path, text: str) -> None:
    """Write to a file of a cgroup. It is there or not: nobody can make one, and trying that is another error."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = str(file)
        raise
    finally:
        os.close(fd)


def _settings(version: int, controller: str, limits: Limits) -> tuple[tuple[str, str], ...]:
    """Return the files of one cgroup and what is written to them."""
    if version == 2:
        return (
            ("memory.max", str(limits.memory_bytes)),
            ("memory.oom.group", "1"),
            ("cpu.weight", str(limits.cpu_weight)),
            ("cpu.max", f"{limits.cpu_quota_us} {CPU_PERIOD_US}"),
            ("pids.max", str(limits.threads)),
        )
    return {
        "memory": (("memory.limit_in_bytes", str(limits.memory_bytes)),),
        "cpu": (
            ("cpu.shares", str(limits.cpu_weight * 1024 // 100)),
            ("cpu.cfs_period_us", str(CPU_PERIOD_US)),
            ("cpu.cfs_quota_us", str(limits.cpu_quota_us)),
        ),
        "pids": (("pids.max", str(limits.threads)),),
    }[controller]
