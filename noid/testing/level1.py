"""A guest in which KVM works, on any x86_64 host: noid's own VM of a Debian, whose emulated CPU has AMD's SVM.

Level 0 is this machine, level 1 the guest, level 2 the guests that level 1 runs with its ``/dev/kvm``. Under emulation
level 1 computes several times slower than this machine, so what is carried there is small: this checkout with its
dependencies, a kernel and a busybox for level 2, and, if there is one, a Firecracker.

::

    with level1(stage) as guest:
        guest.carry(firecracker=Path("/usr/local/bin/firecracker"))
        status = guest.run(["python3", "-m", "pytest", "tests/conformance/test_vmm_qemu.py"])

What takes long is kept in noid's cache: the image, and a checkpoint of the guest that has booted. Nothing here is
downloaded but packages of the host's own distribution.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

import noid
from noid import hostfs
from noid.core.checkpoints.templates import FORMAT as TEMPLATE_FORMAT
from noid.core.guestbuild import Kernel, Stage, cache, debian_rootfs, debs, distribution_kernel, silent, tiny_rootfs
from noid.core.guestbuild.modules import module_name
from noid.core.guestbuild.vmlinux import decompressed
from noid.errors import BackendError, DependencyDown
from noid.testing.guests import TINY_VARIABLE
from noid.testing.pace import VARIABLE as SLOWNESS_VARIABLE

PACKAGES = ("btrfs-progs", "e2fsprogs", "kmod", "lz4", "qemu-system-x86", "qemu-utils", "xz-utils", "zstd")
"""What level 1 has beside a default guest."""
SIZE_BYTES = 8 << 30
MEM_MIB = 3072
SLOWNESS = 5
"""How much slower tests are there; measured 5 to 8 for Python."""
CMDLINE = "tsc=reliable nowatchdog"
"""The emulated TSC is this machine's; without this word level 1 mistrusts it, and KVM there has no good clock then."""
MODULES = ("irqbypass", "ccp", "kvm", "kvm_amd", "tun", "loop")
"""In the order they are loaded. A kernel that has one built in, or not at all, goes without."""
TESTING = ("pytest", "pytest-trio", "hypothesis", "trio-websocket")

BUILT = ("plugins/exec_vsock/noid_exec_vsock/guest/bin", "noid/vmmhost/launcher/bin")
"""What is compiled into a checkout, and not in git."""

ROOT = Path(noid.__file__).parents[1]
_IMAGE = "level1"
_USER = ("-u", "root")
_PLACE = "/rig"
_LIMIT_SECS = 900.0


class Level1:
    """A running level-1 guest, named *name*, of the agent of *data_dir*. Made by `level1` only."""

    def __init__(self, data_dir: Path, name: str) -> None:
        self.data_dir = data_dir
        self.name = name
        self._environment: dict[str, str] = {}

    def carry(self, *, firecracker: Path | None = None) -> None:
        """Bring this checkout, as it is, and *firecracker*, which must be static. Takes seconds.

        Raises:
            BackendError: it did not arrive.
            DependencyDown: this environment's Python is not the guest's.
        """
        with tempfile.TemporaryDirectory(prefix="noid-rig-") as made:
            tree = Path(made)
            checkout(tree / "noid")
            if firecracker is not None:
                shutil.copy2(firecracker, tree / "firecracker")
                self._environment["NOID_FIRECRACKER"] = f"{_PLACE}/firecracker"
                self._environment["NOID_STORIES_VMM"] = "firecracker"
            _carried(self.data_dir, self.name, tree, fresh="noid")
        plugins = sorted(f"plugins/{path.name}" for path in (ROOT / "plugins").iterdir() if path.is_dir())
        lines = [f"{_PLACE}/noid", *(f"{_PLACE}/noid/{name}" for name in ("benchmarks", *plugins)), f"{_PLACE}/site"]
        where = "import sysconfig; print(sysconfig.get_path('purelib', 'posix_local'))"
        write = f'd=$(python3 -c "{where}") && mkdir -p "$d" && printf "%s\\n" "$@" > "$d/noid.pth"'
        _said(self.data_dir, "exec", self.name, *_USER, "-n", "--", "sh", "-c", write, "sh", *lines)

    def run(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Run a command in the checkout as root; its output is this program's. Return its status."""
        variables = {
            "HOME": "/root",
            TINY_VARIABLE: f"{_PLACE}/tiny",
            SLOWNESS_VARIABLE: str(SLOWNESS),
            **self._environment,
            **(environment or {}),
        }
        words = [f"{name}={value}" for name, value in variables.items()]
        argv = ["exec", self.name, *_USER, "-w", f"{_PLACE}/noid", "-n", "--", "env", *words, *argv]
        return subprocess.run(_noid(*argv), env=_environment(self.data_dir), check=False).returncode

    def read(self, path: str) -> bytes:
        """Return the content of a file there.

        Raises:
            BackendError: there is none.
        """
        return _said(self.data_dir, "exec", self.name, *_USER, "-n", "--", "cat", path)


@contextlib.contextmanager
def level1(stage: Stage = silent) -> Iterator[Level1]:
    """Yield a level-1 guest, in which ``/dev/kvm`` works. Afterwards neither it nor an agent is left.

    The first time takes minutes: its packages are fetched, it boots. Later it wakes from a checkpoint, in seconds.

    Raises:
        DependencyDown: something is not installed or not reachable; says what to do.
        BackendError: a step failed.
    """
    if platform.machine() != "x86_64":
        raise DependencyDown(f"level 1 needs an x86_64 host; this is {platform.machine()}.")
    kernel = distribution_kernel(stage)
    rootfs = debian_rootfs(size_bytes=SIZE_BYTES, packages=PACKAGES, stage=stage)
    furniture = _furniture(kernel, stage)
    facts = f"{rootfs.parent.name} {furniture.name} {MEM_MIB} {CMDLINE} {TEMPLATE_FORMAT}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    shelf = cache.directory() / "level1"
    shelf.mkdir(parents=True, exist_ok=True)
    with cache.locked(shelf / ".lock"):  # one at a time: each takes a processor and gigabytes
        data_dir = shelf / key
        for old in shelf.iterdir():
            if old.is_dir() and old != data_dir:
                hostfs.remove_tree(old)
        data_dir.mkdir(exist_ok=True)
        (data_dir / "server.toml").write_text('[backends]\nvmm = "qemu"\nnetwork = "none"\n[pool]\nsize = 0\n')
        try:
            name = _woken(data_dir, key, kernel, rootfs, furniture, stage)
            with stage("loading KVM into level 1"):
                load = 'for m; do [ ! -e "$0/$m.ko" ] || insmod "$0/$m.ko" || exit; done; test -c /dev/kvm'
                argv = ("sh", "-c", load, f"{_PLACE}/modules", *MODULES)
                _said(data_dir, "exec", name, *_USER, "-n", "--", *argv)
            yield Level1(data_dir, name)
        finally:
            _end(data_dir)


def distributions(names: Sequence[str], extras: Sequence[str] = ()) -> list[importlib.metadata.Distribution]:
    """Return the installed distributions *names*, the first one with *extras*, and all they need, each once."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()

    def add(name: str, wanted: Sequence[str]) -> None:
        key = (name.lower(), tuple(sorted(wanted)))
        if key in seen:
            return
        seen.add(key)
        found[name.lower()] = distribution = importlib.metadata.distribution(name)
        for text in distribution.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in (*wanted, "")):
                add(needed.name, sorted(needed.extras))

    for number, name in enumerate(names):
        add(name, extras if number == 0 else ())
    return list(found.values())


def _furniture(kernel: Kernel, stage: Stage) -> Path:
    """Return a directory with what every run has in level 1: KVM's modules, level 2's image, the dependencies."""
    needed = [item for item in distributions(["noid", *TESTING], ["server"]) if item.name != "noid"]
    tiny = tiny_rootfs(stage)
    entry_points = importlib.metadata.distribution("noid").read_text("entry_points.txt") or ""
    versions = sorted(f"{item.name}={item.version}" for item in needed)
    facts = [2, kernel.package, kernel.version, tiny.parent.name, versions, entry_points, sys.version_info[:2]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def build(place: Path) -> None:
        with stage("gathering what level 1 needs"):
            modules = debs.files(debs.candidate(kernel.package), lambda path: module_name(path) in MODULES)
            (place / "modules").mkdir()
            for path, content in modules.items():
                (place / "modules" / f"{module_name(path)}.ko").write_bytes(decompressed(content))
            (place / "tiny").mkdir()
            shutil.copy2(kernel.vmlinux, place / "tiny" / "vmlinux")
            shutil.copytree(kernel.modules, place / "tiny" / "modules")
            hostfs.clone_file(tiny, place / "tiny" / "rootfs.ext4")
            site = place / "site"
            for item in needed:
                for file in item.files or ():
                    if ".." not in file.parts and "__pycache__" not in file.parts:
                        (site / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(str(item.locate_file(file)), site / file)
            said = site / "noid-0.dist-info"  # by which the plugins are found
            said.mkdir()
            (said / "METADATA").write_text(f"Metadata-Version: 2.1\nName: noid\nVersion: {noid.__version__}\n")
            (said / "entry_points.txt").write_text(entry_points)
            compileall.compile_dir(site, quiet=2, workers=0)

    return cache.cached("level1-furniture", key, build)


def _woken(data_dir: Path, key: str, kernel: Kernel, rootfs: Path, furniture: Path, stage: Stage) -> str:
    """Return the name of a running level 1 that is furnished, from its checkpoint or made."""
    for vm in json.loads(_said(data_dir, "list", "--json")):  # of a run that was killed
        _said(data_dir, "destroy", "-y", vm["name"])
    if any(item["label"] == key for item in json.loads(_said(data_dir, "checkpoints", "--all", "--json"))):
        with stage("waking level 1"):
            _said(data_dir, "create", _IMAGE, "--from", key)
        return _IMAGE
    if not (data_dir / "images" / _IMAGE).is_dir():
        with stage("storing the image of level 1"):
            files = ("--kernel", kernel.vmlinux, "--modules", kernel.modules, "--rootfs", rootfs, "--cmdline", CMDLINE)
            server = [sys.executable, "-m", "noid.server", "image", "import", _IMAGE, *map(str, files)]
            _checked(subprocess.run(server, env=_environment(data_dir), capture_output=True, check=False), server)
    with stage("booting level 1"):
        _said(data_dir, "create", _IMAGE, "--image", _IMAGE, "--cpus", "1", "--mem", str(MEM_MIB))
    with stage("furnishing level 1"):
        _said(data_dir, "exec", _IMAGE, *_USER, "-n", "--", "mkdir", _PLACE)
        _carried(data_dir, _IMAGE, furniture)
        _check_python(data_dir)
        _said(data_dir, "checkpoint", _IMAGE, "--label", key)
    return _IMAGE


def _check_python(data_dir: Path) -> None:
    code = "import importlib.util; print(importlib.util.MAGIC_NUMBER.hex())"
    theirs = _said(data_dir, "exec", _IMAGE, "-n", "--", "python3", "-c", code).decode().strip()
    if theirs != importlib.util.MAGIC_NUMBER.hex():
        raise DependencyDown(
            f"level 1 has another Python than this environment, {platform.python_version()}, whose packages would not "
            "run there. Make .venv with the distribution's own python3."
        )


def checkout(tree: Path) -> None:
    """Copy what git knows of this checkout, as it is on the disk, and what is built into it, and compile it."""
    said = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    names = _checked(said, ["git", "ls-files"]).decode().split("\0")
    built = [str(path.relative_to(ROOT)) for place in BUILT for path in (ROOT / place).iterdir()]
    for name in [*filter(None, names), *built]:
        source, target = ROOT / name, tree / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    compileall.compile_dir(tree, quiet=2, workers=0)


def _carried(data_dir: Path, name: str, tree: Path, fresh: str = "") -> None:
    """Bring *tree* to level 1, where *fresh* of it is made anew."""
    unpack = f"rm -rf {_PLACE}/{fresh or 'nothing'}; exec tar -C {_PLACE} -xf -"
    packer = subprocess.Popen(["tar", "-C", tree, "-cSf", "-", "."], stdout=subprocess.PIPE)
    argv = _noid("exec", name, *_USER, "--", "sh", "-c", unpack)
    done = subprocess.run(argv, env=_environment(data_dir), stdin=packer.stdout, capture_output=True, check=False)
    if packer.stdout is not None:
        packer.stdout.close()
    if packer.wait() != 0:
        raise BackendError(f"packing {tree} failed: tar ended with {packer.returncode}.")
    _checked(done, argv)


def _end(data_dir: Path) -> None:
    """Destroy what runs and end the agent. Checkpoint and template stay."""
    with contextlib.suppress(BackendError):
        for vm in json.loads(_said(data_dir, "list", "--json")):
            _said(data_dir, "destroy", "-y", vm["name"])
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, ProcessLookupError):
        pid = int((data_dir / "agent.lock").read_text().split()[0])
        fd = os.pidfd_open(pid)
        try:
            os.kill(pid, 15)
            import select

            select.select([fd], [], [], 60)
        finally:
            os.close(fd)


def _said(data_dir: Path, *argv: str) -> bytes:
    """Run a ``noid`` command, which must succeed, and return its output."""
    words = _noid(*argv)
    return _checked(
        subprocess.run(words, env=_environment(data_dir), capture_output=True, timeout=_LIMIT_SECS, check=False), words
    )


def _checked(done: subprocess.CompletedProcess[bytes], argv: Sequence[object]) -> bytes:
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-1000:]
        raise BackendError(f"{' '.join(map(str, argv))[:300]} ended with {done.returncode}: {said}")
    return done.stdout


def _noid(*argv: str) -> list[str]:
    return [sys.executable, "-m", "noid.cli.main", *argv]


def _environment(data_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NOID_")}
    return kept | {"NOID_DATA_DIR": str(data_dir)}
