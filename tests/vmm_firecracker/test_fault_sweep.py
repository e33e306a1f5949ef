"""The whole agent, and one call after the other goes wrong. A sample; ``scripts/firecracker-faults`` does all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.firecracker_faults import CAPTURING, STARTING, Case, FaultWorld, Place, impatient


@pytest.fixture
def world(data_dir: Path, firecracker: SimulatedFirecracker) -> Iterator[FaultWorld]:
    (agent_dir := data_dir / "agent").mkdir()
    with impatient():
        yield FaultWorld(agent_dir, firecracker)


def sample(places: list[Place]) -> Iterator[Case]:
    """Yield one case for each call that boots or loads, and the worst there are for the source of a checkpoint."""
    ways = itertools.cycle([("refuse", "before"), ("die", "after"), ("garble", "before"), ("cut", "after")])
    for place in places:
        if place.call == STARTING and place.operation == "wake":
            yield Case(place, "die", "before")
        elif place.operation == "checkpoint" and place.call == CAPTURING:
            yield Case(place, "cut", "after")
            yield Case(place, "late", "after")
            yield Case(place, "hang", "during")
        elif place.call != STARTING and place.operation != "wake":
            yield Case(place, *next(ways))


@pytest.mark.deadline(120)
def test_whatever_fails_names_its_call_leaves_nothing_and_works_the_next_time(
    world: FaultWorld, no_leaks: None
) -> None:
    places = trio.run(world.prepare)
    chosen = list(sample(places))

    trio.run(world.strike, chosen)

    trio.run(world.end)
    assert {place.operation for place in places} == {"create", "wake", "checkpoint", "fork", "restore"}
    assert {case.what for case in chosen} == {"refuse", "garble", "cut", "die", "hang", "late"}


@pytest.mark.deadline(120)
def test_an_agent_that_is_killed_at_a_call_leaves_nothing_to_the_next_one_and_loses_no_vm(
    world: FaultWorld, no_leaks: None
) -> None:
    places = {(place.operation, place.call): place for place in trio.run(world.prepare)}

    for case in (
        Case(places["checkpoint", CAPTURING], "kill", "during"),
        Case(places["checkpoint", "PATCH /vm"], "kill", "before"),
        Case(places["restore", "PUT /snapshot/load"], "kill", "after"),
    ):
        world.kill(case)

    trio.run(world.end)
