"""What holds for every test: a run that was started in the background must not differ from one on a terminal."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Undo that shells ignore Ctrl+C for what they start in the background: children would inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
