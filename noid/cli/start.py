"""Where the ``noid`` command begins: as little as possible before the first import that takes time."""

from __future__ import annotations

import gc
import os

COLLECT_AFTER_OBJECTS = 50_000
INTERRUPTED = 130
COMPLETING = "_NOID_COMPLETE"
"""Says in the environment that a shell asks what a word could become, and which one."""


def main() -> None:
    """Run the command line and end the process with its exit code."""
    gc.set_threshold(COLLECT_AFTER_OBJECTS)  # imports make no garbage, and looking for some is a tenth of their time
    try:
        if COMPLETING in os.environ:
            from noid.cli.completing import main as run
        else:
            from noid.cli.main import main as run
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    run()
