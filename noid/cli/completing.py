"""What a word on the command line could become: asked by the shell with every press of Tab, so answered at once.

What only the server knows is asked by a child process, which outlives us and keeps the answer in a file: we wait for it
for `WAIT_SECS` and then take what the file has, old or nothing. So a server that hangs costs a person nothing but the
newest names, and costs the next press of Tab not even that.
"""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import BashComplete, CompletionItem, get_completion_class

from noid.cli.main import LazyGroup, cli
from noid.cli.options import Call, CommonOption
from noid.cli.start import COMPLETING
from noid.errors import NoidError

if TYPE_CHECKING:
    from noid.client.calls.call import Call as Request
    from noid.client.settings import Endpoint

AnswerT = TypeVar("AnswerT")
Choice = tuple[str, str]
"""A word and what is said beside it."""

WAIT_SECS = 0.08
FRESH_SECS = 1.0
CHILD_SECS = 30
LISTING_SECS = 5
KEPT_SECS = 7 * 24 * 3600
CHOICES_MAX = 500
SIGNALS = ("TERM", "INT", "KILL", "HUP", "QUIT", "USR1", "USR2", "STOP", "CONT")

_PATIENCE = "noid.completing.until"
_HARMLESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+,=-]*")
"""What a shell takes for one word and leaves as it is. Labels can be anything."""


def answer() -> int:
    """Print the words for the shell that asks, and return the exit code."""
    shell, _, what = os.environ[COMPLETING].partition("_")
    completer = _Bash if shell == "bash" else get_completion_class(shell)
    if completer is None or what != "complete":
        return 1
    asked = completer(_Completing("noid", params=list(cli.params)), {"obj": Call()}, "noid", COMPLETING)
    if "--" in asked.get_completion_args()[0]:
        return 0  # what comes is for the guest
    try:
        sys.stdout.write(f"{asked.complete()}\n")
    except NoidError:  # a broken config file, say; whoever runs the command is told
        return 0
    return 0


class _Bash(BashComplete):
    """Bash, to which a colon ends a word: what belongs together is put together, and offered from the colon on."""

    _offered_from = 0

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is asked for, and that one."""
        args, incomplete = super().get_completion_args()
        if "cp" not in args:
            return args, incomplete
        whole: list[str] = []
        glued = False
        for word in [*args, *([incomplete] if incomplete else [])]:
            glue = word == ":"
            if whole and (glue or glued):
                whole[-1] += word
            else:
                whole.append(word)
            glued = glue
        if not incomplete:
            return whole, ""
        *before, last = whole
        self._offered_from = last.rfind(":") + 1 if ":" in (*args, incomplete) else 0
        return before, last

    def format_completion(self, item: CompletionItem) -> str:
        """Return what the shell is told of *item*."""
        return f"{item.type},{item.value[self._offered_from :]}"


class _Completing(LazyGroup):
    """The command line, whose words know what they could become."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, prepared."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _prepare(command, cmd_name)
        return command


def _prepare(command: click.Command, path: str) -> None:
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            _prepare(below, f"{path} {name}")
    for parameter in command.params:
        if isinstance(parameter, CommonOption):
            parameter.hidden = False  # in lists of options they are told in a line of their own
        if path == "cp" and parameter.name in ("source", "target"):
            parameter.type = _Place()
        source = SOURCES.get((path, parameter.name or "")) or ANYWHERE.get(parameter.name or "")
        if source is not None:
            parameter.type = _Word(source)


class _Word(click.types.StringParamType):
    def __init__(self, source: Callable[[click.Context], Iterable[Choice]]) -> None:
        self._source = source

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return those of the source's words that begin with *incomplete*."""
        if incomplete.startswith("-"):
            return []
        ctx.meta[_PATIENCE] = time.monotonic() + WAIT_SECS  # for all that is asked together
        found = (each for each in self._source(ctx) if each[0].startswith(incomplete) and _HARMLESS.fullmatch(each[0]))
        return [CompletionItem(word, help=_line(about) or None) for word, about in found]


class _Place(click.types.StringParamType):
    """What `noid cp` copies: a local path, which the shell itself knows best, or ``VM:PATH``."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return what there is of VMs, or in a directory of one."""
        ctx.meta[_PATIENCE] = time.monotonic() + WAIT_SECS
        vm, colon, path = incomplete.partition(":")
        if not colon:
            names = [] if "/" in incomplete else [f"{name}:" for name, _ in _vms(ctx) if name.startswith(incomplete)]
            return [CompletionItem(incomplete, type="file"), *map(CompletionItem, filter(_HARMLESS.fullmatch, names))]
        if "/" in vm:
            return [CompletionItem(incomplete, type="file")]
        found = [f"{vm}:{word}" for word, _ in _guest_paths(ctx, vm, path) if word.startswith(path)]
        return [CompletionItem(word) for word in found if _HARMLESS.fullmatch(word)]


def _line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:60]


# --- what there is to choose from ------------------------------------------------------------------------------------


def _nothing(_: click.Context) -> Iterable[Choice]:
    return ()


def _vms(ctx: click.Context) -> Iterable[Choice]:
    from noid.client.calls import vms

    given = ctx.params.get("names") or ()
    return [each for each in _asked(ctx, vms.every(), lambda vm: [(vm["name"], vm["state"])]) if each[0] not in given]


def _checkpoints(ctx: click.Context) -> Iterable[Choice]:
    """Return the checkpoints of the VM that is meant, or those of all where it is none."""
    from noid.client.calls import checkpoints

    name = _meant_vm(ctx)
    request: Any = checkpoints.of_vm(name) if name else checkpoints.every()
    return _asked(ctx, request, _of_checkpoint)


def _of_checkpoint(checkpoint: Any) -> list[Choice]:
    label = checkpoint.get("label") or ""
    about = " ".join(filter(None, [checkpoint.get("vm_name"), label, checkpoint.get("created_at")]))
    return [(checkpoint["id"], about), *([(label, about)] if label else [])]


def _processes(ctx: click.Context) -> Iterable[Choice]:
    from noid.client.calls import processes

    name = _meant_vm(ctx)
    if name is None:
        return ()
    return _asked(
        ctx, processes.every(name), lambda each: [(each["id"], f"{each['state']}: {' '.join(each['command'])}")]
    )


def _guest_paths(ctx: click.Context, name: str, path: str) -> Iterable[Choice]:
    """Return what is in the directory of the VM *name* that *path* is in, as its ``ls`` tells it."""
    from noid.client.answers import ExecInfo
    from noid.client.calls.call import Call as Question
    from noid.client.calls.call import one
    from noid.core.model.names import checked_name

    if not path:
        return [("/", "")]
    if not path.startswith("/"):
        return ()
    directory = path[: path.rindex("/") + 1]
    question: Question[list[ExecInfo]] = Question(
        method="POST",
        path=f"/v1/vms/{checked_name(name)}/exec",
        body={"command": ["ls", "-1Ap", "--", directory], "timeout_secs": LISTING_SECS},
        understand=lambda reply: [one(ExecInfo)(reply)],
    )

    def choices(listing: ExecInfo) -> list[Choice]:
        names = listing["stdout"].splitlines() if listing["exit_code"] == 0 else []
        return [(f"{directory}{each}", "") for each in names]

    return _asked(ctx, question, choices, about=directory)


def _vm_and_then(second: Callable[[click.Context], Iterable[Choice]]) -> Callable[[click.Context], Iterable[Choice]]:
    """Return what offers VMs and *second* for the first word, because the VM may be left out, then *second*."""

    def source(ctx: click.Context) -> Iterable[Choice]:
        given = ctx.params.get("words") or ()
        return second(ctx) if given else [*_vms(ctx), *second(ctx)]

    return source


def _servers(_: click.Context) -> Iterable[Choice]:
    from noid.client import servers

    return [*((each.name, each.url) for each in servers.known()), (servers.LOCAL, "this machine")]


def _images(ctx: click.Context) -> Iterable[Choice]:
    """Return the images of this user's own agent; a server tells of its to nobody."""
    endpoint = _endpoint(ctx)
    if endpoint.data_dir is None:
        return ()
    try:
        return [(entry.name, "") for entry in sorted((Path(endpoint.data_dir) / "images").iterdir()) if entry.is_dir()]
    except OSError:
        return ()


def _keys(_: click.Context) -> Iterable[Choice]:
    from noid.client import preferences

    return [(key, "") for key in preferences.KEYS]


def _signals(_: click.Context) -> Iterable[Choice]:
    return [(name, "") for name in SIGNALS]


def _meant_vm(ctx: click.Context) -> str | None:
    """Return the VM that was named before the word, else the one of this directory, if it can be one."""
    from noid.client.settings import active_vm
    from noid.core.model.names import checked_name

    words = ctx.params.get("words") or ()
    name = ctx.params.get("name_option") or ctx.params.get("name") or (words[0] if words else None)
    if name is None:
        marked = active_vm()
        name = marked[0] if marked else None
    return None if name is None else checked_name(name)


ANYWHERE = {"name": _vms, "names": _vms, "name_option": _vms, "image": _images, "server": _servers}
"""Where a parameter's words come from, by its name, and by command and name where that differs."""

SOURCES: dict[tuple[str, str], Callable[[click.Context], Iterable[Choice]]] = {
    ("create", "name"): _nothing,
    ("create", "name_option"): _nothing,
    ("create", "checkpoint"): _checkpoints,
    ("run", "name"): _nothing,
    ("run", "checkpoint"): _checkpoints,
    ("label", "checkpoint"): _checkpoints,
    ("label", "words"): _vm_and_then(_nothing),
    ("rename", "words"): _vm_and_then(_nothing),
    ("port-forward", "words"): _vm_and_then(_nothing),
    ("open", "words"): _vm_and_then(_nothing),
    ("restore", "words"): _vm_and_then(_checkpoints),
    ("rm", "texts"): _checkpoints,
    ("attach", "words"): _vm_and_then(_processes),
    ("wait", "words"): _vm_and_then(_processes),
    ("kill", "words"): _vm_and_then(_processes),
    ("kill", "signal_name"): _signals,
    ("logs", "log"): _processes,
    ("auth switch", "name"): _servers,
    ("auth logout", "name"): _servers,
    ("auth setup", "name"): _nothing,
    ("config set", "key"): _keys,
    ("config get", "key"): _keys,
    ("config unset", "key"): _keys,
}


# --- asking the server, and not waiting for it -----------------------------------------------------------------------


def _endpoint(ctx: click.Context) -> Endpoint:
    from noid.client.settings import choose_endpoint

    invocation = ctx.find_root().ensure_object(Call)
    return choose_endpoint(local=invocation.local, server=invocation.server)


def _asked(
    ctx: click.Context,
    request: Request[list[AnswerT]],
    choices: Callable[[AnswerT], list[Choice]],
    *,
    about: str = "",
) -> list[Choice]:
    """Return what the agent answers, if it does so in `WAIT_SECS`, else what it has answered last.

    *about* is what a request asks beside its path.
    """
    endpoint = _endpoint(ctx)
    kept = _Kept(endpoint, f"{request.path}\0{about}" if about else request.path)
    if kept.age() > FRESH_SECS:
        _ask_in_a_child(kept, ctx.meta[_PATIENCE], lambda: _answered(endpoint, request, choices))
    return kept.read()


def _answered(
    endpoint: Endpoint, request: Request[list[AnswerT]], choices: Callable[[AnswerT], list[Choice]]
) -> list[Choice]:
    from noid.client.link import Link
    from noid.client.waiting import Blocking, finished
    from noid.core.paths import check_private

    if endpoint.data_dir is not None and endpoint.socket_path is not None:
        # As who may start an agent does; but none is started for a Tab.
        check_private(Path(endpoint.socket_path).parent)
    found = finished(Link(replace(endpoint, data_dir=None), Blocking()).perform(request))
    return [choice for item in found for choice in choices(item)]


def _ask_in_a_child(kept: _Kept, until: float, work: Callable[[], list[Choice]]) -> None:
    """Keep what *work* returns, which a process of its own does; return when it has ended, or at *until*.

    While one is at it, no other one is: then that returns at once.
    """
    lock = kept.lock()
    if lock is None:
        return
    readable, writable = os.pipe()
    if os.fork() == 0:
        try:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):  # the shell reads our output to its end
                os.dup2(nowhere, descriptor)
            os.close(readable)
            import signal

            signal.alarm(CHILD_SECS)  # ends it, wherever it is
            kept.keep(work())
        finally:
            os._exit(0)  # nobody is there to be told what went wrong, and the next Tab tries again
    os.close(writable)
    os.close(lock)
    select.select([readable], [], [], max(until - time.monotonic(), 0))
    os.close(readable)


class _Kept:
    """A file with the last answer to a question at *path* of an agent, asked with a certain token."""

    def __init__(self, endpoint: Endpoint, path: str) -> None:
        from hashlib import sha256

        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  # as paths.home()
        question = "\0".join([endpoint.address, endpoint.token or "", path])
        self._directory = Path(cache) / "noid" / "completion"
        self._file = self._directory / f"{sha256(question.encode()).hexdigest()[:32]}.json"

    def age(self) -> float:
        """Return how many seconds ago the answer came."""
        try:
            return time.time() - self._file.stat().st_mtime
        except OSError:
            return float("inf")

    def read(self) -> list[Choice]:
        """Return the answer; nothing if there is none."""
        import json

        try:
            return [(str(word), str(about)) for word, about in json.loads(self._file.read_text())]
        except (OSError, ValueError, TypeError):
            return []

    def lock(self) -> int | None:
        """Return a descriptor that holds this question's lock until it is closed everywhere; None if it is held.

        Also where nothing can be kept: then nobody asks.
        """
        import fcntl

        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def keep(self, choices: list[Choice]) -> None:
        """Make *choices* the answer, for this user's eyes only, and forget those that nobody asked for in days."""
        import json

        now = time.time()
        for entry in os.scandir(self._directory):
            if now - entry.stat().st_mtime > KEPT_SECS:
                os.unlink(entry.path)  # noqa: PTH108  # an entry is no Path
        temporary = self._file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(choices[:CHOICES_MAX]))
        temporary.replace(self._file)


def main() -> None:
    """Answer the shell and end the process, with whatever is still going on in it."""
    try:
        code = answer()
        sys.stdout.flush()
    except OSError:  # the shell has stopped listening
        code = 1
    os._exit(code)
