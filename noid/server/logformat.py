"""How a line in the server's log looks: text or JSON, one line for each record, with the id of its request.

What clients and guests said is in messages, so nothing in one may look like the beginning of another, and a token that
slipped into one does not get out.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from noid.core import tracing
from noid.core.config.settings import LoggingConfig
from noid.core.redaction import hidden

_STANDARD = frozenset({*logging.makeLogRecord({}).__dict__, "message", "asctime", "request"})
_OURS = ("noid.", "noid_")
_LEFT_OUT = {"noid.server.hypercorn": logging.WARNING}  # its "Running on" is said better by ours
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x0A: "\\n",
    0x0D: "\\r",
    0x09: "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def set_up(config: LoggingConfig) -> None:
    """Log to stderr, this way from now on. Other libraries than noid's and its plugins' say no less than info."""
    root = logging.getLogger()
    handler = next((each for each in root.handlers if isinstance(each, _Handler)), None)
    if handler is None:
        handler = _Handler(sys.stderr)
        root.addHandler(handler)
    handler.setStream(sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    root.setLevel(config.level.upper())
    for name, level in _LEFT_OUT.items():
        logging.getLogger(name).setLevel(level)


class _Handler(logging.StreamHandler[Any]):
    """The one handler of the server."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.INFO or record.name.startswith(_OURS):
            super().emit(record)


class _Formatter(logging.Formatter):
    """What both formats share."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def trace(self, record: logging.LogRecord) -> str:
        """Return the record's traceback, or nothing."""
        text = ""
        if record.exc_info:
            text = self.formatException(record.exc_info)
        if record.stack_info:
            text = f"{text}\n{self.formatStack(record.stack_info)}".lstrip("\n")
        return text


class TextFormatter(_Formatter):
    """``time LEVEL logger: [request] message``. A traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and below it the traceback."""
        request = tracing.request_id()
        text = f"{self.formatTime(record)} {record.levelname} {record.name}: {f'[{request}] ' if request else ''}"
        text += record.getMessage().translate(_ESCAPES)
        if trace := self.trace(record):
            text += "".join(f"\n  {line.translate(_ESCAPES)}" for line in trace.splitlines())
        return hidden(text)


class JsonFormatter(_Formatter):
    """An object on one line: time, level, logger, message, request, exception, and what the record has beside that."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := tracing.request_id():
            fields["request"] = request
        fields |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD | fields.keys()}
        if trace := self.trace(record):
            fields["exception"] = trace
        return hidden(json.dumps(fields, separators=(",", ":"), default=str))
