"""Running the host's own programs: found also where ordinary users have no PATH to, and explained when they fail."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from noid.errors import BackendError, DependencyDown, NoSpace

_SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_END_SECS = 30.0
_FULL = os.strerror(errno.ENOSPC)
_LINES_MAX = 3
_WORDS_CHARS_MAX = 600
_ERROR_LINE = re.compile(r"(E|[\w.-]*\b(error|fatal)):", re.IGNORECASE)

# Which package has a program, for the message that says what to install.
_PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "lzop": "lzop",
    "lz4": "lz4",
    "mke2fs": "e2fsprogs",
    "unshare": "util-linux",
    "xz": "xz-utils",
    "zstd": "zstd",
}


def search_path() -> str:
    """Return ``PATH`` with the system administrator's directories added: Debian's ordinary users lack them."""
    have = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*have, *(d for d in _SYSTEM_DIRECTORIES if d not in have)])


def find(program: str) -> str | None:
    """Return the full path of *program*, or None."""
    return shutil.which(program, path=search_path())


def require(program: str, purpose: str) -> str:
    """Return the full path of *program*.

    Raises:
        DependencyDown: it is not installed; names *purpose* and the package.
    """
    found = find(program)
    if found is None:
        package = _PACKAGES.get(program, program)
        raise DependencyDown(
            f"{purpose} needs the program {program}, which is not installed. Install it (apt-get install {package}) "
            "and try again."
        )
    return found


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment programs run in: the caller's, speaking English, without a terminal to ask questions."""
    return {
        **os.environ,
        "PATH": search_path(),
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        **(extra or {}),
    }


def run(argv: list[str], purpose: str, *, stdin: bytes = b"", cwd: Path | None = None) -> bytes:
    """Run a program to its end and return what it wrote to stdout. *purpose* is the step, as in ``reading apt``.

    It has a process group of its own, because mmdebstrap, when it fails, hangs up everybody in its group. So Ctrl+C
    does not reach it: whatever exception passes here asks it to end, and waits while it tidies up.

    Raises:
        DependencyDown: the program is not installed.
        NoSpace: a disk is full, as it says.
        BackendError: it failed otherwise; carries the end of its stderr.
    """
    program = require(argv[0], purpose)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [program, *argv[1:]], stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=environment(), process_group=0
    ) as process:
        try:
            stdout, stderr = process.communicate(stdin)
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        if full := [line for line in stderr.decode(errors="replace").splitlines() if _FULL in line]:
            raise NoSpace(f"{purpose} failed: {full[0].strip()[:_WORDS_CHARS_MAX]}. Free space there and try again.")
        raise BackendError(f"{purpose} failed: {failure(argv[0], process.returncode, stderr or stdout)}.")
    return stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)  # the group, as Ctrl+C would: mmdebstrap itself waits for its children
    try:
        process.communicate(timeout=_END_SECS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def failure(program: str, status: int, output: bytes) -> str:
    """Return how *program* ended and why, for an error message: the lines it marked as errors, else its last ones."""
    ended = f"was ended by signal {-status}" if status < 0 else f"exited with {status}"
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    marked = [line for line in lines if _ERROR_LINE.match(line)]
    words = " / ".join(marked[:_LINES_MAX] or lines[-_LINES_MAX:])[:_WORDS_CHARS_MAX]
    return f"{Path(program).name} {ended}{': ' + words.rstrip('.') if words else ' and said nothing'}"
