"""``noid auth``: where a token comes from, where it never shows, and several servers side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TOKEN = "noid_tok_" + "ab" * 32


@pytest.fixture
def server(offline_noid: Any, agent: Any) -> Any:
    agent.answers("GET", "/v1/whoami", 200, {"user_id": "u1", "name": "alice"})
    agent.answers("GET", "/v1/vms", 200, [])
    return agent


def token_seen_by(agent: Any) -> str | None:
    authorization: str | None = agent.requests[-1].headers.get("authorization")
    return None if authorization is None else authorization.removeprefix("Bearer ")


def test_the_output_is_that_of_the_predecessor(offline_noid: Any, server: Any) -> None:
    done = offline_noid("auth", "setup", "--url", f" {server.url}/ ", "--token", TOKEN)
    config = offline_noid.home / ".noid" / "config.toml"
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == (
        f"Configuration saved to {config}.\nServer: {server.url}\nAuthenticated as 'alice' (id: u1)\n"
    )
    assert offline_noid("list").returncode == 0
    assert token_seen_by(server) == TOKEN


@pytest.mark.parametrize("options", [(), ("--token", "-")])
def test_a_token_comes_from_a_pipe(offline_noid: Any, server: Any, options: tuple[str, ...]) -> None:
    done = offline_noid("auth", "setup", "--url", server.url, *options, stdin=f"{TOKEN}\n".encode())
    assert done.returncode == 0
    assert token_seen_by(server) == TOKEN


def test_a_token_comes_from_the_environment_before_stdin_is_looked_at(offline_noid: Any, server: Any) -> None:
    assert offline_noid("auth", "setup", "--url", server.url, stdin=b"else", NOID_TOKEN=TOKEN).returncode == 0
    assert token_seen_by(server) == TOKEN


def test_somebody_at_a_terminal_is_asked_and_does_not_see_the_token(
    person: Any, offline_noid: Any, server: Any
) -> None:
    with person(offline_noid, "auth", "setup") as someone:
        someone.sees(b"Server: ")
        someone.types(server.url.encode() + b"\r")
        someone.sees(b"Token: ")
        someone.types(TOKEN.encode() + b"\r")
        shown = someone.sees(b"Authenticated as 'alice'")
        assert TOKEN.encode() not in shown
        assert someone.running.wait(20) == 0
        assert someone.has_the_terminal_back()
    assert token_seen_by(server) == TOKEN


def test_ctrl_c_at_the_question_saves_nothing(person: Any, offline_noid: Any, server: Any) -> None:
    with person(offline_noid, "auth", "setup", "--url", server.url) as someone:
        someone.sees(b"Token: ")
        someone.types(b"\x04")
        assert someone.running.wait(20) == 130
        assert someone.has_the_terminal_back()
    assert not (offline_noid.home / ".noid").exists()


def test_a_token_typed_on_the_command_line_is_commented_on_a_terminal(
    person: Any, offline_noid: Any, server: Any
) -> None:
    with person(offline_noid, "auth", "setup", "--url", server.url, "--token", TOKEN) as someone:
        someone.sees(b"Note: other users see what is typed on the command line")
        someone.sees(b"Authenticated as 'alice'")


@pytest.mark.parametrize("stdin", [b"", b"\n", b" \n \n"])
def test_no_token_at_all_is_wrong_usage_and_saves_nothing(offline_noid: Any, server: Any, stdin: bytes) -> None:
    done = offline_noid("auth", "setup", "--url", server.url, stdin=stdin)
    assert done.returncode == 2
    assert b"Missing the token" in done.stderr
    assert not (offline_noid.home / ".noid").exists()


@pytest.mark.parametrize(
    ("stdin", "said"),
    [(b"two secrets", b"copied completely?"), (b"\xff\xfe", b"copied completely?"), (b"x" * 9999999, b"much longer")],
)
def test_what_is_no_token_is_refused_without_being_shown(
    offline_noid: Any, server: Any, stdin: bytes, said: bytes
) -> None:
    done = offline_noid("auth", "setup", "--url", server.url, "--token", "-", stdin=stdin)
    assert done.returncode == 1
    assert said in done.stderr
    assert stdin[:10] not in done.stderr
    assert not (offline_noid.home / ".noid").exists()


def test_a_server_that_does_not_answer_is_saved_with_a_warning(offline_noid: Any) -> None:
    done = offline_noid("auth", "setup", "--url", "http://127.0.0.1:9", "--token", TOKEN)
    assert done.returncode == 0
    assert done.stdout.endswith(b"Server: http://127.0.0.1:9\n")
    assert done.stderr.startswith(b"Warning: could not verify connection to http://127.0.0.1:9: ")
    assert TOKEN.encode() not in done.stderr


def test_several_servers_are_kept_and_one_switches_between_them(offline_noid: Any, server: Any) -> None:
    offline_noid("auth", "setup", "--url", server.url, "--as", "work", stdin=b"one")
    offline_noid("auth", "setup", "--url", f"{server.url}/other", "--as", "home", stdin=b"two")
    shown = offline_noid("auth", "list")
    assert f"| work  | {server.url}".encode() in shown.stdout
    assert b"one" not in shown.stdout
    assert offline_noid("auth", "list", "-q").stdout == b"work\nhome\nlocal\n"
    assert [each["name"] for each in json.loads(offline_noid("auth", "list", "--json").stdout) if each["in_use"]] == [
        "home"
    ]
    assert offline_noid("auth", "switch", "work").stdout == f"Server: {server.url}\n".encode()
    offline_noid("list")
    assert (server.requests[-1].path.partition("?")[0], token_seen_by(server)) == ("/v1/vms", "one")
    offline_noid("list", "--server", "home")
    assert (server.requests[-1].path.partition("?")[0], token_seen_by(server)) == ("/other/v1/vms", "two")
    offline_noid("list", NOID_SERVER="home")
    assert token_seen_by(server) == "two"
    assert offline_noid("auth", "logout", "home").stdout == b"Server 'home' forgotten\n"
    assert b"Commands use this user's own agent now" in offline_noid("auth", "logout").stdout
    assert offline_noid("auth", "list", "-q").stdout == b"local\n"
    assert offline_noid("auth", "logout").returncode == 1


def test_what_wins_over_the_choice_is_said(offline_noid: Any, server: Any) -> None:
    offline_noid("auth", "setup", "--url", server.url, stdin=b"one")
    done = offline_noid("auth", "switch", "local", NOID_URL="http://elsewhere")
    assert b"NOID_URL is set, and commands use that: http://elsewhere" in done.stderr


def test_forgetting_a_server_is_asked_about_at_a_terminal(person: Any, offline_noid: Any, server: Any) -> None:
    offline_noid("auth", "setup", "--url", server.url, "--as", "work", stdin=b"one")
    with person(offline_noid, "auth", "logout", "work") as someone:
        someone.sees(b"Forget the server 'work'")
        someone.types(b"n\r")
        assert someone.running.wait(20) == 1
    assert offline_noid("auth", "list", "-q").stdout == b"work\nlocal\n"


def test_a_file_others_can_read_is_warned_of_on_a_terminal_only(person: Any, offline_noid: Any, server: Any) -> None:
    offline_noid("auth", "setup", "--url", server.url, stdin=b"one")
    config: Path = offline_noid.home / ".noid" / "config.toml"
    config.chmod(0o644)
    assert offline_noid("list").stderr == b""
    with person(offline_noid, "list") as someone:
        someone.sees(b"Warning: other users can read " + str(config).encode())
        someone.sees(b"No VMs found.")
