"""The table of results: which promises which VMM kept on which accelerator, and why which ones were not put to it.

A test says what it is about (`tell`); the pytest plugin counts, prints the table at the
end of a run, and writes it where ``--results FILE`` says, for `scripts/rig` to put runs together.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROPERTY = "noid-results"
HEADER = ("suite", "VMM", "accelerator", "kept", "broken", "not put to it, and why", "date")
BEGIN, END = "<!-- results: written by scripts/rig --write-table -->", "<!-- results end -->"
_KEPT, _BROKEN = "", "broken"
_KEY_CELLS = 3  # suite, VMM, accelerator


@dataclass(kw_only=True)
class Row:
    """What one suite came to on one VMM. *skipped* has numbers by reason; *day* is an ISO date."""

    suite: str
    vmm: str
    accelerator: str
    day: str
    kept: int = 0
    broken: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as the table has it."""
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(self.skipped.items())) or "-"
        total = self.kept + len(self.broken)
        kept = f"{self.kept} of {total}"
        return self.suite, self.vmm, self.accelerator, kept, ", ".join(self.broken) or "-", reasons, self.day


_running: list[list[tuple[str, object]]] = []


@contextlib.contextmanager
def running(properties: list[tuple[str, object]]) -> Iterator[None]:
    """Let `tell` write into the *properties* of the test that runs now."""
    _running.append(properties)
    try:
        yield
    finally:
        _running.pop()


def tell(suite: str, vmm: str, accelerator: str) -> None:
    """Say what the running test is about, so that it is counted. *vmm* has its version in it. Twice is once."""
    told: tuple[str, object] = (PROPERTY, {"suite": suite, "vmm": vmm, "accelerator": accelerator})
    if _running and told not in _running[-1]:
        _running[-1].append(told)


class Results:
    """Takes note of the reports of tests as they come."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str, str], dict[str, str]] = {}

    def add(self, report: Any) -> None:  # a pytest.TestReport
        """Take note of one report. A test has up to three; whatever fails in one of them breaks the promise."""
        told = next((value for name, value in report.user_properties if name == PROPERTY), None)
        if told is None or (report.when != "call" and not report.failed):
            return
        tests = self._told.setdefault((told["suite"], told["vmm"], told["accelerator"]), {})
        if report.failed:
            tests[report.nodeid] = _BROKEN
        elif report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            tests.setdefault(report.nodeid, reason.removeprefix("Skipped: "))
        else:
            tests.setdefault(report.nodeid, _KEPT)

    def rows(self) -> list[Row]:
        """Return the rows, in the order of their suites and VMMs."""
        return [self._row(*key, tests) for key, tests in sorted(self._told.items())]

    @staticmethod
    def _row(suite: str, vmm: str, accelerator: str, tests: dict[str, str]) -> Row:
        return Row(
            suite=suite,
            vmm=vmm,
            accelerator=accelerator,
            day=datetime.now(UTC).date().isoformat(),
            kept=sum(outcome == _KEPT for outcome in tests.values()),
            broken=[name.rpartition("::")[2] for name, outcome in tests.items() if outcome == _BROKEN],
            skipped=dict(Counter(outcome for outcome in tests.values() if outcome not in (_KEPT, _BROKEN))),
        )


def written(rows: Iterable[Row]) -> str:
    """Return *rows* as text that `read` takes."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def read(text: str) -> list[Row]:
    """Return the rows in *text*."""
    return [Row(**row) for row in json.loads(text)]


def together(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the rows of several runs, summed where they are about the same."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in (row for run in runs for row in run):
        known = rows.setdefault(
            (row.suite, row.vmm, row.accelerator),
            Row(suite=row.suite, vmm=row.vmm, accelerator=row.accelerator, day=row.day),
        )
        known.kept += row.kept
        known.broken += row.broken
        for reason, count in row.skipped.items():
            known.skipped[reason] = known.skipped.get(reason, 0) + count
    return [row for _, row in sorted(rows.items())]


def table(rows: Iterable[Row]) -> str:
    """Return *rows* as a Markdown table."""
    return _table(row.cells for row in rows)


def write_page(page: Path, rows: Iterable[Row]) -> None:
    """Put *rows* into the table of *page*, in the place of those about the same; the others stay.

    Raises:
        ValueError: it has no table.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for a table: {BEGIN} and {END}.")
    lines = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in old.strip().splitlines()[2:]]
    cells = {line[:_KEY_CELLS]: line for line in lines} | {row.cells[:_KEY_CELLS]: row.cells for row in rows}
    page.write_text(f"{before}{BEGIN}\n{_table(line for _, line in sorted(cells.items()))}\n{END}{after}")


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
