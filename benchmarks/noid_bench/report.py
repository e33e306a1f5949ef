"""Figures, their bounds, and how they are shown: a table for people, one JSON object for machines."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured thing.

    *samples* are in *unit*. With *floor* samples, the bounds are on the ratio of the medians; without, on the median.
    *skipped* says why there are no samples.
    """

    name: str
    unit: str
    samples: tuple[float, ...] = ()
    floor: tuple[float, ...] = ()
    floor_name: str = ""
    must: float | None = None
    aim: float | None = None
    skipped: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def p50(self) -> float:
        """The median."""
        return median(self.samples)

    @property
    def p90(self) -> float:
        """The 90th percentile (nearest rank)."""
        return sorted(self.samples)[max(0, -(-len(self.samples) * 9 // 10) - 1)]

    @property
    def ratio(self) -> float | None:
        """The median over the floor's median, or None where there is no floor."""
        return self.p50 / median(self.floor) if self.samples and self.floor else None

    @property
    def judged(self) -> float | None:
        """What the bounds are on."""
        if not self.samples:
            return None
        return self.ratio if self.floor else self.p50

    @property
    def verdict(self) -> str:
        """``aim`` and ``must`` say which bound is met; ``MISSED``: not even the must."""
        value = self.judged
        if value is None:
            return "skipped"
        if self.aim is not None and value <= self.aim:
            return "aim"
        if self.must is not None:
            return "must" if value <= self.must else "MISSED"
        return ""

    def as_json(self) -> dict[str, Any]:
        """Return the figure as an object."""
        known = asdict(self)
        if self.samples:
            known |= {"n": len(self.samples), "p50": self.p50, "p90": self.p90}
            known |= {"floor_p50": median(self.floor) if self.floor else None, "ratio": self.ratio}
        return known | {"verdict": self.verdict}


def host_facts() -> dict[str, Any]:
    """Return what the figures depend on: processor, kernel, memory, Python. No name of the host."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "mem_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a table of text."""
    head = ("what", "n", "p50", "p90", "floor p50", "ratio", "must", "aim", "verdict")
    rows = [head, *(_row(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"{figure.name}: {figure.note or figure.skipped}" for figure in figures if figure.note or figure.skipped]
    return "\n".join([*lines, "", *notes]).rstrip()


def _row(figure: Figure) -> tuple[str, ...]:
    if not figure.samples:
        return (figure.name, "0", "-", "-", "-", "-", _number(figure.must), _number(figure.aim), figure.verdict)
    unit = f" {figure.unit}" if figure.unit else ""
    return (
        figure.name,
        str(len(figure.samples)),
        f"{_number(figure.p50)}{unit}",
        f"{_number(figure.p90)}{unit}",
        f"{_number(median(figure.floor))}{unit}" if figure.floor else "-",
        f"{figure.ratio:.2f}" if figure.ratio is not None else "-",
        _number(figure.must),
        _number(figure.aim),
        figure.verdict,
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
