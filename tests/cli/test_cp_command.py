"""``noid cp`` as it is typed: what it refuses, what it says, how it ends. Copies themselves are in tests/stories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROUTE = "/v1/vms/web/files"
MISSING = {"kind": "missing"}
FILE = {"kind": "file", "size": 5, "allocated_bytes": 4096, "mode": "0640", "mtime_ns": 1_000_000_000_000_000_000}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a", "b"), "neither side is in a VM"),
        (("-", "-"), "neither side is in a VM"),
        (("./web:/x", "b"), "neither side is in a VM"),  # as scp has it: a slash before the colon is no VM
        (("web:", "b"), "Write web:. for the user's home there"),
        (("web:/x",), "Missing argument"),
        (("--max-bytes", "-1", "web:/x", "b"), "--max-bytes"),
    ],
)
def test_what_names_no_copy_is_a_usage_error_and_nothing_is_asked(
    noid: Any, agent: Any, words: tuple[str, ...], said: str
) -> None:
    done = noid("cp", *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr.decode()
    assert agent.requests == []


@pytest.mark.parametrize(
    ("answer", "words", "said"),
    [
        (MISSING, ("nothing", "web:/x"), "cannot read nothing: No such file or directory."),
        (MISSING, ("/dev/null", "web:/x"), "/dev/null is neither a file nor a directory."),
        (MISSING, ("file", "web:/x/"), "web:/x/ is no directory. Make it first"),
        (FILE, (".", "web:/x"), "web:/x is there and no directory; a directory cannot replace it."),
        (MISSING, ("web:/x", "here"), "web:/x: there is no such file or directory."),
        (FILE | {"kind": "other"}, ("web:/x", "here"), "web:/x is neither a file nor a directory."),
        (FILE, ("web:/x", "no/such/directory"), "cannot write no/such/directory.noid-part: No such file or directory."),
        ({"kind": "file"}, ("web:/x", "here"), "answered something noid-server would not."),
    ],
)
def test_a_copy_that_cannot_be_is_one_sentence_and_exit_code_1(
    noid: Any, agent: Any, answer: dict[str, object], words: tuple[str, str], said: str
) -> None:
    (noid.cwd / "file").write_text("text")
    agent.answers("GET", f"{ROUTE}?path=/x", 200, answer)
    agent.answers("GET", f"{ROUTE}?path=/x/", 200, answer)
    done = noid("cp", *words)
    assert (done.returncode, done.stdout) == (1, b"")
    text = done.stderr.decode()
    assert text.startswith("Error: ")
    assert said in text
    assert "Traceback" not in text
    assert [path.name for path in noid.cwd.iterdir()] == ["file"]


def test_a_refusal_in_the_middle_is_shown_with_the_guest_s_words_although_not_all_was_sent(
    noid: Any, agent: Any
) -> None:
    with Path(noid.cwd / "file").open("wb") as file:
        file.write(bytes(8 << 20))
    words = "the guest says: /x.noid-part: No space left on device."
    agent.answers("GET", f"{ROUTE}?path=/x", 200, MISSING)
    put = f"{ROUTE}?path=/x&mode=644&mtime_ns={(noid.cwd / 'file').stat().st_mtime_ns}"
    agent.answers("PUT", put, 507, {"error": words, "code": "no_space"})
    done = noid("cp", "file", "web:/x")
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"server error (507): {words}" in done.stderr.decode()


def test_what_is_left_out_is_named_on_stderr_and_the_exit_code_says_so(noid: Any, agent: Any) -> None:
    tree = noid.cwd / "tree"
    tree.mkdir()
    agent.answers("GET", f"{ROUTE}?path=/x", 200, MISSING)
    put = {"size": 0, "entries": 1, "sha256": "00" * 32, "left_out": ["dev/\x1b[31mred: a device"]}
    agent.answers("PUT", f"{ROUTE}?path=/x", 200, put)
    done = noid("cp", "tree", "web:/x")
    assert (done.returncode, done.stdout) == (1, b"Copied 1 entry, 0 bytes\n")
    line = done.stderr.decode()
    assert line.startswith("left out: dev/")
    assert "\x1b" not in line
    as_json = noid("cp", "--json", "tree", "web:/x")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout) == {"size": 0, "entries": 1, "sha256": None, "left_out": put["left_out"]}


def test_the_user_and_odd_bytes_reach_the_server_as_they_were_typed(noid: Any, agent: Any) -> None:
    noid(b"cp", b"--user", b"alice", b"web:/a b&\xff", b"here")
    assert agent.requests[0].path == f"{ROUTE}?path=/a%20b%26%FF&user=alice"
