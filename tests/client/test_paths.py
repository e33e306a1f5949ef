"""Where an agent's socket is, and whom it is trusted to belong to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from noid.core import paths
from noid.errors import ConfigError


def test_the_data_directory_is_the_variable_s_else_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOID_DATA_DIR", raising=False)
    assert paths.data_dir() == tmp_path / ".noid"
    monkeypatch.setenv("NOID_DATA_DIR", "~/elsewhere")
    assert paths.data_dir() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOID_DATA_DIR", "here/./x/..")
    assert paths.data_dir() == tmp_path / "here"


def test_a_socket_lies_in_the_data_directory_while_its_path_is_short() -> None:
    room = paths.SOCKET_PATH_BYTES_MAX - len("/run/agent.sock")
    short = Path("/" + "d" * (room - 1))
    assert paths.socket_path(short) == short / "run" / "agent.sock"
    assert len(os.fsencode(paths.socket_path(short))) == 90


def test_a_longer_one_moves_to_a_short_directory_of_the_user_and_no_two_agents_share_it() -> None:
    long, longer = Path("/" + "d" * 74), Path("/" + "d" * 75)
    moved = paths.socket_path(longer)
    assert paths.socket_path(long) == long / "run" / "agent.sock"
    assert moved.parent.parent == Path(f"/tmp/noid-{os.geteuid()}")
    assert len(moved.parent.name) == 16
    assert moved != paths.socket_path(Path("/" + "e" * 75))


def test_a_path_is_measured_in_bytes() -> None:
    assert paths.run_dir(Path("/" + "ü" * 38)).parts[1] == "tmp"


def test_a_run_directory_is_made_for_its_owner_alone_and_again(tmp_path: Path) -> None:
    directory = tmp_path / "data" / "run"
    assert paths.private_directory(directory) == directory
    directory.chmod(0o777)
    paths.private_directory(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_short_run_directory_has_a_private_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "_short_parent", lambda: str(tmp_path / "noid-0"))
    directory = paths.private_directory(tmp_path / "noid-0" / "0123456789abcdef")
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
    paths.check_private(directory)
    if os.geteuid() == 0:
        os.chown(directory.parent, 4242, -1)
        with pytest.raises(ConfigError, match="noid-0 is not a directory of this user"):
            paths.check_private(directory)


def test_a_link_or_a_file_in_its_place_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="no socket in it can be trusted"):
            paths.check_private(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        paths.check_private(tmp_path / "none")
