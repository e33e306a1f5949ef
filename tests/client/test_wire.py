"""The exec stream's messages: what one side encodes the other decodes, and what is wrong is refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noid.core import wire
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.errors import InvalidRequest

# What a process can be given: no NUL, and bytes that are not UTF-8 as lone surrogates.
words = st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
requests = st.builds(
    ExecRequest,
    argv=st.tuples(words.filter(bool), words),
    env=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), words, max_size=3),
    cwd=st.none() | words.filter(bool),
    user=st.none() | words.filter(bool),
    stdin=st.booleans(),
    timeout_secs=st.none() | st.floats(min_value=0.001, max_value=1e6),
)
results = st.builds(
    wire.ExecResult,
    exit_code=st.none() | st.integers(0, 255),
    timed_out=st.booleans(),
    truncated=st.booleans(),
    signal=st.none() | st.integers(1, 64),
)
errors = st.builds(wire.ErrorResponse, error=st.text(), code=st.none() | st.text(min_size=1))


@given(requests)
def test_a_request_survives_the_journey_and_travels_as_ascii(request_: ExecRequest) -> None:
    text = wire.request_to_json(request_)
    assert text.isascii()
    assert wire.request_from_json(text) == request_


@given(results | errors)
def test_a_reply_survives_the_journey(reply: wire.ExecResult | wire.ErrorResponse) -> None:
    assert wire.reply_from_json(wire.reply_to_json(reply)) == reply


@given(st.integers(0, 255), st.binary())
def test_a_frame_is_its_channel_and_its_data(channel: int, data: bytes) -> None:
    assert wire.split_frame(wire.frame(channel, data)) == (channel, data)


def test_an_empty_message_belongs_to_no_channel() -> None:
    assert wire.split_frame(b"") == (0, b"")


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_a_resize_survives_the_journey(columns: int, rows: int) -> None:
    channel, data = wire.split_frame(wire.resize_frame(columns, rows))
    assert channel == wire.RESIZE
    assert wire.parse_resize(data) == (columns, rows)


def test_a_resize_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="4 bytes"):
        wire.parse_resize(b"\0\x50")


def test_a_request_has_the_predecessor_s_fields_and_no_other_unless_needed() -> None:
    assert json.loads(wire.request_to_json(ExecRequest(argv=("ls",)))) == {"command": ["ls"], "tty": False, "env": []}


def test_a_request_of_an_old_client_is_understood_and_unknown_fields_are_ignored() -> None:
    request = wire.request_from_json(b'{"command":["ls"],"colour":"red"}')
    assert request == ExecRequest(argv=("ls",))


def test_a_result_has_the_predecessor_s_three_fields_always() -> None:
    text = wire.reply_to_json(wire.ExecResult.of(ProcessExit(code=None, signal=9)))
    assert json.loads(text) == {"exit_code": 137, "timed_out": False, "truncated": False, "signal": 9}
    assert json.loads(wire.reply_to_json(wire.ExecResult.of(ProcessExit(code=0)))) == {
        "exit_code": 0,
        "timed_out": False,
        "truncated": False,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["ls"]', "expected a JSON object"),
        ("{}", "'command' must be a list of strings"),
        ('{"command":"ls"}', "'command' must be a list of strings"),
        ('{"command":["ls",1]}', "'command' must be a list of strings"),
        ('{"command":[]}', "command cannot be empty"),
        ('{"command":[""]}', "command cannot be empty"),
        ('{"command":["a\\u0000b"]}', "NUL"),
        ('{"command":["ls"],"env":{"A":"1"}}', "'env' must be a list of strings"),
        ('{"command":["ls"],"env":["A"]}', "KEY=VALUE"),
        ('{"command":["ls"],"tty":1}', "'tty' must be true or false"),
        ('{"command":["ls"],"stdin":"yes"}', "'stdin' must be true or false"),
        ('{"command":["ls"],"user":""}', "'user' must be a string"),
        ('{"command":["ls"],"cwd":7}', "'cwd' must be a string"),
        ('{"command":["ls"],"timeout_secs":0}', "'timeout_secs' must be a number"),
        ('{"command":["ls"],"timeout_secs":true}', "'timeout_secs' must be a number"),
        ('{"command":["ls"],"timeout_secs":NaN}', "'timeout_secs' must be a number"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        wire.request_from_json(text)


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", '{"error":1}', '{"timed_out":1,"truncated":0}', '{"event":"x"}'])
def test_a_message_of_another_kind_is_no_reply(text: str) -> None:
    assert wire.reply_from_json(text) is None


def test_the_codec_imports_neither_a_framework_nor_a_command_line() -> None:
    program = (
        "import sys, noid.core.wire; print(sorted({'trio','click','pluggy','wsproto','socket'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[]\n"
