"""Does to a server what hostile, broken and slow clients do, and says of each whether it stayed within its bound.

Usage: scripts/hurt [--consoles 1000] [--bad 200] [--connections 10000] [--json]

Runs a server of its own with simulated machines in a scratch directory, on 127.0.0.1, and beside it another that nobody
hurts, to compare with. Takes two minutes. Exit code 1 when a bound was broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys

from noid_bench import hurting
from noid_bench.http_server import reaped_directory, simulated_server

from noid.core import paths

IDLE_SECS = 10.0


def main() -> int:
    """Do it all and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--consoles", type=int, default=1000)
    options.add_argument("--bad", type=int, default=200)
    options.add_argument("--connections", type=int, default=10_000)
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdicts: list[hurting.Verdict] = []

    def judge(found: list[hurting.Verdict]) -> None:
        verdicts.extend(found)
        if not asked.json:
            print(*found, sep="\n", flush=True)

    with (
        reaped_directory(paths.data_dir()) as directory,
        simulated_server(directory, "hurt") as (token, target),
        simulated_server(directory, "peer") as (peers_token, peers_target),
    ):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # after the servers began with what everybody has
        victim = hurting.Victim(target=target, token=token)
        peer = hurting.Victim(target=peers_target, token=peers_token)
        hurting.prepare(victim)
        hurting.prepare(peer)
        judge(hurting.bomb(victim))
        judge(hurting.huge_header(victim, hurting.HEADER_BYTES))
        judge(hurting.endless_body(victim, hurting.BODY_BYTES_MAX))
        judge(hurting.dropped_connections(victim, asked.connections))
        judge(hurting.idle_consoles(victim, peer, asked.consoles, IDLE_SECS))
        judge(hurting.bad_clients(victim, peer, asked.bad))  # the last: it ends the server
    if asked.json:
        print(json.dumps([dataclasses.asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts], indent=1))
    return 0 if all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
