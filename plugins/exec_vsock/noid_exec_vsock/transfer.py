"""The guest's end of a copy, as the command line of the agent's builtins `copy-out` and `copy-in`."""

from __future__ import annotations

from noid.core.model.files import FileTransfer

_ALL_OF_IT = (1 << 63) - 1


def transfer_argv(request: FileTransfer) -> tuple[str, ...]:
    """Return the builtin and its arguments that carry out *request*."""
    if not request.incoming:
        length = _ALL_OF_IT if request.length is None else request.length
        return "copy-out", request.form, request.path, str(request.offset), str(length)
    if request.form == "tar":
        return "copy-in", "tar", request.path, "owners" if request.owners else "-"
    mode = "-" if request.mode is None else f"{request.mode:o}"
    mtime = "-" if request.mtime_ns is None else str(request.mtime_ns)
    sizes = str(request.offset), str(request.size)
    return "copy-in", "file", request.path, *sizes, mode, mtime, request.sha256 or "-"
