"""What commands print, byte by byte where scripts written for the predecessor depend on it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

VM = {
    "name": "web",
    "state": "running",
    "cpus": 2,
    "mem_mib": 512,
    "created_at": "2026-01-02 03:04:05",
    "image": "default",
}
CHECKPOINT = {"id": "0123456789abcdef", "vm_name": "web", "label": None, "created_at": "2026-01-02 03:04:05"}


def test_create_says_the_name_and_the_state(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, VM)
    done = noid("create", "web", "--cpus", "2", "--mem", "512")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"VM 'web' created (state: running)\n", b"")
    request = agent.requests[0]
    assert request.json == {"name": "web", "cpus": 2, "mem_mib": 512}
    assert request.headers["authorization"].startswith("Bearer noid_tok_")


def test_create_takes_the_name_as_an_option_too_and_passes_the_image_on(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, VM)
    assert noid("create", "--name", "web", "--image", "mine").returncode == 0
    assert agent.requests[0].json == {"name": "web", "cpus": 1, "mem_mib": 2048, "image": "mine"}


def test_list_draws_a_rule_above_and_below_every_row(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM, VM | {"name": "a-longer-name", "cpus": 1}])
    assert noid("list").stdout.decode() == (
        "+---------------+---------+------+-----------+---------------------+\n"
        "| name          | state   | cpus | mem (MiB) | created             |\n"
        "+---------------+---------+------+-----------+---------------------+\n"
        "| web           | running | 2    | 512       | 2026-01-02 03:04:05 |\n"
        "+---------------+---------+------+-----------+---------------------+\n"
        "| a-longer-name | running | 1    | 512       | 2026-01-02 03:04:05 |\n"
        "+---------------+---------+------+-----------+---------------------+\n"
    )


def test_an_empty_list_is_a_sentence_and_with_json_an_empty_array(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [])
    assert noid("list").stdout == b"No VMs found.\n"
    assert noid("list", "--json").stdout == b"[]\n"


def test_info_aligns_its_labels(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web", 200, VM)
    those_of_0_2 = "Name:    web\nState:   running\nCPUs:    2\nMemory:  512 MiB\nCreated: 2026-01-02 03:04:05\n"
    assert noid("info", "web").stdout.decode() == those_of_0_2
    agent.answers("GET", "/v1/vms/web", 200, VM | {"receipt": None})
    assert noid("info", "web").stdout.decode() == those_of_0_2 + "Receipt: -\n"


@pytest.mark.parametrize(
    ("label", "line"),
    [
        (None, "Checkpoint '0123456789abcdef' created\n"),
        ("before", "Checkpoint '0123456789abcdef' created (label: before)\n"),
    ],
)
def test_checkpoint_says_its_id_and_label(noid: Any, agent: Any, label: str | None, line: str) -> None:
    agent.answers("POST", "/v1/vms/web/checkpoints", 201, CHECKPOINT | {"label": label})
    done = noid("checkpoint", "web", *(["--label", label] if label else []))
    assert done.stdout.decode() == line
    assert agent.requests[0].json == ({"label": label} if label else {})


def test_checkpoints_shows_a_dash_for_no_label_and_no_escape_sequence_reaches_the_terminal(
    noid: Any, agent: Any
) -> None:
    nasty = CHECKPOINT | {"label": "\x1b[31m日本\n"}
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [CHECKPOINT, nasty])
    assert noid("checkpoints", "web").stdout.decode() == (
        "+------------------+----------------+---------------------+\n"
        "| id               | label          | created             |\n"
        "+------------------+----------------+---------------------+\n"
        "| 0123456789abcdef | -              | 2026-01-02 03:04:05 |\n"
        "+------------------+----------------+---------------------+\n"
        "| 0123456789abcdef | \\x1b[31m日本\\n | 2026-01-02 03:04:05 |\n"
        "+------------------+----------------+---------------------+\n"
    )


def test_no_checkpoints_is_a_sentence(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [])
    assert noid("checkpoints", "web").stdout == b"No checkpoints for VM 'web'.\n"


def test_restore_says_which_vm_came_from_which_checkpoint(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms/web/restore", 200, VM | {"name": "copy"})
    done = noid("restore", "web", "0123456789abcdef", "--as", "copy")
    assert done.stdout == b"VM 'copy' restored from checkpoint '0123456789abcdef'\n"
    assert agent.requests[0].json == {"checkpoint_id": "0123456789abcdef", "new_name": "copy"}


def test_destroy_says_so(noid: Any, agent: Any) -> None:
    agent.answers("DELETE", "/v1/vms/web", 204)
    assert noid("destroy", "web").stdout == b"VM 'web' destroyed\n"
    assert noid("destroy", "web", "-q").stdout == b"web\n"


def test_destroy_ends_every_vm_that_is_named_whatever_becomes_of_one(noid: Any, agent: Any) -> None:
    for name in ("web", "db"):
        agent.answers("DELETE", f"/v1/vms/{name}", 204)
    done = noid("destroy", "web", "nope", "db", "web")
    assert (done.returncode, done.stdout.decode()) == (1, "VM 'web' destroyed\nVM 'db' destroyed\n")
    assert done.stderr.decode().startswith("Error: server error (404)")
    assert [request.path for request in agent.requests if request.method == "DELETE"] == [
        "/v1/vms/web",
        "/v1/vms/nope",
        "/v1/vms/db",
    ]


def test_whoami_shows_name_and_id(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/whoami", 200, {"user_id": "0198-x", "name": "ada"})
    assert noid("whoami").stdout == b"User: ada\nID:   0198-x\n"


def test_whoami_shows_what_the_token_allows_where_the_server_tells(noid: Any, agent: Any) -> None:
    told = {"user_id": "0198-x", "name": "ada", "token": "ci", "scopes": ["read", "exec"]}
    agent.answers("GET", "/v1/whoami", 200, told)
    assert noid("whoami").stdout == b"User: ada\nID:   0198-x\nToken: ci (read, exec)\n"


def test_use_and_current_name_the_vm_of_this_directory(noid: Any, agent: Any) -> None:
    assert noid("current").stdout.decode() == f"Server: {agent.url}\nActive VM: (none — run `noid use <name>`)\n"
    assert noid("use", "web").stdout == b"Active VM set to 'web'\n"
    assert (noid.cwd / ".noid-vm").read_text() == "web\n"
    assert noid("current").stdout.decode() == f"Server: {agent.url}\nActive VM: web\n"


def test_every_command_speaks_json_with_the_option_before_or_after_it(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, VM)
    agent.answers("GET", "/v1/vms", 200, [VM])
    agent.answers("GET", "/v1/vms/web", 200, VM)
    agent.answers("DELETE", "/v1/vms/web", 204)
    agent.answers("POST", "/v1/vms/web/checkpoints", 201, CHECKPOINT)
    agent.answers("GET", "/v1/vms/web/checkpoints", 200, [CHECKPOINT])
    agent.answers("POST", "/v1/vms/web/restore", 200, VM)
    agent.answers("GET", "/v1/whoami", 200, {"user_id": "1", "name": "ada"})

    def said(*args: str) -> Any:
        done = noid(*args)
        assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 1)
        return json.loads(done.stdout)

    assert said("--json", "create", "web") == VM
    assert said("list", "--json") == [VM]
    assert said("info", "web", "--json") == VM
    assert said("destroy", "web", "--json") == {"name": "web", "destroyed": True}
    assert said("checkpoint", "web", "--json") == CHECKPOINT
    assert said("checkpoints", "web", "--json") == [CHECKPOINT]
    assert said("restore", "web", CHECKPOINT["id"] or "", "--json") == VM
    assert said("whoami", "--json") == {"user_id": "1", "name": "ada"}
    assert said("use", "web", "--json") == {"active_vm": "web", "file": str(noid.cwd / ".noid-vm")}
    assert said("--json", "current") == {"server": agent.url, "active_vm": "web"}


def test_the_version_is_one_line(offline_noid: Any) -> None:
    from noid import __version__

    assert offline_noid("--version").stdout == offline_noid("-V").stdout == f"noid {__version__}\n".encode()


def test_help_names_every_command_and_fits_a_screen(offline_noid: Any) -> None:
    from noid.cli.main import COMMANDS

    shown = offline_noid("--help").stdout.decode()
    assert set(COMMANDS) <= set(shown.split("Commands:")[1].split("Options")[0].split())
    assert shown.count("\n") <= 24
    assert max(map(len, shown.splitlines())) <= 80
    everything = offline_noid("help").stdout.decode()
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", everything, re.MULTILINE), name
    assert offline_noid("help", "auth", "list").stdout.startswith(b"Usage: noid auth list")


@pytest.mark.parametrize(("verb", "state"), [("pause", "paused"), ("resume", "running")])
def test_pause_and_resume_say_the_state_of_each_vm_that_is_named(noid: Any, agent: Any, verb: str, state: str) -> None:
    for name in ("web", "db"):
        agent.answers("POST", f"/v1/vms/{name}/{verb}", 200, VM | {"name": name, "state": state})
    done = noid(verb, "web", "db")
    assert (done.returncode, done.stdout.decode()) == (0, f"VM 'web' is {state}\nVM 'db' is {state}\n")
    assert [request.path for request in agent.requests] == [f"/v1/vms/web/{verb}", f"/v1/vms/db/{verb}"]


# --- --timing --------------------------------------------------------------------------------------------------------


def test_timing_prints_the_phases_of_the_server_and_the_round_trip_on_stderr(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, VM | {"timings": {"reserve": 0.0012, "wake": 0.0341}})
    agent.answers("GET", "/v1/vms", 200, [VM])
    done = noid("create", "web", "--timing")
    assert done.stdout == b"VM 'web' created (state: running)\n"
    reserve, wake, total = done.stderr.decode().splitlines()
    assert (reserve, wake) == ("reserve           1.2 ms", "wake             34.1 ms")
    assert re.fullmatch(r"round trip +\d+\.\d ms  POST /v1/vms", total)
    assert re.fullmatch(rb"round trip +\d+\.\d ms  GET /v1/vms\n", noid("list", "--timing").stderr)
    done = noid("create", "web", "--timing", "--json")
    assert (json.loads(done.stdout)["timings"], done.stderr) == ({"reserve": 0.0012, "wake": 0.0341}, b"")


def test_timing_of_a_command_is_how_long_it_took_to_start_and_to_run(noid: Any, agent: Any) -> None:
    def script(exchange: Any) -> None:
        exchange.request()
        exchange.send_json(process="8f0a12bc", lineage="1", pid=7, offset=0, stdin=None)
        exchange.end(0)

    agent.runs(script)
    lines = noid("exec", "web", "--timing", "--", "true").stderr.decode().splitlines()
    assert [re.sub(r" +\d+\.\d ms", "", line) for line in lines] == ["start", "run", "round trip  exec on web"]
    done = noid("exec", "web", "--timing", "--json", "--", "true")
    assert json.loads(done.stdout)["timings"].keys() == {"start", "run"}
    agent.runs(lambda exchange: (exchange.request(), exchange.end(0)))  # as servers before 0.3.0
    assert noid("exec", "web", "--timing", "--", "true").stderr.count(b"\n") == 1


def test_quiet_prints_the_one_word_a_script_goes_on_with(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/whoami", 200, {"user_id": "0198-x", "name": "ada"})
    agent.answers("POST", "/v1/vms/web/processes/8f0a12bc/signal", 204)
    for args, said in (
        (["use", "web"], "web"),
        (["current"], "web"),
        (["whoami"], "ada"),
        (["kill", "web", "8f0a12bc"], "8f0a12bc"),
    ):
        assert noid(*args, "-q").stdout.decode() == f"{said}\n"
