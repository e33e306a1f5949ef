"""How this noid came onto the machine is found by what each installer leaves behind."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from noid.client import installation

RECEIPT = 'requirements = [{ name = "noid" }]\n'


class Machine:
    """A prefix with a Python, in which noid is installed."""

    def __init__(self, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefix = prefix
        self._monkeypatch = monkeypatch
        self.lies_in(prefix / "lib" / "python3" / "site-packages")
        monkeypatch.setattr(sys, "prefix", str(prefix))
        monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))

    def lies_in(self, site: Path) -> None:
        self.site = site
        self.notes = site / "noid-0.3.0.dist-info"
        (site / "noid").mkdir(parents=True)
        self.notes.mkdir()
        self._monkeypatch.setattr(installation, "_PACKAGE", site / "noid")
        self._monkeypatch.setattr(
            sysconfig, "get_path", lambda name: str(site if name == "purelib" else self.prefix / name)
        )

    def leaves(self, name: str, content: object) -> None:
        path = self.prefix / name if name.startswith(("uv", "pipx", "stdlib")) else self.notes / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "venvs" / "noid", monkeypatch)


def test_pip_is_run_by_the_python_that_noid_runs_on(machine: Machine) -> None:
    machine.leaves("INSTALLER", "pip\n")
    found = installation.find()
    assert (found.kind, found.place) == ("pip", machine.prefix)
    assert found.updated_by == (sys.executable, "-m", "pip", "install", "--upgrade", "noid[server]")
    assert found.fetched_by is not None
    assert found.fetched_by[:3] == (sys.executable, "-m", "pip")


def test_without_pip_it_is_uv_that_changes_the_environment(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_has_pip", lambda: False)
    found = installation.find()
    assert found.updated_by is not None
    assert found.updated_by[:5] == ("uv", "pip", "install", "--python", sys.executable)


def test_a_uv_tool_is_upgraded_by_its_name(machine: Machine) -> None:
    machine.leaves("uv-receipt.toml", RECEIPT)
    found = installation.find()
    assert (found.kind, found.updated_by) == ("uv tool", ("uv", "tool", "upgrade", "noid"))
    assert found.fetched_by is not None


@pytest.mark.parametrize(
    ("main", "updated_by"),
    [("noid", ("pipx", "upgrade", "noid")), ("other", ("pipx", "upgrade", "--include-injected", "noid"))],
)
def test_pipx_upgrades_what_it_installed(machine: Machine, main: str, updated_by: tuple[str, ...]) -> None:
    machine.leaves("pipx_metadata.json", {"main_package": {"package": main}})
    found = installation.find()
    assert (found.kind, found.updated_by) == ("pipx", updated_by)


def test_what_came_from_a_repository_comes_from_there_again(machine: Machine) -> None:
    git = {"url": "https://host/noid.git", "vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "1"}}
    machine.leaves("direct_url.json", git)
    found = installation.find()
    assert found.updated_by is not None
    assert found.updated_by[-1] == "noid[server] @ git+https://host/noid.git@main"
    assert found.fetched_by is None, "no index is asked"


@pytest.mark.parametrize(
    ("direct", "kind", "advice"),
    [
        ({"url": "file:///src/noid", "dir_info": {"editable": True}}, "checkout", "git pull"),
        ({"url": "file:///dl/noid-0.3.0.whl", "archive_info": {}}, "file", "from file:///dl/noid-0.3.0.whl"),
    ],
)
def test_what_has_no_newer_version_anywhere_is_not_updated(
    machine: Machine, direct: object, kind: str, advice: str
) -> None:
    machine.leaves("direct_url.json", direct)
    found = installation.find()
    assert (found.kind, found.updated_by) == (kind, None)
    assert advice in found.advice


def test_a_distribution_s_package_is_left_to_the_distribution(machine: Machine, tmp_path: Path) -> None:
    machine.lies_in(tmp_path / "usr" / "lib" / "python3" / "dist-packages")
    found = installation.find()
    assert (found.kind, found.updated_by) == ("system package", None)
    assert "apt-get" in found.advice


def test_a_python_that_the_system_manages_is_not_changed_by_pip(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(machine.prefix))
    machine.leaves("stdlib/EXTERNALLY-MANAGED", "[externally-managed]\n")
    found = installation.find()
    assert found.updated_by is None
    assert "pipx install, uv tool install" in found.advice


def test_an_environment_for_one_run_is_told_from_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(tmp_path / "uv" / "archive-v0" / "x1y2", monkeypatch)
    assert (installation.find().kind, installation.find().updated_by) == ("uvx", None)


def test_sources_that_nobody_installed_are_a_checkout(machine: Machine) -> None:
    machine.notes.rmdir()
    assert installation.find().kind == "checkout"


def test_the_metadata_says_that_it_is_this_noid() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'keywords = ["{installation.MARK}"' in project
