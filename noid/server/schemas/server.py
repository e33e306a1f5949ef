"""What a server is, who asks, and what a client may count on."""

from __future__ import annotations

from noid.server.schemas.tokens import SCOPES
from noid.server.schemas.vocabulary import choice, integer, nullable, number, record, text

HEALTH = record("Health", "Requests are answered.", {"status": choice("ok")})

VERSION = record("Version", "What answers.", {"version": text(), "api_version": integer(1)})

WHOAMI = record(
    "WhoAmI",
    "Who asks.",
    {
        "user_id": text(),
        "name": text(),
        "token": nullable(text(), about="Its name; null on the unix socket."),
        "scopes": SCOPES,
    },
)

CAPABILITIES = record(
    "Capabilities",
    "Limits and defaults.",
    {
        "api_version": integer(1),
        "max_exec_output_bytes": integer(0, about="Of a command run by POST."),
        "exec_timeout_secs": number(0, about="How long such a command may take."),
        "console_timeout_secs": number(0, about="After which a console where nothing happens is detached."),
        "max_vm_name_length": integer(1),
        "default_cpus": integer(1),
        "default_mem_mib": integer(1),
    },
)
