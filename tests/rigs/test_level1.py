"""What is brought to level 1, the guest in which KVM works. ``scripts/rig`` runs it, and takes minutes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from noid.testing.level1 import ROOT, TESTING, checkout, distributions
from noid.testing.pace import slowness


def test_the_checkout_arrives_as_it_is_compiled_with_what_is_built_into_it(tmp_path: Path) -> None:
    checkout(tmp_path)

    module = tmp_path / "noid" / "errors.py"
    assert module.read_bytes() == (ROOT / "noid" / "errors.py").read_bytes()
    assert Path(importlib.util.cache_from_source(str(module))).exists()
    for name in ("plugins/exec_vsock/noid_exec_vsock/guest/bin/noid-agent", "noid/vmmhost/launcher/bin/noid-launcher"):
        assert os.access(tmp_path / f"{name}-x86_64", os.X_OK)
    assert not (tmp_path / ".git").exists()
    assert not (tmp_path / ".venv").exists()


def test_what_noid_and_its_tests_import_is_among_what_is_brought_and_no_tool_is() -> None:
    names = {item.name.lower() for item in distributions(["noid", *TESTING], ["server"])}

    assert {"noid", "trio", "click", "hypercorn", "pytest", "pytest-trio", "hypothesis", "outcome"} <= names
    assert not names & {"ruff", "mypy", "basedpyright", "ziglang"}


def test_deadlines_are_as_much_longer_as_the_machine_is_said_to_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOID_TEST_SLOWNESS", raising=False)
    assert slowness() == 1
    monkeypatch.setenv("NOID_TEST_SLOWNESS", "5")
    assert slowness() == 5
