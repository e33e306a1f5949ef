"""The environment of a guest's command, from ``-e`` and ``--env-file``, in docker's spellings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from noid.core.model.processes import checked_env
from noid.errors import InvalidRequest

FILE_BYTES_MAX = 4 << 20


def environment(files: Sequence[str], entries: Sequence[str], ours: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that *files* and *entries* name: files first, what comes later wins.

    An entry is ``KEY=VALUE``, or ``KEY`` alone for the value that *ours* has; a variable we do not have is left out.

    Raises:
        InvalidRequest: names the file and the line, or the entry.
    """
    env: dict[str, str] = {}
    for file in files:
        env |= _of_file(file, ours)
    env |= checked_env(_with_ours(entries, ours))
    return checked_env([f"{key}={value}" for key, value in env.items()])  # once more: all of them may be too many


def _of_file(path: str, ours: Mapping[str, str]) -> dict[str, str]:
    """Return what the file says: ``#`` begins a comment line, quotes and blanks behind ``=`` belong to the value."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # every exec would import pathlib
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror or error}.") from error
    if len(data) > FILE_BYTES_MAX:
        raise InvalidRequest(f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB, which no environment is.")
    env: dict[str, str] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            entry = line.removesuffix(b"\r").decode().lstrip()
            if entry and not entry.startswith("#"):
                env |= checked_env(_with_ours([entry], ours))
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{path}, line {number}: not UTF-8.") from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}, line {number}: {error}") from error
    return env


def _with_ours(entries: Sequence[str], ours: Mapping[str, str]) -> list[str]:
    """Return *entries* as ``KEY=VALUE``."""
    complete = []
    for entry in entries:
        key, equals, _ = entry.partition("=")
        if equals:
            complete.append(entry)
            continue
        checked_env([f"{key}="])  # a name that is none is a mistake, and not one that we happen not to have
        if key in ours:
            complete.append(f"{key}={ours[key]}")
    return complete
