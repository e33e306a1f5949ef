"""The pytest plugin ``noid``: deadlines for every test, data directories that leave nothing behind, a leak oracle.

- Every test has a deadline: 60 s, 180 s when marked ``vm``, or what ``@pytest.mark.deadline(secs)`` says, and times
  `noid.testing.pace.slowness`. An async test
  that misses it is cancelled and fails with the place where each of its tasks waited. One that blocks the loop ends
  the whole run with a traceback of every thread `HARD_GRACE_SECS` later.
- ``data_dir``: an agent's data directory, short enough for sockets; afterwards its processes and mounts are gone,
  whatever became of the test, and even of pytest.
- ``no_leaks``: fails a test that leaves a process, a mount or an open file.

Pytest imports this in every project of an environment noid is installed in, hence the imports inside functions.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_SECS = 60.0
VM_DEADLINE_SECS = 180.0
HARD_GRACE_SECS = 60.0

pytest.register_assert_rewrite(
    *(f"noid.testing.{name}" for name in ("vmm_rig", "vmm_starts", "vmm_guests", "vmm_lives", "vmm_checkpoints")),
    "noid.testing.saga_world",
)

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker, and keep the real stderr for last words."""
    import os

    config.addinivalue_line("markers", "deadline(secs): how long this test may take")
    config.stash[_stderr] = os.dup(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--results", metavar="FILE", help="write the table of results to FILE, as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of results, where there were tests that belong in it."""
    from noid.testing.results import Results, table, written

    results = Results()
    for kind in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(kind, ()):
            if hasattr(report, "user_properties"):
                results.add(report)
    if rows := results.rows():
        terminalreporter.section("results")
        terminalreporter.write_line(table(rows))
    if file := config.getoption("--results"):
        Path(file).write_text(written(rows))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give it back."""
    import os

    fd = config.stash.get(_stderr, None)
    if fd is not None:
        os.close(fd)
        del config.stash[_stderr]


def deadline_of(item: pytest.Item) -> float:
    """Return how many seconds *item* may take."""
    from noid.testing.pace import slowness

    mark = item.get_closest_marker("deadline")
    if mark is not None:
        return float(mark.args[0]) * slowness()
    return (VM_DEADLINE_SECS if item.get_closest_marker("vm") else DEADLINE_SECS) * slowness()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run async tests under their deadline: pytest-trio takes the first ``trio`` mark's *run*."""
    import inspect

    try:
        if not config.getini("trio_mode"):
            return
    except ValueError:  # no pytest-trio, so no async tests
        return

    for item in items:
        function = getattr(item, "obj", None)
        if inspect.iscoroutinefunction(function) and item.get_closest_marker("trio") is None:
            item.add_marker(pytest.mark.trio(run=functools.partial(_run, deadline_of(item))), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a run that hangs where no cancellation reaches."""
    import faulthandler

    from noid.testing.results import running

    faulthandler.dump_traceback_later(deadline_of(item) + HARD_GRACE_SECS, exit=True, file=item.config.stash[_stderr])
    try:
        with running(item.user_properties):
            return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run(
    deadline_secs: float, function: Callable[..., Awaitable[Any]], *arguments: Any, clock: Any = None, **options: Any
) -> Any:
    """Do as ``trio.run``, with a deadline. A test with a clock of its own has its own time."""
    import trio

    if clock is not None:
        return trio.run(function, *arguments, clock=clock, **options)
    waiting: list[str] = []

    async def watch(scope: trio.CancelScope) -> None:
        await trio.sleep(deadline_secs)
        root = trio.lowlevel.current_root_task()
        waiting.extend(_places(root) if root is not None else ())
        scope.cancel()

    async def bounded() -> Any:
        result: Any = None
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            try:
                result = await function(*arguments)
            except trio.Cancelled:
                raise
            except BaseException as error:
                failure = error  # raised outside, so that a failed assertion is not wrapped in a group
            nursery.cancel_scope.cancel()
        if waiting:
            pytest.fail(f"not done after {deadline_secs:g} s. Its tasks waited here:\n" + "\n".join(waiting))
        if failure is not None:
            raise failure
        return result

    return trio.run(bounded, **options)


def _places(task: Any, depth: int = 0) -> Iterator[str]:
    """Yield one line for each task below *task*: its name and the innermost line that is not trio's."""
    where = ""
    coroutine = task.coro
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None and "/trio/" not in frame.f_code.co_filename:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    yield f"{'  ' * depth}{task.name}: {where or 'inside trio'}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _places(child, depth + 1)


@pytest.fixture(scope="session")
def data_dir_root() -> Iterator[Path]:
    """A directory for everything this session makes, watched by a process that cleans it when pytest is no more."""
    import tempfile

    from noid.testing.reaper import start_reaper

    root = Path(tempfile.mkdtemp(prefix="noid-t-"))
    reaper = start_reaper(root)
    try:
        yield root
    finally:
        reaper.communicate(timeout=60)  # closes its stdin, which is the sign to clean


@pytest.fixture
def data_dir(data_dir_root: Path) -> Iterator[Path]:
    """A new, empty data directory. Afterwards its processes are killed and it is removed."""
    import tempfile

    from noid.testing.reaper import clean

    directory = Path(tempfile.mkdtemp(prefix="", dir=data_dir_root))
    try:
        yield directory
    finally:
        clean(directory)


@pytest.fixture
def no_leaks(data_dir: Path) -> Iterator[None]:
    """Fail the test if it leaves a process of its data directory, a mount below it, or an open file of pytest's."""
    import gc

    from noid.testing.processes import marked_processes
    from noid.testing.reaper import mounts_below

    gc.collect()
    files = _open_files()
    yield
    gc.collect()
    left = [f"process {pid}: {words}" for pid, words in marked_processes(data_dir).items()]
    left += [f"mount {point}" for point in mounts_below(data_dir)]
    left += [f"open file {fd} -> {target}" for fd, target in sorted(_open_files().items() - files.items())]
    if left:
        pytest.fail("the test left behind:\n" + "\n".join(left))


def _open_files() -> dict[int, str]:
    """Return what pytest has open, by descriptor. Standard streams change hands while output is captured."""
    import os

    found = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # names are wanted
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115  # not a path: "socket:[1]"
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if int(name) > 2:
            found[int(name)] = target
    return found
