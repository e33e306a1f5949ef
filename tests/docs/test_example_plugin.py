"""The plugin of docs/plugins.md, installed as its users install one: limits, arguments, events, a command, tokens."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from noid.core.backends import AgentContext, AuthBackend
from noid.core.model.users import TOKEN_SCOPES, Credentials
from noid.core.model.vms import VmSpec
from noid.core.opening import open_agent
from noid.core.people.users import open_users
from noid.errors import Damaged, InvalidRequest, Unauthenticated
from noid.server.command import cli
from noid.testing.auth_conformance import AuthConformance
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "noid_house_rules.py"
Pages = Callable[[str], Any]


@pytest.fixture
def installed(page: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the example where Python finds it, with the metadata that the page tells authors to write."""
    metadata = page("docs/plugins.md").blocks("toml")[0]
    found = re.search(r'entry-points\.noid]\n(\w+) = "(\w+)"', metadata)
    assert found is not None
    (tmp_path / f"{found[2]}.py").write_text(EXAMPLE.read_text())
    place = tmp_path / "noid_house_rules-1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: noid-house-rules\nVersion: 1\n")
    (place / "entry_points.txt").write_text(f"[noid]\n{found[1]} = {found[2]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


async def test_the_example_refuses_allows_and_hears(
    installed: None, data_dir: Path, no_leaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "noid_house_rules")
    give_default_image(data_dir)
    async with open_agent(simulated_config(data_dir), simulated_plugins()) as agent:
        user = agent.local_user()
        with pytest.raises(InvalidRequest, match="a VM may have 4 here"):
            await agent.create_vm(user, VmSpec(name="large", cpus=5, mem_mib=128))
        assert agent.vms(user) == []
        outcome = await agent.create_vm(user, VmSpec(name="web", cpus=1, mem_mib=128))
        assert outcome.vm is not None
        await agent.destroy_vm(user, "web")
    assert [record.getMessage() for record in caplog.records if record.name == "noid_house_rules"] == [
        "vm.create of web",
        "vm.destroy of web",
    ]


async def test_the_example_keeps_tokens(installed: None, data_dir: Path, no_leaks: None) -> None:
    plugins = simulated_plugins()
    config = simulated_config(data_dir, plugins={"auth_file": {"file": str(data_dir / "who.json")}})
    config = dataclasses.replace(config, backends=dataclasses.replace(config.backends, auth="file"))
    async with open_agent(config, plugins) as agent:
        async with open_users(config, plugins) as users:  # as the admin commands do, beside the running agent
            alice, token = await users.add("alice")
            caller = agent.users.authenticate(Credentials(token=token))
            assert (caller.user, caller.token, caller.scopes) == (alice, "default", TOKEN_SCOPES)
            new = await users.rotate_token("alice")
        assert agent.users.authenticate(Credentials(token=new)).user == alice
        for wrong in (token, "", None):
            with pytest.raises(Unauthenticated):
                agent.users.authenticate(Credentials(token=wrong))
        assert token not in (data_dir / "who.json").read_text()
        assert (data_dir / "who.json").stat().st_mode & 0o077 == 0
        (data_dir / "who.json").write_text("{")
        with pytest.raises(Damaged, match=r"who\.json cannot be read"):
            agent.users.authenticate(Credentials(token=new))


class TestTheExample(AuthConformance):
    """It keeps the contract, as a plugin of its readers should."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        directory = tmp_path / "data"
        directory.mkdir()
        return directory

    @pytest.fixture
    def open_again(
        self, installed: None, place: Path
    ) -> Iterator[Callable[[], AbstractAsyncContextManager[AuthBackend]]]:
        example = importlib.import_module("noid_house_rules")
        context = AgentContext(data_dir=place, run_dir=place, database=place / "noid.db")
        yield lambda: example.open_auth(example.FileAuthConfig(), context)
        del sys.modules["noid_house_rules"]


def test_the_example_s_command_is_one_of_noid_server(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_asked_plugins", False)
    monkeypatch.setattr(cli, "commands", dict(cli.commands))
    done = CliRunner().invoke(cli, ["house-rules"])
    assert (done.exit_code, done.output) == (0, "CPUs of a VM: at most 4\n")
