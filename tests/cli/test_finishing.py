"""What interrupts a command, and what finishes all the same."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from noid.cli.finishing import Work, one_interruption


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(signo) for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    assert [signal.getsignal(signo) for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def sent(signo: signal.Signals) -> None:
    os.kill(os.getpid(), signo)


def test_the_first_signal_interrupts_and_only_an_insisting_ctrl_c_does_so_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reached: list[object] = []

    def interrupted() -> None:
        with one_interruption("Finishing."):
            try:
                sent(signal.SIGTERM)
            except SystemExit as ended:
                reached.append(ended.code)
                for signo in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):  # a session's end sends several
                    sent(signo)
                reached.append("warned")
                sent(signal.SIGINT)
                reached.append("never")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == [128 + signal.SIGTERM, "warned"]
    assert capfd.readouterr().err.count("Finishing.") == 1


def test_what_has_come_to_its_end_is_finished_in_peace() -> None:
    with one_interruption("Finishing.") as finishing:
        finishing()
        sent(signal.SIGTERM)
        sent(signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with one_interruption("Finishing."):
            sent(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_goes_on_when_who_waits_for_it_is_interrupted() -> None:
    may_end = threading.Event()
    work = Work(may_end.wait)

    def interrupted() -> None:
        with one_interruption("Finishing."):
            threading.Timer(0.05, sent, (signal.SIGTERM,)).start()
            work.result()

    with pytest.raises(SystemExit):
        interrupted()
    assert not work.has_ended(0)
    may_end.set()
    assert work.result() is True


def test_work_that_fails_fails_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise LookupError("there is none")

    with pytest.raises(LookupError, match="there is none"):
        Work(fail).result()
