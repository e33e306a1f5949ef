"""Many people at the same door."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

CREATES = 20


def test_of_two_creates_of_one_name_one_wins_and_nothing_is_harmed(noid: House) -> None:
    words = ("create", "web", "--mem", "96", "--image", "tiny")
    typed = [noid.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ends = [(process.communicate(timeout=90), process.returncode) for process in typed]
    assert sorted(code for _, code in ends) == [0, 1]
    ((_, complaint),) = [said for said, code in ends if code == 1]
    assert complaint.decode().startswith("Error: server error (409): VM 'web'")
    assert complaint.count(b"\n") == 1
    assert noid.guest("web", "hostname") == "web"
    assert len(noid.machines()) == 1
    assert noid.strays() == []


def test_twenty_creates_at_once_all_work(noid: House) -> None:
    names = [f"vm{number}" for number in range(CREATES)]
    typed = [
        noid.start("create", name, "--mem", "96", "--image", "tiny", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in names
    ]
    for process in typed:
        _, complaint = process.communicate(timeout=150)
        assert (process.returncode, complaint) == (0, b"")
    assert noid.states() == dict.fromkeys(names, "running")
    asked = [noid.start("exec", name, "--", "hostname", stdout=subprocess.PIPE) for name in names]
    assert [process.communicate(timeout=90)[0].decode().strip() for process in asked] == names
    gone = [noid.start("destroy", name, stdout=subprocess.PIPE) for name in names]
    assert [(process.communicate(timeout=90), process.returncode)[1] for process in gone] == [0] * CREATES
    assert noid.machines() == {}
    assert noid.strays() == []
