"""The simulated Firecracker answers word for word what the real one was recorded to answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.firecracker_recording import SCENES, play

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded.json").read_text())
NEEDS_KVM = {"before the start"}  # the kernel is only looked at once there is a machine to put it in


def test_every_scene_is_recorded() -> None:
    assert list(RECORDED) == list(SCENES)


@pytest.mark.parametrize("scene", SCENES)
def test_the_simulated_firecracker_answers_as_the_real_one_did(scene: str, firecracker: SimulatedFirecracker) -> None:
    assert play(str(firecracker.program), scene) == RECORDED[scene]


@pytest.mark.parametrize("scene", SCENES)
def test_the_real_firecracker_answers_as_it_did(scene: str) -> None:
    program = os.environ.get("NOID_FIRECRACKER")
    if program is None:
        pytest.skip("no Firecracker: NOID_FIRECRACKER is not set to the path of one")
    if scene in NEEDS_KVM and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm that could be opened")
    version = json.loads(RECORDED["before the start"][1].partition("\r\n\r\n")[2])["firecracker_version"]
    now = play(program, "a body that is no JSON")[1]
    if f'"vmm_version":"{version}"' not in now:
        pytest.skip(f"the recording is of Firecracker {version}, {program} is another")
    assert play(program, scene) == RECORDED[scene]
