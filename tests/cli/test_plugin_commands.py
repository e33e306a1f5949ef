"""Commands of other packages: found when they are typed, listed by help, and no harm to anybody else's start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def page_example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "def greet" in block]
    return str(found)


@pytest.fixture
def site(noid: Any, tmp_path: Path) -> Path:
    """A directory of packages that Python looks in."""
    site = tmp_path / "site"
    site.mkdir()
    noid.env["PYTHONPATH"] += f":{site}"
    return site


def install(site: Path, name: str, entry: str, module: str = "", content: str = "") -> None:
    notes = site / f"{name.replace('-', '_')}-1.0.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (notes / "entry_points.txt").write_text(f"[noid.commands]\n{entry}\n")
    if module:
        (site / f"{module}.py").write_text(content)


def test_the_command_of_the_page_is_one_of_noid(noid: Any, agent: Any, site: Path) -> None:
    install(site, "noid-greetings", "greet = noid_greetings:greet", "noid_greetings", page_example())
    vm = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}
    agent.answers("GET", "/v1/vms", 200, [vm])
    assert noid("greet", "World").stdout == b"Hello World, from web\n"
    assert noid("--json", "greet", "World").stdout == b'{"whom": "World", "from": ["web"]}\n'
    assert b"noid greet World" in noid("greet", "--help").stdout
    assert re.search(rb"greet +Greet somebody", noid("help").stdout)
    assert b"Did you mean" in noid("greeet", "World").stderr


def test_a_command_of_noid_keeps_its_name(noid: Any, agent: Any, site: Path) -> None:
    install(site, "noid-evil", "list = noid_evil:list", "noid_evil", "raise SystemExit('imported')")
    agent.answers("GET", "/v1/vms", 200, [])
    assert noid("list").stdout == b"No VMs found.\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import nothing_of_that_name", b"cannot be imported: ModuleNotFoundError: No module named"),
        ("greet = 7", b"is no click.Command: broken:greet"),
        ("", b"cannot be imported: AttributeError"),
    ],
)
def test_one_that_cannot_be_used_says_whose_it_is_and_hides_no_other(
    noid: Any, site: Path, content: str, said: bytes
) -> None:
    install(site, "noid-broken", "greet = broken:greet", "broken", content)
    done = noid("greet")
    assert done.returncode == 1
    assert b"the command 'greet' of noid-broken 1.0 " in done.stderr
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert noid("help").returncode == 0


def test_two_packages_with_one_name_are_told_apart_by_nobody(noid: Any, site: Path) -> None:
    install(site, "noid-one", "greet = one:greet")
    install(site, "noid-two", "greet = two:greet")
    assert b"is of several packages: noid-one 1.0, noid-two 1.0." in noid("greet").stderr
