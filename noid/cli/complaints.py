"""How what went wrong is told: ``Error:`` and what happened, then the next step, on stderr; and the exit code.

Nothing here fails: where stderr is closed, full or has no reader, nobody is told, and the exit code says it alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys

import click

from noid import __version__
from noid.cli import colours
from noid.cli.options import Call, Refused
from noid.errors import NoidError

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def tell(error: Exception, invocation: Call) -> int:
    """Say what *error* means to whoever typed the command, and return the exit code that goes with it.

    Raises:
        Exception: *error* itself, if it is a bug of ours and ``NOID_VERBOSE`` asks for its traceback.
    """
    match error:
        case click.exceptions.NoArgsIsHelpError() | Refused():
            with contextlib.suppress(OSError):
                error.show()
            return error.exit_code
        case click.UsageError():
            complain(_usage(error))
            return error.exit_code
        case click.ClickException():
            complain(error.format_message())
            return error.exit_code
        case NoidError():
            complain(explained(error, invocation))
            return invocation.fails_with
        case OSError(errno=number, strerror=reason) if number in _UNWRITABLE:
            complain(f"cannot write the output: {reason}.")
            return invocation.fails_with
    if os.environ.get("NOID_VERBOSE", "").strip().lower() in ("1", "true", "yes", "on"):
        raise error
    complain(
        f"this is a bug in noid {__version__}: {type(error).__name__}: {error}\n"
        "Please report it with the output of the same command under NOID_VERBOSE=1."
    )
    return invocation.fails_with


def complain(text: str) -> None:
    """Write ``Error: `` and *text* to stderr."""
    from noid.cli.output import harmless

    with contextlib.suppress(OSError):
        click.echo(f"{colours.painted('Error:', 'bold red', sys.stderr)} {harmless(text)}", err=True, color=True)


def explained(error: NoidError, invocation: Call) -> str:
    """Return what *error* says and, where a name was not found, which was probably meant and how to see them all."""
    from noid.cli import suggestions

    try:
        hint = suggestions.after(error, invocation)
    except KeyboardInterrupt:  # whoever has seen enough still gets the error
        hint = ""
    text = str(error)
    return text if not hint else f"{text} {hint}" if text.endswith((".", "?")) else f"{text}. {hint}"


def _usage(error: click.UsageError) -> str:
    """Return what was wrong, how the command is used, and where more is said."""
    message = error.format_message()
    if isinstance(error, click.NoSuchOption):
        from noid.cli.suggestions import did_you_mean

        message = f"{error.message} {did_you_mean(error.option_name, error.possibilities or ())}".rstrip()
    if error.ctx is None:
        return message
    return f"{message}\n{error.ctx.get_usage()}\nSee: {error.ctx.command_path} --help"
