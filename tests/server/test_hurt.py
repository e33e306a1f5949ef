"""What ``scripts/hurt`` does to a server, in small: each ordeal, and the bounds that do not depend on the machine."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable, Iterator

import pytest
from noid_bench import hurting
from noid_bench.http_server import reaped_directory, simulated_server
from noid_bench.hurting import Verdict, Victim

#: Verdicts about how long something took beside something else, which a busy machine decides.
OF_THE_MOMENT = ("p50", "p99", "CPU")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """A server in a process of its own. It began with the limit of open files that most have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.MonkeyPatch.context() as patch, reaped_directory(tmp_path_factory.mktemp("hurt")) as directory:
        patch.setattr(hurting, "SAMPLES", 20)
        patch.setattr(hurting, "ROUNDS", 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, limits[1]), limits[1]))
        try:
            serving = simulated_server(directory)
            token, target = serving.__enter__()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        try:
            victim = Victim(target=target, token=token)
            hurting.prepare(victim)
            yield victim
        finally:
            serving.__exit__(None, None, None)


@pytest.mark.parametrize(
    "ordeal",
    [
        hurting.bomb,
        functools.partial(hurting.huge_header, size=8 << 20),
        functools.partial(hurting.endless_body, size=32 << 20),
        functools.partial(hurting.dropped_connections, count=400),
        # Compared with itself: how quick it is beside another is not judged here.
        lambda victim: hurting.idle_consoles(victim, victim, count=150, idle_secs=0.5),
        lambda victim: hurting.bad_clients(victim, victim, count=30),  # the last: it ends the server
    ],
    ids=["bomb", "header", "body", "connections", "consoles", "bad clients"],
)
def test_a_server_stands(victim: Victim, ordeal: Callable[[Victim], list[Verdict]]) -> None:
    verdicts = ordeal(victim)
    assert verdicts
    judged = [verdict for verdict in verdicts if not any(word in verdict.what for word in OF_THE_MOMENT)]
    assert [str(verdict) for verdict in judged if not verdict.holds] == []
