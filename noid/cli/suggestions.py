"""What somebody who mistyped a name probably meant. Imported when something went wrong, never before."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from threading import Thread

from noid.cli.options import Call
from noid.client.calls import checkpoints, vms
from noid.errors import NoidError

ASKING_SECS = 2.0
"""How long the server may take to say which names there are. An error must not be made to wait for a hint."""
SHOWN = 3

SYNONYMS = {
    "clone": "fork",
    "delete": "destroy",
    "describe": "info",
    "inspect": "info",
    "launch": "create",
    "login": "auth",
    "ls": "list",
    "machines": "list",
    "new": "create",
    "remove": "destroy",
    "rollback": "restore",
    "shell": "console",
    "show": "info",
    "snapshot": "checkpoint",
    "snapshots": "checkpoints",
    "ssh": "console",
    "status": "info",
    "suspend": "pause",
    "top": "ps",
    "unpause": "resume",
    "vms": "list",
}
"""What other programs of this kind call our commands."""

_VM = re.compile(r"VM '([^']+)' not found")
_CHECKPOINT = re.compile(r"checkpoint '([^']+)' not found")
_IMAGE = re.compile(r"there is no image '([^']+)' \(there is: ([^)]*)\)")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return the question which of *candidates* *word* was meant to be; nothing if none is like it."""
    found = get_close_matches(word, sorted(set(candidates)), n=SHOWN)
    return f"Did you mean {' or '.join(map(repr, found))}?" if found else ""


def of_command(word: str, commands: Iterable[str]) -> str:
    """Return the question which of *commands* *word* was meant to be."""
    known = set(commands)
    if SYNONYMS.get(word) in known:
        return f"Did you mean {SYNONYMS[word]!r}?"
    return did_you_mean(word, known)


def after(error: NoidError, invocation: Call) -> str:
    """Return what to try after *error*, beyond what it says itself; nothing where that is nothing.

    Where a name was not found, the agent is asked which there are, for `ASKING_SECS` at most.
    """
    text = str(error)
    if found := _VM.search(text):
        names = _asked(lambda: [vm["name"] for vm in invocation.client.perform(vms.every())])
        return _sentences(did_you_mean(found[1], names), "See which there are with: noid list")
    if found := _CHECKPOINT.search(text):
        names = _asked(lambda: _names_of_checkpoints(invocation))
        return _sentences(did_you_mean(found[1], names), "See which there are with: noid checkpoints NAME")
    if found := _IMAGE.search(text):
        return did_you_mean(found[1], found[2].split(", "))
    return ""


def _names_of_checkpoints(invocation: Call) -> list[str]:
    every = invocation.client.perform(checkpoints.every())
    return [name for each in every for name in (each["id"], each["label"]) if name]


def _sentences(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _asked(question: Callable[[], list[str]]) -> list[str]:
    """Return the answer to *question*, or nothing if it cannot be had in time. Whatever goes wrong is silent."""
    answers: list[str] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # what went wrong first is what the user is told
            answers.extend(question())

    thread = Thread(target=ask, daemon=True)  # nobody waits for it when we end
    thread.start()
    thread.join(ASKING_SECS)
    return list(answers)
