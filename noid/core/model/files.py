"""Copying into a guest and out of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTransfer:
    """What a guest shall copy out of itself, or into itself. *path* is the guest's; its bytes are any but NUL.

    *form* of what goes out: ``look`` (nothing but what it is), ``sum`` (and the SHA-256 of its first *length* bytes),
    ``file`` (and *length* bytes from *offset*), ``tar`` (and a tar stream of it and all below it). Of what comes in:
    ``file`` (all of *size* bytes but the *offset* ones that an earlier transfer left, then one byte that says that it
    is complete; *sha256* of the whole is compared where there were earlier ones) and ``tar`` (into the directory
    *path*, which is made if it is missing; *owners* are restored only if asked for, by root).
    """

    incoming: bool
    form: str
    path: str
    user: str | None = None
    offset: int = 0
    length: int | None = None
    size: int = 0
    mode: int | None = None
    mtime_ns: int | None = None
    sha256: str = ""
    owners: bool = False
