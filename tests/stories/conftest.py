"""The three verbs of stories: ``noid(...)`` types a command, ``guest(...)`` looks inside a VM, ``host`` outside.

Everything is real: the command line in a process of its own, the agent it starts, QEMU, a busybox guest. Plain stories
share one house, as people share a machine. The violent ones get a `house` of their own, furnished with hard links to
the shared one's image and templates, so that nothing boots twice; when they are over, the house must be empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from noid_vmm_firecracker.versions import parsed, shown

from noid.core import paths
from noid.core.images import Images
from noid.core.layout import Layout
from noid.errors import DependencyDown
from noid.testing.guests import tiny_image
from noid.testing.pace import slowness
from noid.testing.processes import end, marked_processes
from noid.testing.reaper import clean, mounts_below
from noid.testing.results import tell
from noid.vmmhost.cgroups import own_name

PATIENCE_SECS = 100.0 * slowness()
SOON_SECS = 20.0 * slowness()
MEM_MIB = 96
AGENT = "noid.server"


class StoryVmm:
    """The VMM the stories are about: QEMU, or with ``NOID_STORIES_VMM=firecracker`` that of ``NOID_FIRECRACKER``."""

    def __init__(self) -> None:
        self.name = os.environ.get("NOID_STORIES_VMM", "qemu")
        if self.name not in ("qemu", "firecracker"):
            raise ValueError(f"NOID_STORIES_VMM is {self.name!r}; it must be qemu or firecracker.")

    @property
    def shown(self) -> str:
        """What messages call it."""
        return {"qemu": "QEMU", "firecracker": "Firecracker"}[self.name]

    def settings(self, text: str) -> str:
        """Return the settings *text*, with those that make an agent use this VMM."""
        if self.name == "qemu":
            return text
        settings = tomlkit.parse(text)
        backends = settings.setdefault("backends", tomlkit.table())
        backends.update({"vmm": "firecracker", "storage": "auto", "network": "none"})
        plugins = settings.setdefault("plugins", tomlkit.table())
        plugins["vmm_firecracker"] = {"binary": os.environ["NOID_FIRECRACKER"]}
        return tomlkit.dumps(settings)

    def tell(self) -> None:
        """Let the table of results count the story that is told now. Of QEMU's the accelerator is not known here."""
        if self.name == "firecracker":
            said = subprocess.run([os.environ["NOID_FIRECRACKER"], "--version"], capture_output=True, check=True)
            version = parsed(said.stdout.decode())
            tell("stories", f"firecracker {shown(version) if version else ''}".strip(), "kvm")


VMM = StoryVmm()


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended, with all it wrote."""

    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """Standard output."""
        return self.out.decode()

    @property
    def complaint(self) -> str:
        """Return the one paragraph it failed with.

        Read it as the person does who meets it: one line that begins with ``Error:`` and ends as a sentence does.
        """
        text = self.err.decode()
        assert self.code != 0, f"it did not fail: {text}"
        assert self.out == b"", self.out
        assert text.startswith("Error: "), text
        assert text.endswith("\n"), text
        assert text.count("\n") == 1, text
        assert "Traceback" not in text
        assert "object at 0x" not in text
        return text.removeprefix("Error: ").strip()

    @property
    def json(self) -> Any:
        """Standard output of a command with ``--json``."""
        assert self.code == 0, self.err.decode()
        return json.loads(self.out)


@dataclass
class House:
    """One data directory with its agent and VMs, and somebody who types commands there."""

    data_dir: Path
    cwd: Path
    env: dict[str, str] = field(default_factory=dict)

    # --- noid(...) ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: str | bytes, stdin: bytes = b"", **env: str) -> Done:
        """Type a command and wait for its end."""
        done = subprocess.run(
            self.argv(*args),
            input=stdin,
            capture_output=True,
            cwd=self.cwd,
            env=self.environment | env,
            timeout=PATIENCE_SECS,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *args: str, stdin: bytes = b"") -> str:
        """Type a command that must succeed and return what it printed."""
        done = self(*args, stdin=stdin)
        assert done.code == 0, f"noid {shlex.join(args)}: {done.err.decode()}"
        return done.text.strip()

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Type a command and go on while it runs."""
        return subprocess.Popen(self.argv(*args), cwd=self.cwd, env=self.environment, **options)

    def server(self, *args: str) -> Done:
        """Type a ``noid-server`` command."""
        argv = [sys.executable, "-m", AGENT, *args, "--data-dir", str(self.data_dir)]
        done = subprocess.run(argv, capture_output=True, env=self.environment, timeout=PATIENCE_SECS, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    @staticmethod
    def argv(*args: str | bytes) -> list[str | bytes]:
        """Return the words of a ``noid`` command."""
        return [sys.executable, "-m", "noid.cli.main", *args]

    @property
    def environment(self) -> dict[str, str]:
        """What the person's shell has exported."""
        home = str(self.cwd)
        plain = {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", "NOID_DATA_DIR": str(self.data_dir)}
        return plain | self.env

    def create(self, name: str, *, mem_mib: int = MEM_MIB, image: str = "tiny") -> str:
        """Make a small VM and return its name."""
        self.ok("create", name, "--mem", str(mem_mib), "--image", image)
        return name

    def checkpoint(self, name: str) -> str:
        """Freeze a VM and return the checkpoint's id."""
        return str(self("checkpoint", name, "--json").json["id"])

    def states(self) -> dict[str, str]:
        """Return what ``noid list`` says, by name."""
        return {vm["name"]: vm["state"] for vm in self("list", "--json").json}

    def http(self, method: str, path: str, body: bytes | object = None) -> tuple[int, Any]:
        """Say something to the agent that the command line would not say. Return status and decoded answer."""
        connection = HTTPConnection("localhost", timeout=PATIENCE_SECS)
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            connection.sock.settimeout(PATIENCE_SECS)
            connection.sock.connect(str(paths.socket_path(self.data_dir)))
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None

    # --- guest(...) --------------------------------------------------------------------------------------------------

    def guest(self, vm: str, script: str) -> str:
        """Run a shell script in a VM; it must succeed. Return its output, stripped."""
        return self.ok("exec", vm, "--", "sh", "-c", script)

    # --- host --------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Where things lie."""
        return Layout(self.data_dir)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the database."""
        with contextlib.closing(sqlite3.connect(self.data_dir / "noid.db")) as database:
            return list(database.execute(query, values))

    def instance(self, vm: str) -> str:
        """Return the name of the VM's directories."""
        ((instance,),) = self.rows("SELECT instance FROM vms WHERE name = ?", vm)
        return str(instance)

    def directory(self, vm: str) -> Path:
        """Return the directory of the VM's lasting files."""
        return self.layout.vm(self.instance(vm))

    def checkpoint_directory(self, checkpoint: str) -> Path:
        """Return the directory of a checkpoint."""
        (found,) = self.layout.users.glob(f"*/checkpoints/{checkpoint}")
        return found

    def machines(self) -> dict[str, int]:
        """Return the pids of the VMMs that run in this house, by instance."""
        found = {}
        for pid in marked_processes(self.data_dir):
            with contextlib.suppress(OSError):
                entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {e.partition(b"=")[2].decode(): pid for e in entries if e.startswith(b"NOID_INSTANCE=")}
        return found

    def agents(self) -> list[int]:
        """Return the pids of the agents that run in this house."""
        return [pid for pid, words in marked_processes(self.data_dir).items() if f"-m {AGENT} serve" in words]

    def end_agent(self, signo: int = signal.SIGKILL) -> None:
        """End the agent and wait until it is gone."""
        for pid in self.agents():
            end(pid, signo, PATIENCE_SECS)

    def kill_machine(self, vm: str) -> None:
        """``kill -9`` the VM's QEMU and wait until it is gone."""
        instance = self.instance(vm)
        end(self.machines()[instance], signal.SIGKILL, PATIENCE_SECS)

    def strays(self) -> list[str]:
        """Return what is in this house and belongs to no VM of the list: machines, directories, sockets, mounts.

        The cgroups of processes that an agent has found when it started go away soon after these.
        """
        with contextlib.suppress(AssertionError):  # they are told below
            self.eventually(lambda: not self._stray_cgroups())
        known = {instance for (instance,) in self.rows("SELECT instance FROM vms")}
        places = (self.layout.vms, self.layout.scratch, self.layout.run("x").parent)
        strays = [f"machine {instance} ({pid})" for instance, pid in self.machines().items() if instance not in known]
        strays += [str(d) for p in places if p.is_dir() for d in p.iterdir() if d.is_dir() and d.name not in known]
        strays += [str(partial) for partial in self.data_dir.rglob("*.partial")]
        strays += [f"cgroup {path}" for path in self._stray_cgroups()]
        return strays + [f"mount {point}" for point in mounts_below(self.data_dir)]

    def _stray_cgroups(self) -> list[Path]:
        known = {instance for (instance,) in self.rows("SELECT instance FROM vms")}
        place = own_name(self.layout.run("x").parent)
        found = Path("/sys/fs/cgroup").glob(f"**/{place}/*")
        return [path for path in found if path.is_dir() and path.name not in known]

    @staticmethod
    def eventually(holds: Callable[[], object]) -> None:
        """Return when *holds* does."""
        until = time.monotonic() + SOON_SECS
        while not holds():
            assert time.monotonic() < until, "it never came true"
            time.sleep(0.05)  # between two looks at something that has no other way to tell

    # --- the house itself --------------------------------------------------------------------------------------------

    def settings(self, text: str) -> None:
        """Write server.toml, with the VMM the stories are about. The agent reads it when it starts."""
        (self.data_dir / "server.toml").write_text(VMM.settings(text))

    def furnish(self, other: House) -> None:
        """Take over another house's images and templates, by hard links where they can be."""
        for source in (other.layout.images, other.layout.golden):
            if source.is_dir():
                shutil.copytree(source, self.data_dir / source.name, copy_function=_linked)

    def empty(self) -> None:
        """Destroy every VM, end the agent, and see that nothing is left of either."""
        for name in self.states():
            self.ok("destroy", name)
        self.end_agent(signal.SIGTERM)
        assert marked_processes(self.data_dir) == {}
        assert self.strays() == []
        assert list(Path("/sys/fs/cgroup").glob(f"**/{own_name(self.layout.run('x').parent)}")) == []


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem
        shutil.copy2(source, target)


@pytest.fixture(scope="session")
def shared_house(data_dir_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The house of the plain stories."""
    house = House(data_dir_root / "stories", tmp_path_factory.mktemp("home"))
    house.data_dir.mkdir()
    from noid_exec_vsock import guest_binary

    try:
        tiny_image(Images(house.layout.images, {"init": guest_binary("x86_64")}))
    except DependencyDown as error:
        pytest.skip(f"no guest to boot: {error}")
    house.settings("[pool]\nsize = 0\n")
    house.create("first")  # boots the template that all stories use
    house.ok("destroy", "first")
    yield house
    house.empty()
    clean(house.data_dir)


@pytest.fixture
def vmm() -> StoryVmm:
    """The VMM the stories are about."""
    return VMM


@pytest.fixture
def qemu() -> None:
    """Tell a story that is about QEMU's ways."""
    if VMM.name != "qemu":
        pytest.skip(f"is about QEMU, and the stories are about {VMM.shown}")


@pytest.fixture
def noid(shared_house: House) -> Iterator[House]:
    """The command line. Its VMs go when the test does."""
    VMM.tell()
    yield shared_house
    for name in shared_house.states():
        shared_house.ok("destroy", name)


@pytest.fixture
def guest(noid: House) -> Callable[[str, str], str]:
    """Run a shell script in a VM and return its output."""
    return noid.guest


@pytest.fixture
def host(noid: House) -> House:
    """The same house as seen from the host: its machines, its files, its strays."""
    return noid


@pytest.fixture
def house(data_dir: Path, tmp_path: Path, shared_house: House) -> Iterator[House]:
    """A house of one's own, to break. Whatever happened in it, it can be emptied afterwards."""
    VMM.tell()
    house = House(data_dir, tmp_path)
    house.furnish(shared_house)
    house.settings("[pool]\nsize = 0\n")
    yield house
    house.empty()
