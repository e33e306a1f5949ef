"""The image people really use: Debian with systemd."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

CACHE = Path.home() / ".cache" / "noid"
MEM_MIB = 256


@pytest.fixture
def debian(house: House) -> Iterator[House]:
    """A house with the default image, taken from the cache that ``noid-server image build`` keeps."""
    if not any((CACHE / "rootfs").glob("*")):
        pytest.skip("the Debian image has not been built here (noid-server image build)")
    house.env["HOME"] = os.environ["HOME"]  # whose cache it is
    done = house.server("image", "build")
    assert done.code == 0, done.err.decode()
    return house


@pytest.mark.deadline(400)
def test_systemd_and_its_services_go_on_in_a_clone(debian: House) -> None:
    noid = debian
    noid.ok("create", "web", "--mem", str(MEM_MIB))
    assert noid.guest("web", "cat /proc/1/comm; id -un; sudo id -un; systemctl is-system-running").split() in (
        ["systemd", "noid", "root", "running"],
        ["systemd", "noid", "root", "degraded"],
    )
    noid.guest("web", "sudo systemd-run --unit counter sh -c 'while :; do echo $((n=n+1)) > /run/n; sleep 0.1; done'")
    noid.guest("web", "until [ -s /run/n ]; do sleep 0.1; done")
    at_least = int(noid.guest("web", "cat /run/n") or 0)
    checkpoint = noid.checkpoint("web")
    noid.ok("restore", "web", checkpoint, "--as", "copy")
    assert noid.guest("copy", "systemctl is-active counter") == "active"
    assert int(noid.guest("copy", "cat /run/n") or at_least) >= at_least
    assert noid.guest("copy", "hostname") == "copy"
    assert noid.guest("copy", "cat /etc/machine-id") != noid.guest("web", "cat /etc/machine-id")
    asked = time.time()
    assert asked - 5 < int(noid.guest("copy", "date +%s")) < time.time() + 5
