"""``noid bench server`` and ``cli``: small here, to see that it runs, leaves nothing, and says what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from noid_bench import command_line, http_server

from noid.cli.main import cli


def test_every_request_is_measured_beside_bare_servers_and_nothing_is_left(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "VMS", 2)
    monkeypatch.setattr(http_server, "TURNS", 2)
    monkeypatch.setattr(http_server, "IN_TURN", 10)
    monkeypatch.setattr(http_server, "AT_ONCE", 32)
    words = ["bench", "--json", "server", "--rounds", "1", "--dir", str(data_dir / "work")]
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    assert done.exception is None, done.exception
    figures = json.loads(done.stdout)["figures"]
    assert len(figures) == 9
    assert all(figure["p50"] > 0 and figure["floor_p50"] > 0 for figure in figures)
    assert list((data_dir / "work").iterdir()) == []


def test_commands_are_measured_beside_python_and_a_bare_click_program(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "TURNS", 1)
    words = ["bench", "--json", "cli", "--rounds", "1", "--dir", str(data_dir / "work")]
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    assert done.exception is None, done.exception
    figures = json.loads(done.stdout)["figures"]
    assert [figure["name"] for figure in figures if figure["floor_name"] == "python -c pass"] == [
        "a bare click program", "noid --version", "noid list",
    ]  # fmt: skip
    assert all(figure["p50"] > 0 for figure in figures)
    assert list((data_dir / "work").iterdir()) == []
