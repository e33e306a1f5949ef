"""The single file: made from what is here and the registry, it is a whole client, and brings a newer one by itself."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.deadline(300)


def build(output: Path) -> Path:
    program = [sys.executable, "-I", str(ROOT / "scripts" / "build_pyz.py"), "--output", str(output)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    if "pip could not fetch" in done.stderr:
        pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "noid.pyz")


@pytest.fixture
def pyz(built: Path, tmp_path: Path) -> Path:
    """The file as somebody put it on their PATH."""
    place = tmp_path / "bin" / "noid"
    place.parent.mkdir()
    return Path(shutil.copy2(built, place))


@pytest.fixture
def noid(pyz: Path, tmp_path: Path) -> Run:
    """Run it with a Python that has neither noid nor what noid needs."""

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(tmp_path), "PATH": "/nowhere"} | env
        argv = [sys.executable, "-S", str(pyz), *words]
        return subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


class Server(http.server.SimpleHTTPRequestHandler):
    """Lists no VM, and has files."""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/v1/vms":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "shop").mkdir()
    handler = functools.partial(Server, directory=str(tmp_path / "shop"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(20)


def test_it_says_that_it_is_one_and_runs_by_itself(pyz: Path, noid: Run, url: str) -> None:
    assert re.fullmatch(r"noid \S+ \(single file\)\n", noid("--version").stdout)
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(pyz, os.X_OK)
    done = noid("--server", url, "list")
    assert (done.returncode, done.stdout) == (0, "No VMs found.\n"), done.stderr
    assert json.loads(noid("version", "--json").stdout)["installed"] == {"kind": "single file", "place": str(pyz)}
    assert noid("auth", "setup", "--url", url, NOID_TOKEN="x").returncode == 0
    assert "127.0.0.1" in noid("auth", "list").stdout


def test_every_module_in_it_can_be_imported_and_is_compiled(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
    sources = {name for name in names if name.endswith(".py")}
    assert {f"{name}c" for name in sources} <= names
    modules = sorted(name.removesuffix(".py").replace("/", ".") for name in sources if name.startswith("noid/"))
    assert "noid.cli.vms" in modules
    assert not any(name.startswith(("noid/server", "noid/testing")) for name in names)
    imports = f"for name in {modules}: __import__(name.removesuffix('.__init__'))"
    program = f"import sys; sys.path.insert(0, {str(pyz)!r})\n{imports}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_same_sources_make_the_same_bytes(built: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "noid.pyz")
    assert again.read_bytes() == built.read_bytes()
    checksum = hashlib.sha256(again.read_bytes()).hexdigest()
    assert again.with_name("noid.pyz.sha256").read_text() == f"{checksum}  noid.pyz\n"


def test_what_is_not_in_it_is_told_in_a_line(noid: Run) -> None:
    for words, said in (
        ("bench", "'bench' is not part of this noid (single file)"),
        ("list", "Install noid[server] as a package"),
    ):
        done = noid(words)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "(not to be had here)" in noid("help").stdout


def test_commands_of_other_packages_are_found(noid: Run, tmp_path: Path) -> None:
    notes = tmp_path / "site" / "greetings-1.0.dist-info"
    notes.mkdir(parents=True)
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: greetings\nVersion: 1.0\n")
    (notes / "entry_points.txt").write_text("[noid.commands]\ngreet = greetings:greet\n")
    (tmp_path / "site" / "greetings.py").write_text(
        "import click\n@click.command()\ndef greet(): click.echo('Hello')\n"
    )
    assert noid("greet", PYTHONPATH=str(tmp_path / "site")).stdout == "Hello\n"


def test_it_replaces_itself_by_a_newer_one(pyz: Path, noid: Run, url: str, tmp_path: Path) -> None:
    assert "nobody said where newer versions" in noid("update").stderr
    new = tmp_path / "shop" / "noid.pyz"
    shutil.copy2(pyz, new)
    offer(new)
    before = noid("--version").stdout.split()[1]
    assert noid("update", NOID_UPDATE_URL=f"{url}/").stdout == f"noid is already up to date (v{before})\n"

    newer = newer_than(pyz, before)
    new.write_bytes(newer[:-1000])
    (tmp_path / "shop" / "noid.pyz.sha256").write_text(hashlib.sha256(newer).hexdigest())
    old = pyz.read_bytes()
    assert "Nothing was changed" in noid("update", NOID_UPDATE_URL=f"{url}/").stderr
    assert pyz.read_bytes() == old

    new.write_bytes(newer)
    assert noid("config", "set", "update.url", f"{url}/noid.pyz").returncode == 0
    done = noid("update")
    assert (done.returncode, done.stdout) == (0, f"Updated noid v{before} -> v9.9.9\n"), done.stderr
    assert noid("--version").stdout == "noid 9.9.9 (single file)\n"
    assert [entry.name for entry in pyz.parent.iterdir()] == [pyz.name]


def offer(file: Path) -> None:
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_name(f"{file.name}.sha256").write_text(f"{checksum}  {file.name}\n")


def newer_than(pyz: Path, version: str) -> bytes:
    """Return the same file with another version in its source, which alone counts where nothing is compiled."""
    made = pyz.parents[1] / "newer"
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "noid/__init__.py":
                content = content.replace(version.encode(), b"9.9.9")
            if name != "noid/__init__.pyc":
                new.writestr(name, content)
    return b"#!/usr/bin/env python3\n" + made.read_bytes()
