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


@pytest.mark.deadline(120)
def test_firecracker_is_measured_beside_bare_calls_and_nothing_is_left(data_dir: Path) -> None:
    words = ["bench", "--json", "firecracker", "--simulated", "--rounds", "1", "--dir", str(data_dir / "work")]
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    assert done.exception is None, done.exception
    figures = {figure["name"].partition(",")[0]: figure for figure in json.loads(done.stdout)["figures"]}
    pause, inside = figures["checkpoint pause"], figures["bytes written inside the pause"]
    assert pause["p50"] > 0 < pause["floor_p50"]
    assert inside["p50"] == pytest.approx(inside["floor_p50"], abs=0.01), (
        "noid makes Firecracker write as much as it must"
    )
    assert figures["bytes written by a checkpoint in total"]["p50"] > inside["p50"]
    assert {figure["must"] for figure in figures.values()} == {1.1, 1.3, None}
    assert list((data_dir / "work").iterdir()) == []
