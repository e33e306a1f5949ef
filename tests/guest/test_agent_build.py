"""The agent's build: the same sources give the same bytes wherever they lie, and are not compiled twice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from noid_exec_vsock import guest_binary, initrd_files

from noid.errors import ConfigError

from .conftest import ROOT


@pytest.mark.deadline(300)
def test_the_same_sources_give_the_same_bytes_in_another_place(
    hatch_build: ModuleType, agent_program: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "quite another place" / "guest"
    shutil.copytree(ROOT / hatch_build.GUEST_DIR, elsewhere, ignore=shutil.ignore_patterns("bin"))
    rebuilt = tmp_path / "agent"
    hatch_build.compile_program(elsewhere, "x86_64", rebuilt, scratch=ROOT / ".zig-cache")
    assert rebuilt.read_bytes() == agent_program.read_bytes()
    assert b"quite another" not in rebuilt.read_bytes()
    assert str(ROOT).encode() not in rebuilt.read_bytes()


def test_what_is_up_to_date_is_not_compiled_again(hatch_build: ModuleType, agent_program: Path) -> None:
    before = agent_program.stat().st_mtime_ns
    assert agent_program in hatch_build.build_all(ROOT)
    assert agent_program.stat().st_mtime_ns == before


def test_what_a_killed_build_left_is_removed_and_a_running_one_is_left_alone(
    hatch_build: ModuleType, agent_program: Path
) -> None:
    killed, running = (agent_program.with_name(f".{agent_program.name}.{pid}") for pid in (2**22 + 1, os.getpid()))
    try:
        for path in (killed, running):
            path.touch()
        hatch_build.build_all(ROOT)
        assert (killed.exists(), running.exists()) == (False, True)
    finally:
        running.unlink()
        killed.unlink(missing_ok=True)


def test_any_change_of_the_sources_is_noticed(hatch_build: ModuleType, tmp_path: Path) -> None:
    guest_dir = tmp_path / "guest"
    shutil.copytree(ROOT / hatch_build.GUEST_DIR, guest_dir, ignore=shutil.ignore_patterns("bin"))
    before = hatch_build.sources_digest(guest_dir)
    (guest_dir / "wire.h").write_text((guest_dir / "wire.h").read_text() + "\n")
    assert hatch_build.sources_digest(guest_dir) != before


def test_the_program_is_static_small_and_for_its_architecture(agent_program: Path) -> None:
    for architecture, machine in (("x86_64", 62), ("aarch64", 183)):
        program = guest_binary(architecture)
        assert program[:4] == b"\x7fELF"
        assert int.from_bytes(program[18:20], "little") == machine
        assert b"ld-linux" not in program
        assert b"ld-musl" not in program
        assert len(program) < 250_000
    assert initrd_files("x86_64") == {"init": agent_program.read_bytes()}
    with pytest.raises(ConfigError, match="riscv64"):
        guest_binary("riscv64")
