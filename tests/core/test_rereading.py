"""What is kept between two reads is never older than the database."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from noid.core.database import rereading
from noid.core.database.rereading import Rereader

ALL = "SELECT n FROM numbers WHERE n >= ? ORDER BY n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "numbers.db"


@pytest.fixture
def writer(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE numbers (n INTEGER)")
    connection.execute("INSERT INTO numbers VALUES (1)")
    yield connection
    connection.close()


@pytest.fixture
def reader(path: Path, writer: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    yield connection
    connection.close()


def numbers(rereader: Rereader, least: int = 0) -> list[int]:
    return list(rereader.records(_number, ALL, (least,)))


def _number(row: sqlite3.Row) -> int:
    return int(row[0])


def test_nothing_is_read_again_while_nothing_changes(reader: sqlite3.Connection) -> None:
    asked: list[str] = []
    reader.set_trace_callback(asked.append)
    rereader = Rereader(reader)
    assert [numbers(rereader), numbers(rereader), numbers(rereader, 2), numbers(rereader, 2)] == [[1], [1], [], []]
    assert len([sql for sql in asked if sql.startswith("SELECT")]) == 2


def test_a_commit_is_seen_at_once_and_a_rollback_never(reader: sqlite3.Connection, writer: sqlite3.Connection) -> None:
    rereader = Rereader(reader)
    for number in range(2, 50):
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO numbers VALUES (?)", (number,))
        assert number not in numbers(rereader)
        writer.execute("ROLLBACK" if number % 2 else "COMMIT")
        assert (number in numbers(rereader)) == (not number % 2)


def test_what_another_process_commits_is_seen_at_once(reader: sqlite3.Connection, path: Path) -> None:
    rereader = Rereader(reader)
    assert numbers(rereader) == [1]
    script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('UPDATE numbers SET n = 7'); c.commit()"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert numbers(rereader) == [7]


def test_what_is_kept_is_bounded(
    reader: sqlite3.Connection, writer: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rereading, "RECORDS_KEPT", 100)
    writer.executemany("INSERT INTO numbers VALUES (?)", [(number,) for number in range(2, 90)])
    rereader = Rereader(reader)
    for least in range(200):
        assert len(numbers(rereader, least)) == max(0, 90 - max(least, 1))
    assert sum(len(records) + 1 for records in rereader._kept.values()) <= 100
