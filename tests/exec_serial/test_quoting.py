"""Words reach a real shell exactly as they are, whatever bytes are in them; and so does input."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noid_exec_serial import script

WORDS = st.lists(
    st.one_of(
        st.binary(max_size=40).map(lambda word: word.replace(b"\0", b"")),
        st.sampled_from(
            [b"", b"'", b"\n", b"x\n\n", b"-n", b"--", b"%s", b"\\", b"!!", b"$(id)", b"\x81\x88\xff", b"\t"]
        ),
        st.binary(min_size=400, max_size=1100).map(lambda word: word.replace(b"\0", b"\x88")),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("shell", ["sh", "bash"])
@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_a_shell_is_given_the_very_bytes(shell: str, words: list[bytes]) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is missing")
    text = b"\n".join([*script.parameters(words), b'for w in "$@";do printf "%s." "$w";done'])
    done = subprocess.run([program, "-c", text], env={"LC_ALL": "C"}, capture_output=True, check=True)
    assert done.stdout == b"".join(word + b"." for word in words)


@given(words=WORDS)
def test_all_that_is_typed_is_printable_and_fits_a_terminals_line(words: list[bytes]) -> None:
    lines = script.program(words, [b"A=" + words[0]], user=b"root", cwd=b"/\xff", stdin=True)
    assert all(len(line) < 700 and all(32 <= byte < 127 for byte in line) for line in lines)
    assert not any(line.startswith((b"#", b".")) for line in lines[:-1])
    assert lines[-1] == b".%d" % len(b"\n".join(lines))
    assert all(len(batch) <= script.BATCH_BYTES for batch in script.batches(lines))


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=2000))
def test_input_is_fed_as_it_is(data: bytes) -> None:
    lines = [line.removeprefix(b"i").rstrip(b"\n") for line in script.stdin_lines(data)]
    assert all(len(line) <= script.STDIN_LINE_BYTES for line in lines)
    feeder = ["sh", "-c", 'while IFS= read -r l;do printf "$l";done']
    done = subprocess.run(feeder, input=b"".join(line + b"\n" for line in lines), capture_output=True, check=True)
    assert done.stdout == data
