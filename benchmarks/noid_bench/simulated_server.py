"""A server to measure, as a program of its own: everything real but the machines, which are simulated.

Usage: ``python -m noid_bench.simulated_server DATA_DIR HOST:PORT READY_FD``. Serves until SIGTERM. Adds a user
``bench`` and writes its token to READY_FD once connections are accepted; logs to stderr, as ``noid-server serve`` does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

import trio

from noid.core.config.settings import LimitsConfig
from noid.core.opening import open_agent
from noid.server.serve import serve
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

USER = "bench"
SESSIONS_MAX = 2000


def main() -> None:
    """Serve."""
    data_dir, listen, ready_fd = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.set_inheritable(ready_fd, False)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("noid.server.hypercorn").setLevel(logging.WARNING)
    give_default_image(data_dir)
    trio.run(_serve, data_dir, listen, ready_fd)


async def _serve(data_dir: Path, listen: str, ready_fd: int) -> None:
    # One user asks as much as the server can answer: the rate is counted as ever, and never exceeded.
    limits = LimitsConfig(requests_per_second=1e9)
    config = simulated_config(data_dir, local=False, listen=listen, limits=limits)
    config = dataclasses.replace(config, max_ws_sessions=SESSIONS_MAX)
    async with open_agent(config, simulated_plugins()) as agent:
        _, token = await agent.users.add(USER)

        def ready() -> None:
            with os.fdopen(ready_fd, "w") as pipe:
                pipe.write(token)

        await serve(agent, config, ready=ready)


if __name__ == "__main__":
    main()
