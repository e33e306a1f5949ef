"""A client in a process of its own: what it costs must not be taken from the server it measures.

Reads one JSON object a line, ``{"vm", "argv", "stdin_bytes"}``, runs the command through the API, as ``noid exec`` does
but without starting a program for each, and answers with ``{"secs", "own_secs", "bytes", "exit_code"}``: *own_secs* is
the CPU time the client itself has taken of that.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from noid.client import exec_stream
from noid.client.settings import Endpoint
from noid.core.model import ExecRequest


def main() -> None:
    """Serve until stdin ends. The argument is the server's socket."""
    endpoint = Endpoint(socket_path=Path(sys.argv[1]))
    for line in sys.stdin:
        task = json.loads(line)
        stdin_bytes = int(task["stdin_bytes"])
        input_fd = os.memfd_create("input") if stdin_bytes else None
        if input_fd is not None:
            os.truncate(input_fd, stdin_bytes)
        received = 0

        def count(channel: int, data: bytes) -> None:
            nonlocal received
            del channel
            received += len(data)

        request = ExecRequest(argv=tuple(task["argv"]), stdin=input_fd is not None)
        started, used = time.perf_counter(), time.process_time()
        conversation = exec_stream.Conversation(on_output=count, stdin_fd=input_fd)
        result = exec_stream.run(endpoint, task["vm"], request, conversation)
        secs, own_secs = time.perf_counter() - started, time.process_time() - used
        if input_fd is not None:
            os.close(input_fd)
        answer = {"secs": secs, "own_secs": own_secs, "bytes": received, "exit_code": result and result.exit_code}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
