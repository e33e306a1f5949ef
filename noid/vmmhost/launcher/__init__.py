"""The program that starts a VMM in a room of its own: see ``launcher.c``. Built with noid."""

from __future__ import annotations

import platform
from pathlib import Path

LAUNCHER = Path(__file__).parent / "bin" / f"noid-launcher-{platform.machine()}"
