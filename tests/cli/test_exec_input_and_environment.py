"""Where a guest's command has its input and its variables from: what people of docker, ssh and shell loops expect."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

PATIENCE_SECS = 20.0


def echo(exchange: Any) -> None:
    """A guest that shows its input after the name of the VM's variables, and what it was told of standard input."""
    asked = exchange.request()
    if not asked.get("stdin"):
        exchange.send(1, b"[no input]")
        exchange.end(0)
        return
    while (data := exchange.receive()[1]) != b"\x03":
        exchange.send(1, data[1:])
    exchange.end(0)


def variables(exchange: Any) -> None:
    exchange.send(1, "\n".join(exchange.request()["env"]).encode("utf-8", "surrogateescape"))
    exchange.end(0)


# --- standard input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "printf content | noid exec web -- cat",
        "printf content > f; noid exec web -- cat < f",
        "printf content | timeout 20 noid exec web -- cat",
        "noid exec web -- cat <<< content | tr -d '\\n'",
        "noid exec web -- cat < <(printf content)",
    ],
)
def test_a_pipe_or_file_that_is_ours_alone_is_forwarded(noid: Any, agent: Any, line: str) -> None:
    agent.runs(echo)
    done = noid.sh(line)
    assert (done.stdout, done.stderr) == (b"content", b"")


@pytest.mark.parametrize(
    "loop",
    [
        "printf '1\\n2\\n3\\n' | while read -r n; do noid exec -q web -- x; echo $n; done",
        "printf '1\\n2\\n3\\n' > f; while read -r n; do noid exec -q web -- x; echo $n; done < f",
        "printf '1\\n2\\n3\\n' | while read -r n; do timeout 20 noid exec -q web -- x; echo $n; done",
        "while read -r n; do noid exec -q web -- x | cat; echo $n; done < <(printf '1\\n2\\n3\\n')",
    ],
)
def test_the_list_of_a_loop_is_not_eaten(noid: Any, agent: Any, loop: str) -> None:
    agent.runs(echo)
    done = noid.sh(loop)
    assert (done.stdout, done.stderr) == (b"[no input]1\n[no input]2\n[no input]3\n", b"")


def test_input_that_is_left_to_a_loop_is_told_of_unless_somebody_said_so(noid: Any, agent: Any) -> None:
    agent.runs(echo)
    left = noid.sh("echo mine | { noid exec web -- x; cat; }")
    assert left.stdout == b"[no input]mine\n"
    assert left.stderr.startswith(b"Standard input was left to the script around this command")
    assert left.stderr.count(b"\n") == 1
    left = noid.sh("echo mine | { noid exec web -n -- x; cat; }")
    assert (left.stdout, left.stderr) == (b"[no input]mine\n", b"")
    left = noid.sh("{ noid exec web -- x; cat; } < /dev/null")  # nothing is left, so there is nothing to tell
    assert (left.stdout, left.stderr) == (b"[no input]", b"")


def test_with_i_input_is_taken_from_a_loop_too_and_with_n_from_nobody(noid: Any, agent: Any) -> None:
    agent.runs(echo)
    assert noid.sh("echo mine | { noid exec web -i -- cat; cat; }").stdout == b"mine\n"
    assert noid.sh("echo mine | noid exec web -n -- cat").stdout == b"[no input]"
    assert noid("exec", "web", "-n", "-i", "--", "cat").returncode == 2


def test_without_i_a_terminal_is_not_read(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(echo)
    with person(noid, "exec", "web", "--", "cat") as someone:
        someone.sees(b"[no input]")
        assert someone.running.wait(PATIENCE_SECS) == 0


# --- variables -------------------------------------------------------------------------------------------------------


def test_a_variable_without_a_value_is_passed_on_from_here_if_we_have_it(noid: Any, agent: Any) -> None:
    agent.runs(variables)
    done = noid("exec", "web", "-e", "OURS", "-e", "NOT_OURS", "-e", "EMPTY=", "--", "env", OURS="a b=c")
    assert done.stdout.splitlines() == [b"OURS=a b=c", b"EMPTY="]


def test_variables_come_from_files_in_docker_s_spelling_and_options_win(noid: Any, agent: Any) -> None:
    agent.runs(variables)
    (noid.cwd / "one").write_bytes(
        b"\xef\xbb\xbf# a comment\n\n   A=1\nB='quoted' # not a comment \r\nOURS\nNOT_OURS\n#C=3\nD=a=b"
    )
    (noid.cwd / "two").write_text("A=2\nE=caf\u00e9\n")
    done = noid("exec", "web", "--env-file", "one", "--env-file", "two", "-e", "D=option", "--", "env", OURS="here")
    assert done.stdout.decode().splitlines() == [
        "A=2", "B='quoted' # not a comment ", "OURS=here", "D=option", "E=caf\u00e9",
    ]  # fmt: skip


@pytest.mark.parametrize("entry", ["1A", "1A=x", "=x", ""])
def test_a_bad_variable_is_refused_before_anything_is_sent(noid: Any, agent: Any, entry: str) -> None:
    done = noid("exec", "web", "-e", entry, "--", "x")
    assert done.returncode == 2
    assert b"Error: invalid environment variable name" in done.stderr
    assert agent.requests == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"A=1\nexport B=2\n", b"vars, line 2: invalid environment variable name 'export B'"),
        (b"\n\n=2\n", b"vars, line 3: invalid environment variable name ''"),
        (b"A=1\nB=\xff\n", b"vars, line 2: not UTF-8"),
        (b"A=\0", b"vars, line 1: the value of A contains a NUL byte"),
        (None, b"cannot read vars: No such file or directory"),
    ],
)
def test_a_bad_line_of_a_file_is_named(noid: Any, agent: Any, content: bytes | None, complaint: bytes) -> None:
    if content is not None:
        (noid.cwd / "vars").write_bytes(content)
    done = noid("exec", "web", "--env-file", "vars", "--", "x")
    assert done.returncode == 2
    assert complaint in done.stderr
    assert agent.requests == []


def test_what_fails_of_ours_is_125_and_what_was_typed_wrongly_is_2(noid: Any, agent: Any) -> None:
    (noid.home / ".noid").mkdir()
    (noid.home / ".noid" / "config.toml").write_text("[server\n")
    nobody = {"NOID_URL": "", "NOID_TOKEN": ""}
    assert noid("exec", "web", "--", "x", **nobody).returncode == 125  # a broken file
    assert noid("exec", "--", "x").returncode == 125  # no VM chosen
    assert noid("exec", "not/a/name", "--", "x").returncode == 125
    assert noid("exec", "web", "--", "x", NOID_URL="http://127.0.0.1:1").returncode == 125  # nobody listens
    assert noid("exec", "web", "-d", "--", "x").returncode == 125  # 404
    assert noid("wait", "web", "8f0a12bc").returncode == 125
    assert noid("attach", "web", "8f0a12bc").returncode == 125
    assert noid("exec", "web", "--nonsense", "--", "x").returncode == 2
    assert noid("exec", "web", "-t", "--", "x").returncode == 2  # no terminal


def test_output_that_cannot_be_written_is_125(noid: Any, agent: Any) -> None:
    def script(exchange: Any) -> None:
        exchange.request()
        exchange.send(1, b"x" * 4096)
        exchange.receive()

    agent.runs(script)
    with noid.start(
        "exec", "web", "-n", "--", "x", stdout=os.open("/dev/full", os.O_WRONLY), stderr=subprocess.PIPE
    ) as running:
        _, err = running.communicate(timeout=PATIENCE_SECS)
    assert (running.returncode, err) == (125, b"Error: cannot write the output: No space left on device.\n")
