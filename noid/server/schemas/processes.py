"""Commands and the processes they become."""

from __future__ import annotations

from noid.core.model.processes import ENV_ENTRIES_MAX, LOG_BYTES, LOG_BYTES_MAX, LOG_BYTES_MIN
from noid.server.schemas.vocabulary import (
    array,
    boolean,
    choice,
    flag,
    integer,
    nullable,
    number,
    record,
    shape,
    text,
)

_NO_NUL = r"^[^\x00]*$"

COMMAND = record(
    "Command",
    "A command to run, given to execve as it is.",
    {
        "command": {
            "type": "array",
            "prefixItems": [text(least=1, pattern=_NO_NUL)],
            "items": text(pattern=_NO_NUL),
            "minItems": 1,
        },
        "tty?": boolean(default=False, about="Give it a terminal; all its output is then stdout."),
        "columns?": integer(0, 0xFFFF, default=80, about="Of the terminal."),
        "rows?": integer(0, 0xFFFF, default=24, about="Of the terminal."),
        "env?": array(text(pattern=r"^[A-Za-z_][A-Za-z0-9_]*=[^\x00]*$"), most=ENV_ENTRIES_MAX, about="`KEY=VALUE`."),
        "cwd?": nullable(text(least=1, pattern=_NO_NUL), about="The user's home if missing."),
        "user?": nullable(text(least=1, pattern=_NO_NUL), about="The image's user if missing."),
        "stdin?": boolean(default=False, about="Over a WebSocket: input will follow."),
        "timeout_secs?": nullable({**number(most=1e9), "exclusiveMinimum": 0}, about="After which it is ended."),
        "log_bytes?": integer(
            LOG_BYTES_MIN, LOG_BYTES_MAX, default=LOG_BYTES, about="How much of its output the guest keeps."
        ),
        "resume?": boolean(default=False, about="Over a WebSocket: if the connection is lost, wait for the client."),
        "detached?": boolean(default=False, about="Over a WebSocket: run on whatever the client does."),
    },
)

OUTPUT = record(
    "CommandOutput",
    "What a command wrote and how it ended.",
    {
        "stdout": text(about="stdout and stderr in the order they arrived."),
        "exit_code": nullable(integer(), about="null after a timeout."),
        "timed_out": boolean(),
        "truncated": boolean(),
        "signal": nullable(integer(1)),
    },
)

PROCESS = record(
    "Process",
    "A process of a VM.",
    {
        "id": text(),
        "pid": integer(0),
        "command": array(text(), about="May be cut."),
        "state": choice("running", "exited", "lost"),
        "exit_code": nullable(integer()),
        "signal": nullable(integer(1)),
        "origin": choice("native", "rewound", "forked-copy"),
        "lineage": text(about="Which life of the VM it belongs to."),
        "detached": boolean(),
        "attached": integer(0, about="How many clients read its output."),
        "tty": boolean(),
        "stdin": boolean(about="Whether it still takes input."),
        "log": shape({"start": integer(0), "end": integer(0)}, about="Which bytes of its output are kept."),
        "started_at": nullable(text(about="ISO 8601.")),
        "usage": nullable(
            shape({"user_secs": number(0), "system_secs": number(0), "rss_max_kib": integer(0)}), about="Once it ended."
        ),
    },
)

SIGNAL = record(
    "Signal",
    "A signal to send to the process' group.",
    {"signal": {"anyOf": [text(least=1), integer(1, 64)], "description": "`TERM`, `SIGTERM` or `15`."}},
)

ATTACH = {
    "offset?": integer(0, about="In its output, from where on; from the first byte that is kept if missing."),
    "lineage?": text(about="Refuse (409) if the VM has been put back to a checkpoint since that life of it."),
    "resume?": flag(about="This is the client that started it."),
    "readonly?": flag(about="Send no input."),
}
"""The query of an attach."""
