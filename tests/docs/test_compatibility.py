"""docs/compatibility.md is true: what it calls accepted is, and what it calls refused is refused with that hint."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest

from noid.cli import main as noid_cli
from noid.cli import new_vm
from noid.core.config.reading import load_config
from noid.core.config.settings import Config
from noid.errors import ConfigError
from noid.server import command as server_command
from noid.server.serve import all_routes

Pages = Callable[[str], Any]
PAGE = "docs/compatibility.md"
ROOT = Path(__file__).parents[2]
PROGRAMS: dict[str, click.Command] = {"noid": noid_cli.cli, "noid-server": server_command.cli}


def parsed(line: str) -> None:
    """Parse a command line as the program would, without running anything but callbacks."""
    name, *arguments = shlex.split(line)
    command: click.Command = PROGRAMS[name]
    context = command.make_context(name, arguments)
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(found.name, rest, parent=context)


def test_every_path_leads_where_the_page_says(page: Pages) -> None:
    paths = {path: route.path for route in all_routes(Mock(), Mock(), Mock()) for path in route.paths}
    for path, meant in page(PAGE).rows("path", "is"):
        assert paths[path] == meant


def test_every_command_is_accepted(page: Pages) -> None:
    for line, _ in page(PAGE).rows("command", "since, or in"):
        parsed(line)


def test_what_is_refused_is_refused_with_its_hint(page: Pages, tmp_path: Path) -> None:
    for text, hint in page(PAGE).rows("typed or written", "hint"):
        if text.partition(" ")[0] in PROGRAMS:
            with pytest.raises(click.UsageError, match=re.escape(hint)):
                parsed(text)
        else:
            (tmp_path / "server.toml").write_text(text)
            with pytest.raises(ConfigError) as refused:
                load_config(tmp_path / "server.toml")
            assert hint in str(refused.value)


# --- item by item ------------------------------------------------------------------------------------------------

HERE = "tests/docs/test_compatibility.py::"
PATHS = HERE + "test_every_path_leads_where_the_page_says"
COMMANDS = HERE + "test_every_command_is_accepted"
REFUSED = HERE + "test_what_is_refused_is_refused_with_its_hint"
NUMBERS = HERE + "test_numbers_are_those_of_the_code"
TRANSCRIPTS = "tests/server/test_transcripts.py::test_what_a_transcript_says_happens"

HELD_BY: dict[str, tuple[str, ...]] = {
    "architecture": ("tests/client/test_local_agent.py::*", "tests/cli/test_with_the_real_server.py::*"),
    "health path": (PATHS, TRANSCRIPTS),
    "version path": (TRANSCRIPTS,),
    "REST prefix": (PATHS, TRANSCRIPTS),
    "console endpoint": (PATHS, TRANSCRIPTS),
    "exec endpoint": (PATHS, TRANSCRIPTS),
    "log streaming": (PATHS, TRANSCRIPTS),
    "file transfer": ("tests/stories/test_copying.py::*",),
    "exec transport": ("tests/stories/test_exec.py::*", "tests/stories/test_serial_exec.py::*"),
    "exit code of exec": (
        "tests/stories/test_exec.py::test_exit_codes_and_signals_come_out_as_a_shell_shows_them",
        "tests/stories/test_machines_that_end.py::test_a_command_whose_machine_is_killed_is_125",
    ),
    "exec VM name": (COMMANDS, "tests/cli/test_which_vm.py::*"),
    "checkpoint/restore VM name": (COMMANDS, "tests/cli/test_which_vm.py::*"),
    "active VM marker": (
        "tests/cli/test_which_vm.py::test_without_an_argument_the_directory_s_marker_decides",
        "tests/cli/test_which_vm.py::test_a_directory_called_noid_is_no_marker",
    ),
    "detach console": ("tests/cli/test_console_command.py::*", "tests/server/test_predecessor_client.py::*"),
    "env flag": (COMMANDS, REFUSED),
    "shell completion": ("tests/cli/test_completion.py::*",),
    "default memory": (NUMBERS,),
    "list columns": ("tests/cli/test_output_templates.py::test_list_draws_a_rule_above_and_below_every_row",),
    "create `--kernel/--rootfs`, `config set`": (
        COMMANDS,
        REFUSED,
        "tests/cli/test_config_command.py::test_kernel_and_rootfs_together_become_the_default_image_of_this_machine",
        "tests/core/test_configured_image.py::*",
    ),
    "checkpoint id": (TRANSCRIPTS,),
    "delete of VM": (TRANSCRIPTS, "tests/stories/test_power.py::*"),
    "server config shape": (
        "tests/core/test_config.py::test_the_flat_keys_of_the_predecessor_are_understood",
        "tests/core/test_config.py::test_the_sections_of_the_other_manual_are_understood",
    ),
    "config default path": ("tests/core/test_config.py::test_the_nearest_file_is_taken",),
    "config keys of the website": (
        "tests/core/test_config.py::test_the_sections_of_the_other_manual_are_understood",
        HERE + "test_a_server_toml_of_each_manual_is_read",
    ),
    "start command": (
        COMMANDS,
        "tests/server/test_command.py::test_without_a_command_it_serves_and_says_which_file_it_took",
    ),
    "default port": (NUMBERS,),
    "user commands": (COMMANDS, "tests/server/test_command.py::test_the_same_under_the_names_of_the_other_manual"),
    "token format": ("tests/server/test_command.py::test_users_and_their_tokens",),
    "token compare": ("tests/auth/test_auth_token.py::test_nothing_but_the_exact_token_gets_in",),
    "rate limit": (TRANSCRIPTS,),
    "status codes": ("tests/server/test_transcripts.py::test_every_answer_of_a_route_is_in_a_transcript",),
    "404/409/400 rules": (TRANSCRIPTS,),
    "destroy of unknown VM": (TRANSCRIPTS, "tests/server/test_predecessor_client.py::*"),
    "data layout": ("tests/core/test_restart.py::*",),
    "metadata store": (
        "tests/core/test_store.py::*",
        "tests/core/test_changing.py::test_a_lost_database_is_rebuilt_with_names_and_labels",
    ),
    "VM states": ("tests/core/test_states.py::*",),
    "VM info fields": (TRANSCRIPTS,),
    "golden directory": ("tests/core/test_templates.py::*",),
    "network model": ("tests/network/test_net_user.py::*",),
    "IP after restore": (
        "tests/network/test_net_user.py::test_every_instance_gets_the_same_lease_because_each_is_alone_on_its_network",
    ),
    "memory copy on btrfs": ("tests/stories/test_clones.py::test_a_clone_copies_neither_memory_nor_disk",),
    "old-checkpoint cleanup": ("tests/server/test_verbs.py::*",),
    "failed checkpoint": (
        "tests/stories/test_poor_hosts.py::test_a_full_disk_fails_create_checkpoint_and_restore_and_harms_nothing",
        TRANSCRIPTS,
    ),
    "crash recovery": ("tests/stories/test_agent_killed.py::*", "tests/core/test_kill_nine.py::*"),
    "retries": ("tests/stories/test_sessions.py::*", "tests/server/test_keys.py::*"),
    "metrics, log levels": ("tests/server/test_metrics.py::*", "tests/server/test_logformat.py::*"),
    "schema upgrade": (
        "tests/auth/test_auth_token.py::test_a_schema_is_brought_up_to_date_by_one_process_at_a_time",
        "tests/core/test_store.py::test_a_schema_of_a_newer_noid_is_refused_and_left_alone",
    ),
    "HTTPS": ("tests/cli/test_over_tls.py::*",),
    "multi-user VM names": ("tests/server/test_tenants.py::test_everybody_has_names_of_their_own",),
}
"""Which tests hold what the page says of an item; a ``*`` is all of a module."""

NOTHING_TO_HOLD = {
    "create time": "measured by noid bench",
    "checkpoint pause": "measured by noid bench",
    "netd service user/paths": "there is none",
    "server service user": "nothing in the code says one",
    "IP forwarding file": "there is none",
    "DB on installer re-run": "there is no installer",
    "platforms of client": "one platform runs the tests",
    "release asset of client": "there is none",
    "vsock device": "the tests of exec use it",
}


def test_every_item_is_held_by_tests_that_exist(page: Pages) -> None:
    items = [item for item, _ in page(PAGE).section("Item by item").rows("item", "here")]
    assert len(items) == len(set(items))
    assert set(items) == {*HELD_BY, *NOTHING_TO_HOLD}
    for name in {name for names in HELD_BY.values() for name in names}:
        path, _, test = name.partition("::")
        found = {
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        }
        assert found, name
        assert test == "*" or test in found, name


def test_numbers_are_those_of_the_code(page: Pages) -> None:
    here = dict(page(PAGE).rows("item", "here"))
    assert f"{new_vm.DEFAULT_MEM_MIB} MiB" in here["default memory"]
    host, _, port = inspect.signature(Config).parameters["listen"].default.rpartition(":")
    assert here["default port"].startswith(f"{port}, and on {host} only")


FLAT = """
kernel = "/path/to/vmlinux.bin"
rootfs = "/path/to/rootfs.ext4"
listen = "0.0.0.0:7654"
max_ws_sessions = 32
trust_forwarded_for = false
exec_timeout_secs = 30
console_timeout_secs = 3600
"""
SECTIONED = """
[server]
listen = "0.0.0.0:7654"
timeout = 30000
workers = 4
[paths]
kernel = "/path/to/vmlinux.bin"
rootfs = "/path/to/rootfs.ext4"
data_dir = "~/.noid"
[limits]
max_vms = 100
max_memory_per_vm = 4096
[logging]
level = "info" # debug, info, warn, error
"""


@pytest.mark.parametrize("text", [FLAT, SECTIONED])
def test_a_server_toml_of_each_manual_is_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(text)
    config = load_config(tmp_path / "server.toml")
    assert (str(config.kernel), str(config.rootfs)) == ("/path/to/vmlinux.bin", "/path/to/rootfs.ext4")
    assert (config.listen, config.exec_timeout_secs) == ("0.0.0.0:7654", 30)
    if text is SECTIONED:
        assert (config.limits.max_vms, config.limits.max_memory_per_vm) == (100, 4096)
        assert any("workers" in note for note in config.notes)
