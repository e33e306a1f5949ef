"""Wrong servers, broken files, closed pipes: one paragraph that says what to do, and the right exit code."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import pytest

PATIENCE_SECS = 20.0
VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}


def one_paragraph(done: Any, code: int = 1) -> str:
    assert done.returncode == code
    assert done.stdout == b""
    text = done.stderr.decode()
    assert text.startswith("Error: ")
    assert "Traceback" not in text
    return str(text)


def test_the_server_s_own_words_are_shown_with_its_status(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web", 404, {"error": "VM 'web' not found", "code": "not_found"})
    assert (
        one_paragraph(noid("info", "web"))
        == "Error: server error (404): VM 'web' not found. See which there are with: noid list\n"
    )


def test_a_wrong_token_says_how_to_set_one(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 401, {"error": "invalid token"})
    text = one_paragraph(noid("list"))
    assert "server error (401): invalid token. It may have expired or been revoked. Check NOID_TOKEN" in text
    assert "noid auth setup" in text


def test_nobody_listening_is_said_with_the_address(noid: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        text = one_paragraph(noid("--server", url, "list"))
    assert "connection error:" in text
    assert url in text
    assert "refused" in text


def test_an_unknown_host_is_said_by_name(noid: Any) -> None:
    assert "'no-such-host.invalid'" in one_paragraph(noid("--server", "http://no-such-host.invalid", "list"))


def test_a_web_page_from_a_proxy_is_not_dumped(noid: Any, agent: Any) -> None:
    page = b"<html><body>" + b"sorry " * 1000 + b"</body></html>"
    head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page)
    agent.answers_raw(head + page)
    text = one_paragraph(noid("list"))
    assert "server error (502)" in text
    assert "web page" in text
    assert len(text) < 400


def test_a_login_page_with_status_200_is_not_taken_for_an_answer(noid: Any, agent: Any) -> None:
    agent.answers_raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>log in</html>")
    assert "something noid-server would not" in one_paragraph(noid("list"))


def test_a_list_where_an_object_belongs_is_not_taken_for_an_answer(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web", 200, ["web"])
    assert "something noid-server would not" in one_paragraph(noid("info", "web"))


def test_a_server_that_is_no_http_server_is_said_to_be_one(noid: Any, agent: Any) -> None:
    agent.answers_raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    assert "does not speak HTTP" in one_paragraph(noid("list"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n[{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n[",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
    ],
)
def test_an_answer_that_breaks_off_is_a_connection_error(noid: Any, agent: Any, answer: bytes) -> None:
    agent.answers_raw(answer)
    assert "connection error:" in one_paragraph(noid("list"))


def test_a_newer_api_is_refused_with_both_versions(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [], X_Noid_Api_Version="2")
    text = one_paragraph(noid("list"))
    assert "'2'" in text
    assert "version 1" in text


def test_a_server_without_the_version_header_is_fine(noid: Any, agent: Any) -> None:
    agent.answers_raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n2;x=y\r\n[]\r\n0\r\nA: b\r\n\r\n"
    )
    assert noid("list").stdout == b"No VMs found.\n"


def test_a_redirect_is_not_followed_but_shown(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 301, None, Location="https://elsewhere.example/v1/vms")
    assert "https://elsewhere.example/v1/vms" in one_paragraph(noid("list"))


def test_a_path_in_the_url_is_put_before_every_request(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/behind/a/proxy/v1/vms", 200, [])
    assert noid("--server", f"{agent.url}/behind/a/proxy/", "list").returncode == 0


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:y", "http://a b", "x.example", "http://x?q=1"])
def test_what_is_no_url_is_refused(noid: Any, url: str) -> None:
    done = noid("auth", "setup", "--url", url, "--token", "x")
    assert "is not a server URL" in one_paragraph(done)
    assert not (noid.home / ".noid").exists()


def test_a_broken_config_file_is_named_with_line_and_column_and_use_still_works(offline_noid: Any) -> None:
    config = offline_noid.home / ".noid" / "config.toml"
    config.parent.mkdir()
    config.write_text("[server]\nurl = oops\n")
    text = one_paragraph(offline_noid("list"))
    assert str(config) in text
    assert "line 2, column 7" in text
    assert offline_noid("use", "web").returncode == 0


def test_a_config_file_that_cannot_be_read_is_said_with_the_reason(offline_noid: Any) -> None:
    config = offline_noid.home / ".noid" / "config.toml"
    config.parent.mkdir()
    config.write_bytes(b"[server]\n\xff")
    advice = "Repair or remove it, or use --local.\n"
    said = one_paragraph(offline_noid("list"))
    assert said == f"Error: cannot read {config}: it is no text (byte 10 is not UTF-8). {advice}"
    config.unlink()
    config.mkdir()
    assert one_paragraph(offline_noid("list")) == f"Error: cannot read {config}: Is a directory. {advice}"


def test_a_token_that_cannot_be_one_is_refused_without_being_repeated(noid: Any, agent: Any) -> None:
    done = noid("list", NOID_TOKEN="secret\r\nX-Evil: 1")
    assert "secret" not in one_paragraph(done)
    assert agent.requests == []


def test_local_and_server_exclude_each_other(noid: Any) -> None:
    assert noid("--local", "--server", "http://x", "list").returncode == 2


@pytest.mark.parametrize(
    ("args", "usage"),
    [
        (["nope"], "noid [OPTIONS] COMMAND [ARGS]..."),
        (["list", "surplus"], "noid list [OPTIONS]"),
        (["create", "x", "--cpus", "two"], "noid create [OPTIONS]"),
        (["auth", "setup", "--nope"], "noid auth setup [OPTIONS]"),
        (["auth", "nope"], "noid auth [OPTIONS]"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_the_usage_and_where_more_is_said(
    noid: Any, args: list[str], usage: str
) -> None:
    _, line, more = one_paragraph(noid(*args), 2).splitlines()
    assert line.startswith(f"Usage: {usage}")
    assert more == f"See: {usage.split(' [')[0]} --help"


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["lsit"], "'list'"),
        (["ls"], "'list'"),
        (["chekpoint", "web"], "'checkpoint' or 'checkpoints'"),
        (["snapshot", "web"], "'checkpoint'"),
        (["help", "chekpoints"], "'checkpoints' or 'checkpoint'"),
        (["auth", "lst"], "'list'"),
        (["list", "--jsno"], "'--json'"),
        (["--servr", "x", "list"], "'--server'"),
    ],
)
def test_who_mistypes_a_command_or_an_option_is_asked_what_was_meant(noid: Any, args: list[str], meant: str) -> None:
    assert one_paragraph(noid(*args), 2).splitlines()[0].endswith(f" Did you mean {meant}?")


def test_who_mistypes_a_vm_is_asked_which_was_meant(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM, VM | {"name": "web-2"}, VM | {"name": "database"}])
    agent.answers("GET", "/v1/vms/wbe", 404, {"error": "VM 'wbe' not found", "code": "not_found"})
    assert one_paragraph(noid("info", "wbe")) == (
        "Error: server error (404): VM 'wbe' not found. Did you mean 'web'? See which there are with: noid list\n"
    )
    agent.answers("GET", "/v1/vms/mail", 404, {"error": "VM 'mail' not found", "code": "not_found"})
    assert "Did you mean" not in one_paragraph(noid("info", "mail"))


def test_who_mistypes_a_checkpoint_or_an_image_is_asked_which_was_meant(noid: Any, agent: Any) -> None:
    point = {"id": "0123456789abcdef", "vm_name": "web", "label": "before-upgrade", "created_at": "2026-01-02 03:04:05"}
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [point])
    agent.answers("GET", "/v1/checkpoints", 200, [point])
    agent.answers("POST", "/v1/vms/web/restore", 404, {"error": "checkpoint '0123456789abcdee' not found"})
    assert "Did you mean '0123456789abcdef'?" in one_paragraph(noid("restore", "web", "0123456789abcdee"))
    there_is = "there is no image 'defualt' (there is: default, tiny). Make one."
    agent.answers("POST", "/v1/vms", 404, {"error": there_is, "code": "not_found"})
    assert one_paragraph(noid("create", "web", "--image", "defualt")).endswith("Make one. Did you mean 'default'?\n")


def test_a_server_that_does_not_say_what_there_is_keeps_no_error_waiting(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/wbe", 404, {"error": "VM 'wbe' not found", "code": "not_found"})
    said = "Error: server error (404): VM 'wbe' not found. See which there are with: noid list\n"
    assert one_paragraph(noid("info", "wbe")) == said  # it answers 404 to what there is
    answer, released = agent.answer_of, threading.Event()

    def silent(method: str, path: str) -> bytes:
        if path == "/v1/vms":
            released.wait(PATIENCE_SECS)
        return bytes(answer(method, path))

    agent.answer_of = silent
    began = time.monotonic()
    try:
        assert one_paragraph(noid("info", "wbe")) == said
        assert time.monotonic() - began < PATIENCE_SECS / 2
    finally:
        released.set()


def test_no_command_at_all_shows_the_help_and_is_wrong_usage(offline_noid: Any) -> None:
    done = offline_noid()
    assert done.returncode == 2
    assert b"Commands:" in done.stderr


def test_a_reader_that_leaves_early_ends_a_listing_in_silence(noid: Any, agent: Any) -> None:
    vm = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}
    agent.answers("GET", "/v1/vms", 200, [vm] * 5000)
    done = noid.sh("noid list | head -1; echo ${PIPESTATUS[0]}")
    rule, code = done.stdout.decode().splitlines()
    assert rule.startswith("+--")
    assert code == "141"
    assert done.stderr == b""


def test_a_full_disk_under_the_output_is_an_error(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [])
    done = noid.sh("noid list > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"Error: cannot write the output: No space left on device.\n"


def test_closed_standard_streams_do_no_harm(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [])
    done = noid.sh("noid list <&- >&- 2>&-")
    assert done.returncode == 0

    def script(exchange: Any) -> None:
        exchange.request()
        exchange.send(1, b"output for nobody")
        assert exchange.receive() == ("binary", b"\x03")  # the input has ended, and is not our own socket
        exchange.end(0)

    agent.runs(script)
    assert noid.sh("noid exec web -i -- cat <&- >&-").returncode == 0


def test_nobody_to_tell_changes_no_exit_code(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM])
    for elsewhere in ("2>&-", "2>/dev/full", "2> >(true)"):
        done = noid.sh(f"noid list --nope {elsewhere}; echo $?; noid info nope {elsewhere}; echo $?")
        assert (done.stdout, done.stderr) == (b"2\n1\n", b""), elsewhere
    assert noid.sh("noid list --json > /dev/full 2>&1; echo $?").stdout == b"1\n"
    done = noid.sh("noid info nope >&-; echo $?; noid current >&- 2>&-; echo $?")
    assert (done.stdout, done.stderr.count(b"Error: ")) == (b"1\n0\n", 1)


@pytest.mark.parametrize(
    "env",
    [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
)
def test_every_locale_can_show_every_name(noid: Any, agent: Any, env: dict[str, str]) -> None:
    label = {"id": "0123456789abcdef", "vm_name": "web", "label": "日本", "created_at": "2026-01-02 03:04:05"}
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [label])
    done = noid("checkpoints", "web", **env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "日本".encode() in done.stdout or b"\\u65e5\\u672c" in done.stdout
    assert noid("current", **env).returncode == 0
    assert one_paragraph(noid("info", "日本", **env))


def test_words_that_are_no_text_are_an_error_like_others(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms/web/checkpoints", 400, {"error": "label must be valid UTF-8"})
    for args in (
        [b"info", b"w\xffb"],
        [b"create", b"web", b"--image", b"\xff"],
        [b"checkpoint", b"web", b"--label", b"\xff"],
        [b"restore", b"web", b"\xff\xfe"],
        [b"--server", b"http://\xff", b"list"],
        [b"use", b"\xff"],
    ):
        one_paragraph(noid(*args))
    for args in ([b"\xff"], [b"list", b"--\xff"], [b"create", b"web", b"--cpus", b"\xff"], [b"list", b"\xff"]):
        one_paragraph(noid(*args), 2)


def test_a_directory_that_is_gone_and_a_home_that_cannot_be_written_are_said(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [])
    gone = 'mkdir gone && cd gone && rmdir "$PWD"; '
    assert noid.sh(gone + "noid list").stdout == b"No VMs found.\n"
    for args, said in (("use web", b"Error: cannot write .noid-vm: "), ("info", b"Error: no VM specified")):
        done = noid.sh(f"{gone}noid {args}")
        assert (done.returncode, done.stderr.splitlines()[-1].startswith(said)) == (1, True), done.stderr
    (noid.home / ".noid").write_text("a file where the directory would be")
    setup = ("auth", "setup", "--url", agent.url, "--token", "x")
    assert str(noid.home) in one_paragraph(noid(*setup))
    assert "HOME" in one_paragraph(noid(*setup, HOME=""))
    assert "/proc/nowhere" in one_paragraph(noid(*setup, HOME="/proc/nowhere"))


def test_ctrl_c_ends_a_command_shortly(noid: Any, agent: Any) -> None:
    asked, answer = threading.Event(), agent.answer_of

    def never(method: str, path: str) -> bytes:
        asked.set()
        released.wait(PATIENCE_SECS)
        return bytes(answer(method, path))

    agent.answer_of = never
    for args, said in ((["list"], b""), (["create", "web"], b"Interrupted. What the server has begun it finishes.\n")):
        released = threading.Event()
        asked.clear()
        with noid.start(*args, stdout=-1, stderr=-1) as running:
            assert asked.wait(PATIENCE_SECS)
            os.kill(running.pid, signal.SIGINT)
            output = running.communicate(timeout=PATIENCE_SECS)
            released.set()
        assert (running.returncode, *output) == (130, b"", said)
