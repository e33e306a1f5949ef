"""The pytest plugin keeps its word: deadlines strike, leaks are found, nothing outlives even a killed session."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import textwrap
from pathlib import Path

from noid.testing.processes import kill_marked

LEAK = """
    import os, subprocess, pytest, trio

    def started(data_dir):
        env = os.environ | {"NOID_DATA_DIR": str(data_dir)}
        child = subprocess.Popen(["sleep", "600"], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
        child.returncode = 0  # nobody waits for it: that is the leak
        return child.pid
"""


def pytest_run(directory: Path, tests: str, *arguments: str) -> subprocess.Popen[str]:
    """Start pytest on a file of its own, without this project's configuration."""
    file = directory / "test_inner.py"
    file.write_text(textwrap.dedent(LEAK) + textwrap.dedent(tests))
    (directory / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(file)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_test_that_hangs_fails_with_the_places_where_its_tasks_wait(tmp_path: Path) -> None:
    inner = pytest_run(
        tmp_path,
        """
        @pytest.mark.deadline(0.2)
        async def test_hangs():
            async def forgotten():
                await trio.sleep_forever()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forgotten)

        @pytest.mark.deadline(30)
        async def test_fails_plainly():
            assert 1 == 2

        async def test_passes():
            await trio.sleep(0)
        """,
    )
    said, _ = inner.communicate(timeout=60)

    assert "2 failed, 1 passed" in said
    assert "not done after 0.2 s" in said
    assert "in forgotten" in said
    assert "assert 1 == 2" in said


def test_a_process_a_mount_or_a_file_left_behind_fails_its_test_and_is_ended(tmp_path: Path) -> None:
    inner = pytest_run(
        tmp_path,
        """
        @pytest.mark.usefixtures("no_leaks")
        def test_leaves_a_process(data_dir):
            print("pid", started(data_dir))

        @pytest.mark.usefixtures("no_leaks")
        def test_leaves_a_file():
            os.open("/dev/null", os.O_RDONLY)

        @pytest.mark.usefixtures("no_leaks")
        def test_leaves_nothing(data_dir):
            (data_dir / "file").write_text("gone with its directory")
        """,
        "-s",
    )
    said, _ = inner.communicate(timeout=60)

    assert "3 passed, 2 errors" in said
    assert "sleep 600" in said
    assert "-> /dev/null" in said
    assert not alive(int(said.split("pid ")[1].split()[0]))


def test_what_a_killed_session_started_is_ended_and_its_files_removed(tmp_path: Path) -> None:
    inner = pytest_run(
        tmp_path,
        """
        def test_is_killed(data_dir):
            print("pid", started(data_dir), data_dir, flush=True)
            os.kill(os.getpid(), 9)
        """,
        "-s",
    )
    said, _ = inner.communicate(timeout=60)
    pid, directory = said.split("pid ")[1].split()[:2]
    try:
        pidfd = os.pidfd_open(int(pid))
    except ProcessLookupError:
        pass  # the reaper was quicker
    else:
        try:
            assert select.select([pidfd], [], [], 20)[0], "the reaper did not come"
        finally:
            os.close(pidfd)

    assert not alive(int(pid))
    assert kill_marked(Path(directory)) == {}
