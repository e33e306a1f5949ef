"""Network cards on TAP devices handed over by name, in a network namespace of the test's own: see `taps_inside.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = Path(__file__).with_name("taps_inside.py")
BOUND_SECS = 100


@pytest.mark.vm
def test_vmms_take_the_taps_they_are_given_and_no_others() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: TAP devices are made")
    for needed in ("unshare", "ip"):
        if shutil.which(needed) is None:
            pytest.skip(f"the program {needed} is not installed")
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun")
    argv = [
        "unshare",
        "--net",
        "--mount",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        str(INSIDE),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BOUND_SECS, check=False, cwd=INSIDE.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
