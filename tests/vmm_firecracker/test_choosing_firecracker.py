"""Firecracker is used where a guest runs on it, and what is said where none does."""

from __future__ import annotations

from pathlib import Path

import noid_vmm_firecracker.probe
import pytest
from noid_vmm_firecracker.backend import FirecrackerConfig, open_backend
from noid_vmm_firecracker.versions import abilities, parsed

from noid.core.backends import AgentContext
from noid.errors import DependencyDown
from noid.testing.firecracker import SimulatedFirecracker


@pytest.fixture
def context(data_dir: Path) -> AgentContext:
    (run_dir := data_dir / "run").mkdir()
    return AgentContext(data_dir=data_dir, run_dir=run_dir, database=data_dir / "noid.db")


async def refusal(program: Path, context: AgentContext, **settings: bool) -> str:
    with pytest.raises(DependencyDown) as caught:
        async with open_backend(FirecrackerConfig(binary=str(program), **settings), context):
            pass
    return str(caught.value)


async def test_a_firecracker_that_runs_a_guest_is_offered_and_tried_once(
    firecracker: SimulatedFirecracker, context: AgentContext
) -> None:
    for _ in range(2):
        async with open_backend(FirecrackerConfig(binary=str(firecracker.program)), context) as backend:
            assert backend.fingerprint()["version"] == "1.17.0"
            assert backend.features.accelerator == "kvm"
    assert (context.run_dir / "firecracker-probe.json").exists()


async def test_a_missing_one_says_where_to_get_it(context: AgentContext) -> None:
    assert "releases" in await refusal(Path("no-such-firecracker"), context)


async def test_an_old_one_is_refused_with_the_reason(data_dir: Path, context: AgentContext) -> None:
    old = SimulatedFirecracker(data_dir / "old", version="1.14.2")

    said = await refusal(old.program, context)

    assert "1.14.2" in said
    assert "at least 1.15.0" in said
    assert "corrupt" in said


async def test_a_setting_it_is_too_old_for_is_refused(data_dir: Path, context: AgentContext) -> None:
    old = SimulatedFirecracker(data_dir / "old", version="1.15.1")

    said = await refusal(old.program, context, clock_realtime=True)

    assert "1.15.1 has no clock_realtime, which came with 1.16.0" in said


async def test_a_kvm_on_which_guests_do_nothing_is_found_out(
    data_dir: Path, context: AgentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noid_vmm_firecracker.probe, "_KVM_SECS", 1.0)
    dead = SimulatedFirecracker(data_dir / "dead", kvm="dead")

    said = await refusal(dead.program, context)

    assert "did not come to its end" in said
    assert 'vmm = "qemu"' in said
    assert not (context.run_dir / "firecracker-probe.json").exists()


async def test_what_is_no_firecracker_is_told_by_what_it_says(data_dir: Path, context: AgentContext) -> None:
    (junk := data_dir / "junk").write_text("#!/bin/sh\necho I am a teapot\n")
    junk.chmod(0o755)

    assert "I am a teapot" in await refusal(junk, context)


def test_versions_are_read_and_decide_what_can_be_done() -> None:
    assert parsed("Firecracker v1.17.0-dev\n") == (1, 17, 0)
    assert parsed("fire!") is None
    assert not abilities((1, 15, 0)).clock_realtime
    assert abilities((1, 16, 0)).clock_realtime
