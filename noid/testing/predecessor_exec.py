"""How the predecessor ran a command: typed at a prompt, the output found between its marks; here by a bash."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from noid.client.serial_output import MARK

OUTPUT_BYTES_MAX = 1 << 20
_ANSI = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|.)")


def type_command(command: Sequence[str], env: Sequence[str], timeout_secs: float) -> tuple[str, dict[str, Any]]:
    """Run *command* with the variables *env*, ``KEY=VALUE`` each; return what is found of its output, and the result.

    Output that does not end its last line swallows the mark with the exit code, which is then not known.
    """
    words = [f"{key}={shlex.quote(value)}" for key, _, value in (entry.partition("=") for entry in env)]
    typed = " ".join([*words, *map(shlex.quote, command)])
    try:
        done = subprocess.run(
            ["bash", "-c", typed],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_secs,
            env={"PATH": os.environ["PATH"], "HOME": "/", "USER": "noid"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", {"exit_code": None, "timed_out": True, "truncated": False}
    code: int | None = done.returncode if done.returncode >= 0 else 128 - done.returncode
    output = _ANSI.sub(b"", done.stdout).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if output and not output.endswith(b"\n"):
        output, code = output + MARK + f"{secrets.token_hex(4)}_EXIT{code}".encode(), None
    text = output.decode("utf-8", "replace").strip()
    truncated = len(text.encode()) > OUTPUT_BYTES_MAX
    if truncated:
        text = text.encode()[:OUTPUT_BYTES_MAX].decode("utf-8", "ignore")
    return text, {"exit_code": code, "timed_out": False, "truncated": truncated}
