"""The table of results: what is counted, what is printed at the end of a run, and what goes on the page."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from noid.testing.results import BEGIN, END, Row, read, table, together, write_page, written

PASSING = """
    import pytest
    from noid.testing.results import tell
    def test_kept(): tell("promises", "vmm 1", "kvm")
    def test_broken():
        tell("promises", "vmm 1", "kvm")
        assert False
    def test_not_possible():
        tell("promises", "vmm 1", "kvm")
        pytest.skip("its documentation says | no")
    @pytest.fixture
    def left():
        tell("promises", "vmm 1", "kvm")
        yield
        pytest.fail("left behind")
    def test_that_leaves_something(left): pass
    def test_of_something_else(): pass
"""


def a_row(**fields: object) -> Row:
    return Row(**({"suite": "promises", "vmm": "vmm 1", "accelerator": "kvm", "day": "2026-01-02"} | fields))  # type: ignore[arg-type]  # of a test


@pytest.mark.parametrize("processes", [(), ("-n", "1")], ids=["here", "in another process"])
def test_a_run_ends_with_what_was_kept_broken_and_not_possible(tmp_path: Path, processes: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(PASSING))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--results", "results.json", *processes]

    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)

    (row,) = read((tmp_path / "results.json").read_text())
    assert (row.suite, row.vmm, row.accelerator, row.kept) == ("promises", "vmm 1", "kvm", 1)
    assert sorted(row.broken) == ["test_broken", "test_that_leaves_something"]
    assert row.skipped == {"its documentation says | no": 1}
    assert table([row]).splitlines()[-1] in done.stdout.splitlines()


def test_runs_about_the_same_are_summed() -> None:
    first = [a_row(kept=2, skipped={"no button": 1}), a_row(vmm="vmm 2", kept=1)]
    second = [a_row(kept=3, broken=["test_x"], skipped={"no button": 2})]

    one, two = together([read(written(first)), second])

    assert (one.kept, one.broken, one.skipped) == (5, ["test_x"], {"no button": 3})
    assert (two.vmm, two.kept) == ("vmm 2", 1)


def test_the_page_keeps_all_but_the_rows_that_are_new(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")

    write_page(page, [a_row(kept=2), a_row(vmm="vmm 2", kept=9)])
    write_page(page, [a_row(kept=3)])

    assert page.read_text().startswith(f"before\n{BEGIN}\n| suite | VMM |")
    assert "| promises | vmm 1 | kvm | 3 of 3 | - | - | 2026-01-02 |\n" in page.read_text()
    assert "| promises | vmm 2 | kvm | 9 of 9 | - | - | 2026-01-02 |\n" in page.read_text()
    assert "2 of 2" not in page.read_text()
    assert page.read_text().endswith(f"{END}\nafter\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for a table"):
        write_page(page, [])
