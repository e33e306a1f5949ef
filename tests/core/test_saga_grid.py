"""Every step of every saga, and every call it makes, x {fails, cancelled, killed, undo repeated}: nothing is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from noid.testing.reaper import clean
from noid.testing.saga_grid import CALL_MODES, CALLS, SAGAS, STEP_MODES, Cell, cells, places
from noid.testing.saga_world import World

_results: dict[Cell, str] = {}


class Worlds:
    """One world for as long as it is whole, because making one costs more than breaking it. A broken one is left."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.world: World | None = None

    def get(self) -> World:
        if self.world is None:
            world = World(Path(tempfile.mkdtemp(prefix="", dir=self._root)))
            trio.run(world.prepare)
            self.world = world
        return self.world

    def drop(self) -> None:
        if self.world is not None:
            clean(self.world.data_dir)
            self.world = None


@pytest.fixture(scope="module")
def worlds(data_dir_root: Path) -> Iterator[Worlds]:
    worlds = Worlds(data_dir_root)
    try:
        yield worlds
    finally:
        worlds.drop()


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_nothing_is_lost_or_left(cell: Cell, worlds: Worlds) -> None:
    world = worlds.get()
    _results[cell] = "FAILED"
    try:
        outcome = world.run_broken(cell)
        assert (outcome == "killed") is cell.kills_agent, outcome
        trio.run(world.check, cell, outcome)
    except BaseException:
        worlds.drop()
        raise
    _results[cell] = outcome


def test_the_grid_is_drawn(record_property: pytest.RecordProperty) -> None:
    if len(_results) < len(cells()):
        pytest.skip("only part of the grid ran")
    rows: list[str] = []
    for saga in SAGAS:
        for what, modes, names in (("step", STEP_MODES, places(saga)), ("call", CALL_MODES, CALLS[saga])):
            rows.append(f"{saga + ', ' + what:20}" + "".join(f"{mode:>17}" for mode in modes))
            for name in names:
                found = (Cell(saga=saga, place=name, mode=mode, is_call=what == "call") for mode in modes)
                rows.append(f"  {name:18}" + "".join(f"{_results.get(cell, '-'):>17}" for cell in found))
    grid = "\n".join(rows)
    record_property("grid", grid)
    print(grid)  # noqa: T201  # shown by pytest -rP, and when something failed

    assert "FAILED" not in grid
