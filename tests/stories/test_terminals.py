"""A terminal in front of a real VM: an editor, another size, what is pasted, keys, leaving and coming back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noid.testing.person import Person

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

PATIENCE_SECS = 60.0
CTRL_C, CTRL_D, DETACH, LEAVE_RUNNING = b"\x03", b"\x04", b"\x1d", b"\x10\x11"
PASTED = b"".join(b"line %d of what is pasted into a terminal, none of it lost\r" % n for n in range(2000))[:100_000]


@pytest.fixture(scope="module")
def vm(shared_house: House) -> str:
    """A VM for terminals."""
    return str(shared_house.create("terminal-vm"))


@pytest.fixture
def noid(shared_house: House, vm: str) -> House:
    """The command line, whose VM stays for the next story."""
    return shared_house


@contextlib.contextmanager
def at_a_shell(noid: House, *command: str) -> Iterator[Person]:
    """Yield somebody at the prompt of a guest's shell, who then leaves it and finds the terminal as it was."""
    with Person.typing(noid, *command) as someone:
        someone.types(b"\r")
        someone.sees(b"# ")
        assert not someone.has_the_terminal_back()
        yield someone
        someone.types(b"\r")
        someone.sees(b"# ")
        someone.types(b"exit\r")  # at the console that leaves; elsewhere the shell ends
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()


@pytest.mark.parametrize(
    "command", [("console", "terminal-vm"), ("exec", "terminal-vm", "-it", "--", "sh")], ids=["console", "exec -it"]
)
def test_a_terminal_does_what_people_do_all_day(noid: House, command: tuple[str, ...]) -> None:
    with at_a_shell(noid, *command) as someone:
        someone.types(b"sleep 7401\r")
        noid.eventually(lambda: "sleep 7401" in noid.guest("terminal-vm", "ps"))
        someone.types(CTRL_C)
        someone.sees(b"# ")

        someone.types(b"echo rea''dy; cat > /tmp/typed\r")
        someone.sees(b"ready")  # only now the guest's terminal is cat's, for which Ctrl+D is the end
        someone.types(b"hello\r" + CTRL_D)
        noid.eventually(lambda: noid.guest("terminal-vm", "cat /tmp/typed") == "hello")

        someone.resize(132, 43)
        noid.eventually(lambda: _size(someone) == b"43 132")

        someone.types(b"stty -echo; echo rea''dy; cat > /tmp/pasted; stty sane; sha256sum < /tmp/pasted\r")
        someone.sees(b"ready")
        someone.types(PASTED + CTRL_D + CTRL_D)
        assert hashlib.sha256(PASTED.replace(b"\r", b"\n")).hexdigest().encode() in someone.sees(b"  -")
        someone.sees(b"# ")


def _size(someone: Person) -> bytes:
    someone.types(b"stty size; echo wh''at\r")
    return someone.sees(b"what").split(b"\r\n")[-2]


def test_ctrl_c_at_a_terminal_reaches_a_command_that_has_none(noid: House) -> None:
    script = "trap 'echo got it; exit 7' INT; echo begun; while :; do sleep 0.1; done"
    with Person.typing(noid, "exec", "terminal-vm", "--", "sh", "-c", script) as someone:
        someone.sees(b"begun")
        someone.types(CTRL_C)
        someone.sees(b"got it")
        assert someone.running.wait(PATIENCE_SECS) == 7


def test_a_shell_is_left_and_gone_back_to(noid: House) -> None:
    with Person.typing(noid, "exec", "terminal-vm", "-it", "--", "sh") as someone:
        someone.sees(b"# ")
        someone.types(b"here=still\r")
        someone.sees(b"# ")
        someone.types(LEAVE_RUNNING)
        someone.sees(b"noid attach terminal-vm ")
        process = someone.sees(b"\r\n").decode()
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()
    with Person.typing(noid, "attach", "terminal-vm", process, "-t") as someone:
        someone.types(b"\recho $here here\r")
        someone.sees(b"\nstill here\r\n")
        someone.types(b"exit 3\r")
        assert someone.running.wait(PATIENCE_SECS) == 3
        assert someone.has_the_terminal_back()


def test_terminals_go_on_where_they_were_when_the_agent_is_killed(house: House) -> None:
    house.create("web")
    counting = b"i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo =$i=; sleep 0.01; done; echo al''l\r"
    with (
        Person.typing(house, "console", "web") as at_console,
        Person.typing(house, "exec", "web", "-it", "--", "sh") as at_shell,
        Person.typing(house, "logs", "web", "-f") as following,
    ):
        people = (at_console, at_shell)
        for someone in people:
            someone.types(b"\r")
            someone.sees(b"# ")
            someone.types(counting)
        for someone in (*people, following):
            someone.sees(b"=20=")
        house.end_agent(signal.SIGKILL)
        for someone in (*people, following):
            assert _numbers(someone.sees(b"\nall\r")) == list(range(21, 201))  # none missing, none twice
        for someone in people:
            someone.types(b"echo aga''in\r")
            someone.sees(b"again\r\n")
            someone.types(b"exit\r")
            assert someone.running.wait(PATIENCE_SECS) == 0
            assert someone.has_the_terminal_back()
        following.types(CTRL_C)
        assert following.running.wait(PATIENCE_SECS) == 130


def _numbers(shown: bytes) -> list[int]:
    """Return the numbers between equals signs. What noid says in between, wherever that is, is not the guest's."""
    shown = re.sub(rb"[\r\n]*\[[a-z ;]+\][\r\n]*", b"", shown)
    return [int(word) for word in shown.split(b"=") if word.isdigit()]


# --- in tmux, whose screen can be looked at ---------------------------------------------------------------------------


class Tmux:
    """A terminal with a screen, in which a shell runs."""

    def __init__(self, socket: Path, noid: House) -> None:
        self._socket = socket
        words = ["new-session", "-d", "-x", "90", "-y", "25", "sh"]
        self("-f", "/dev/null", *words, cwd=noid.cwd, env=noid.environment)

    def __call__(self, *words: str, **options: Any) -> str:
        """Tell tmux something; return what it says."""
        command = ["tmux", "-S", str(self._socket), *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=PATIENCE_SECS, **options
        ).stdout

    def types(self, *keys: str) -> None:
        """Press *keys*, as tmux names them."""
        self("send-keys", *keys)

    def sees(self, holds: Callable[[str], object]) -> str:
        """Wait until the screen is as it should be, and return it."""
        deadline = time.monotonic() + PATIENCE_SECS
        while not holds(screen := self("capture-pane", "-p")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.05)  # tmux does not tell when its screen changes
        return screen

    @property
    def is_alternate(self) -> bool:
        """Whether a program has the whole screen."""
        return self("display", "-p", "#{alternate_on}").strip() == "1"


@pytest.fixture
def tmux(noid: House, tmp_path: Path) -> Iterator[Tmux]:
    """A terminal in tmux."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    terminal = Tmux(tmp_path / "tmux", noid)
    pid = int(terminal("display", "-p", "#{pid}"))
    yield terminal
    os.kill(pid, signal.SIGKILL)  # its shell and what runs there end with their terminal
    noid.eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_in_tmux_an_editor_is_resized_pasted_to_left_and_come_back_to(noid: House, tmux: Tmux, tmp_path: Path) -> None:
    command = " ".join(map(str, noid.argv("console", "terminal-vm")))
    tmux.types("stty -g > before", "Enter", command, "Enter")
    tmux.sees(lambda screen: "~. on a new line" in screen)
    tmux.types("Enter")
    tmux.sees(lambda screen: screen.rstrip().endswith("#"))

    tmux.types("vi /tmp/edited", "Enter")
    tmux.sees(lambda _: tmux.is_alternate)
    (tmp_path / "text").write_text("first line\nexit\n~.\nlast line")
    tmux("load-buffer", str(tmp_path / "text"))
    tmux.types("i")
    tmux("paste-buffer", "-p")
    tmux.sees(lambda screen: "last line" in screen)
    tmux("resize-window", "-x", "70", "-y", "20")
    tmux.types("Escape")
    tmux.sees(lambda screen: "- /tmp/edited" in screen)  # before that, what follows would be one key with it
    tmux.types(":wq", "Enter")
    tmux.sees(lambda screen: screen.rstrip().endswith("#"))
    assert not tmux.is_alternate
    assert noid.guest("terminal-vm", "cat /tmp/edited") == "first line\nexit\n~.\nlast line"
    noid.eventually(lambda: noid.guest("terminal-vm", "stty size < /dev/console") == "20 70")

    tmux.types("vi /tmp/edited", "Enter")  # and it is left in the middle
    tmux.sees(lambda screen: screen.startswith("first line"))
    tmux.types("C-q")
    tmux.sees(lambda screen: "--- Detached ---" in screen)
    assert not tmux.is_alternate
    tmux.types("stty -g > after; echo do''ne", "Enter")
    tmux.sees(lambda screen: "done" in screen)
    assert (noid.cwd / "before").read_text() == (noid.cwd / "after").read_text()

    tmux.types(f"clear; {command} --history 0", "Enter")
    tmux.sees(lambda screen: "on a new line" in screen)
    tmux.types("C-l")
    tmux.sees(lambda screen: screen.startswith("first line"))
    tmux.types(":q!", "Enter")
    tmux.sees(lambda screen: screen.rstrip().endswith("#"))
    tmux.types("Enter", "~", ".")
    tmux.sees(lambda screen: "--- Detached ---" in screen)
