"""What people install: the wheel and the sdist are complete and clean, and each part works with just its own extra."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = ("plugins/exec_vsock/noid_exec_vsock/guest/bin", "noid/vmmhost/launcher/bin")
PACKAGES = {
    "noid",
    "noid_auth_token",
    "noid_bench",
    "noid_exec_serial",
    "noid_exec_vsock",
    "noid_net_user",
    "noid_storage_btrfs",
    "noid_storage_copy",
    "noid_storage_layers",
    "noid_storage_overlay",
    "noid_vmm_firecracker",
    "noid_vmm_qemu",
}
#: Files as a checkout collects them that nobody shall be sent.
LITTER = (".venv/bin/python", ".ruff_cache/x", ".mypy_cache/x", "noid/__pycache__/x.pyc", ".zig-cache/x", "dist/x.whl")
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}

pytestmark = pytest.mark.deadline(300)
Run = Callable[..., subprocess.CompletedProcess[str]]


def checked(*argv: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, argv)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with wheel and sdist of the files git knows, built in a checkout full of litter."""
    pytest.importorskip("hatchling", reason="hatchling is missing: pip install 'noid[dev]'")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("git or the checkout's .git is missing, so nobody knows which files belong to noid")
    checkout = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in checked("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)
    for programs in COMPILED:  # what is up to date there is not compiled again, which would take a minute
        if (ROOT / programs).is_dir():
            shutil.copytree(ROOT / programs, checkout / programs, dirs_exist_ok=True)
    for name in LITTER:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("litter")
    checked(sys.executable, "-m", "hatchling", "build", "-d", checkout.parent / "built", cwd=checkout)
    return checkout.parent / "built"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def environment_with(wheel: Path, place: Path, extra: str) -> Run:
    """Install *wheel* into a new environment and return what runs a command of it, in a home of its own."""
    python = place / "venv" / "bin" / "python"
    checked(sys.executable, "-m", "venv", "--without-pip", python.parents[1], cwd=place)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    done = subprocess.run([*pip, f"{wheel}{extra}"], cwd=place, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NOID_", "PYTHON"))}
    elsewhere = [part for part in os.get_exec_path() if not Path(part, "noid-server").exists()]  # it would be used
    environment |= {"HOME": str(place), "NOID_DATA_DIR": str(place / "data"), "PATH": os.pathsep.join(elsewhere)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(python.with_name(words[0])), *words[1:]]
        return subprocess.run(argv, env=environment, cwd=place, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``pip install noid``: what talks to a server, and nothing of one."""
    return environment_with(wheel, tmp_path_factory.mktemp("client"), "")


@pytest.fixture(scope="module")
def server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``pip install 'noid[server]'``."""
    return environment_with(wheel, tmp_path_factory.mktemp("server"), "[server]")


# --- what is in them -------------------------------------------------------------------------------------------------


def members(wheel: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)


def test_the_wheel_has_every_package_and_nothing_else(wheel: Path) -> None:
    names = [name for name, _ in members(wheel)]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    assert {name.split("/")[0] for name in names if name.endswith("/py.typed")} == PACKAGES
    assert "noid_exec_vsock/PROTOCOL.md" in names
    unwanted = ("__pycache__", ".pyc", ".sources", ".zig-cache", "litter", "conftest")
    assert [name for name in names if any(word in name for word in unwanted)] == []


def test_the_wheel_has_a_guest_agent_for_each_architecture(wheel: Path) -> None:
    contents = dict(members(wheel))
    for architecture, machine in ELF_MACHINES.items():
        program = contents[f"noid_exec_vsock/guest/bin/noid-agent-{architecture}"]
        assert program[:5] == b"\x7fELF\x02"
        assert struct.unpack_from("<H", program, 18) == (machine,)
        assert len(program) < 250_000, "every guest carries it in memory"
    bundled = {name.rpartition("/")[2] for name in contents if "/guest/bin/" in name}
    assert bundled == {f"noid-agent-{architecture}" for architecture in ELF_MACHINES}


def test_the_wheel_has_a_launcher_of_vmms_for_each_architecture(wheel: Path) -> None:
    contents = dict(members(wheel))
    for architecture, machine in ELF_MACHINES.items():
        program = contents[f"noid/vmmhost/launcher/bin/noid-launcher-{architecture}"]
        assert program[:5] == b"\x7fELF\x02"
        assert struct.unpack_from("<H", program, 18) == (machine,)


def test_nothing_in_the_wheel_knows_where_it_was_built(wheel: Path) -> None:
    places = [os.fsencode(ROOT), os.fsencode(wheel.parents[1]), os.fsencode(Path.home() / ".cache")]
    assert [name for name, content in members(wheel) for place in places if place in content] == []


def test_every_plugin_of_the_tree_is_in_the_wheel_and_announced(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inside = {path.name for path in ROOT.glob("plugins/*/noid_*") if path.is_dir()}
    assert inside == PACKAGES - {"noid", "noid_bench"}
    assert set(project["project"]["entry-points"]["noid"].values()) == inside


def test_the_sdist_has_the_sources_and_no_litter(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"README.md", "pyproject.toml", "scripts/hatch_build.py", "scripts/test", "tests/test_packaging.py"}
    assert names >= {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert names >= {f"{COMPILED[0].rpartition('/')[0]}/agent.c", f"{COMPILED[1].rpartition('/')[0]}/launcher.c"}
    assert names.isdisjoint(LITTER)
    assert [name for name in names if name.startswith(tuple(f"{programs}/" for programs in COMPILED))] == []


# --- a client without a server ---------------------------------------------------------------------------------------


def test_the_client_alone_shows_its_version_and_every_help(client: Run) -> None:
    version = client("noid", "--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "noid"), version.stderr
    for words in ("noid --help", "noid create --help", "noid bench --help", "noid-server --help",
                  "noid-server image build --help", "noid-server plugins"):  # fmt: skip
        done = client(*words.split())
        assert done.returncode == 0, f"{words}: {done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", ["noid list", "noid create web", "noid bench", "noid-server serve", "noid-server add-user alice"]
)
def test_what_needs_a_server_says_what_to_install(client: Run, words: str) -> None:
    done = client(*words.split())
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "pip install 'noid[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_alone_can_use_a_server(client: Run) -> None:
    done = client("noid", "--server", "http://127.0.0.1:9", "list")
    assert (done.returncode, "connection error" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("module", ["noid", "noid.sync"])
def test_the_client_alone_is_the_sdk(client: Run, module: str) -> None:
    wait = "trio.run(asked.vms)" if module == "noid" else "asked.vms()"
    program = f"import noid, trio\nfrom {module} import Client\nasked = Client('http://127.0.0.1:9', token='t')\n{wait}"
    done = client("python", "-c", program)
    assert done.stderr.splitlines()[-1].startswith("noid.client.errors.ConnectionFailed: "), done.stderr


def test_the_client_alone_installs_little(client: Run) -> None:
    done = client("python", "-c", "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))")
    server_side = {"quart", "hypercorn", "quart-trio", "sqlite-utils", "trio-websocket", "pytest"}
    installed = {name.lower().replace("_", "-") for name in done.stdout.split()}
    assert "noid" in installed
    assert installed.isdisjoint(server_side)


# --- a newer one -----------------------------------------------------------------------------------------------------


class Index:
    """A directory that pip takes packages from, and a copy of an environment whose noid came from such a place."""

    def __init__(self, place: Path, wheel: Path, client: Path) -> None:
        self.wheel = wheel
        self.packages = place / "index"
        self.packages.mkdir()
        self._environment = place / "venv"
        shutil.copytree(client, self._environment, symlinks=True)
        (site,) = self._environment.glob("lib/python3*/site-packages")
        (self._notes,) = site.glob("noid-*.dist-info")
        pip = importlib.util.find_spec("pip")
        assert pip is not None
        assert pip.origin is not None
        (site / "pip").symlink_to(Path(pip.origin).parent)  # making an environment with pip takes seconds
        self._place = place

    def forgets_where_it_came_from(self) -> None:
        """As if it had been installed by its name."""
        (self._notes / "direct_url.json").unlink()

    def has(self, version: str, *, keywords: str | None = None) -> None:
        """Offer what was built as another *version*, and with other *keywords*."""
        old = self.wheel.name.split("-")[1]
        with (
            zipfile.ZipFile(self.wheel) as built,
            zipfile.ZipFile(self.packages / f"noid-{version}-py3-none-any.whl", "w") as made,
        ):
            for name in built.namelist():
                content = built.read(name)
                if name == "noid/__init__.py":
                    content = content.replace(old.encode(), version.encode())
                if name.endswith("/METADATA"):
                    content = content.replace(b"Version: " + old.encode(), b"Version: " + version.encode())
                    if keywords is not None:
                        content = re.sub(rb"Keywords: .*", b"Keywords: " + keywords.encode(), content)
                made.writestr(name.replace(f"noid-{old}.", f"noid-{version}."), content)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("NOID_", "PYTHON", "PIP"))
        }
        environment |= {
            "HOME": str(self._place),
            "PIP_NO_INDEX": "1",
            "PIP_NO_COMPILE": "1",
            "PIP_FIND_LINKS": str(self.packages),
        }
        argv = [str(self._environment / "bin" / "python"), "-m", "noid.cli.main", *words]
        return subprocess.run(
            argv,
            env=environment,
            cwd=self._place,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def version(self) -> str:
        return self.run("--version").stdout.split()[1]


@pytest.fixture
def index(wheel: Path, client: Run, tmp_path: Path) -> Index:
    prefix = client("python", "-c", "import sys; print(sys.prefix)").stdout.strip()
    return Index(tmp_path, wheel, Path(prefix))


def test_a_newer_one_comes_from_the_index_by_pip(index: Index) -> None:
    before = index.version()
    assert "Install a newer one from there" in index.run("update").stderr
    index.forgets_where_it_came_from()
    index.has("9.9.9")
    done = index.run("update")
    assert (done.returncode, done.stdout) == (0, f"Updated noid v{before} -> v9.9.9\n"), done.stderr
    assert index.version() == "9.9.9"


def test_another_program_of_the_same_name_in_the_index_is_not_installed(index: Index) -> None:
    before = index.version()
    index.forgets_where_it_came_from()
    index.has("9.9.9", keywords="identifiers")
    done = index.run("update", "-y")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is another program: 9.9.9" in done.stderr
    assert index.version() == before


# --- a server --------------------------------------------------------------------------------------------------------


def test_with_the_server_extra_every_plugin_loads(server: Run) -> None:
    done = server("noid-server", "plugins")
    assert done.returncode == 0, done.stderr
    assert "cannot be imported" not in done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        package.removeprefix("noid_") for package in PACKAGES - {"noid", "noid_bench"}
    }


def test_with_the_server_extra_users_get_tokens_and_the_bench_is_there(server: Run) -> None:
    added = server("noid-server", "add-user", "alice")
    assert added.returncode == 0, added.stderr
    assert added.stdout.startswith("noid_tok_")
    assert server("python", "-c", "import noid_bench.run, noid.server.serve").returncode == 0
