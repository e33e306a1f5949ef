"""Reading the pages: their tables and code blocks, as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Page:
    """One Markdown page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text()

    def section(self, title: str) -> Page:
        """Return what is below the heading *title*, up to the next heading of its level or above."""
        lines = self.text.splitlines()
        begin = next((n for n, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(title)}", line)), None)
        assert begin is not None, f"{self.path.name} has no heading {title!r}"
        level = len(lines[begin]) - len(lines[begin].lstrip("#"))
        rest = lines[begin + 1 :]
        end = next((n for n, line in enumerate(rest) if re.match(rf"#{{1,{level}}} ", line)), len(rest))
        part = Page.__new__(Page)
        part.path, part.text = self.path, "\n".join(rest[:end])
        return part

    def rows(self, *header: str) -> list[tuple[str, ...]]:
        """Return the rows of every table whose columns are *header*, cells without their backquotes."""
        found, inside = [], False
        for line in self.text.splitlines():
            if not line.startswith("|"):
                inside = False
                continue
            cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            if cells == header:
                inside = True
            elif inside and not set(cells[0]) <= set("-: "):
                found.append(tuple(re.sub(r"^`(.*)`$", r"\1", cell) for cell in cells))
        assert found, f"{self.path.name} has no table | {' | '.join(header)} |"
        return found

    def blocks(self, language: str) -> list[str]:
        """Return the code blocks of *language*."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def page() -> Callable[[str], Page]:
    """Return a page by its path below the checkout."""
    return lambda name: Page(ROOT / name)
