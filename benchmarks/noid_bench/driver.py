"""A client in a process of its own: what it costs must not be taken from the server it measures.

Reads one JSON object a line, ``{"vm", "argv", "stdin_bytes"}``, runs the command through the API, as ``noid exec`` does
but without starting a program for each, and answers with ``{"secs", "own_secs", "bytes", "exit_code"}``: *own_secs* is
the CPU time the client itself has taken of that. ``{"vm", "copy"}`` with a number of bytes copies such a file into the
VM and out again, as ``noid cp`` does, and is answered with ``{"secs", "bytes"}`` for each direction.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from noid.client import exec_stream
from noid.client.copying import Copying
from noid.client.files import GuestPath
from noid.client.settings import Endpoint
from noid.core.model.processes import ExecRequest

GUEST_FILE = "/tmp/noid-bench"  # noqa: S108  # in a guest that has no other user


def main() -> None:
    """Serve until stdin ends. The argument is the server's socket."""
    endpoint = Endpoint(socket_path=sys.argv[1])
    for line in sys.stdin:
        task = json.loads(line)
        for answer in _copy(endpoint, task) if "copy" in task else (_run(endpoint, task),):
            print(json.dumps(answer), flush=True)


def _run(endpoint: Endpoint, task: dict[str, Any]) -> dict[str, object]:
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
    return {"secs": secs, "own_secs": own_secs, "bytes": received, "exit_code": result and result.exit_code}


def _copy(endpoint: Endpoint, task: dict[str, Any]) -> Iterator[dict[str, object]]:
    guest = GuestPath(vm=task["vm"], path=GUEST_FILE)
    with tempfile.TemporaryDirectory() as directory:
        there, back = Path(directory, "there"), Path(directory, "back")
        there.write_bytes(os.urandom(1 << 20) * (int(task["copy"]) >> 20))
        into, out = Copying(endpoint=endpoint), Copying(endpoint=endpoint)
        for copying, copy in (
            (into, partial(into.into_guest, str(there), guest)),
            (out, partial(out.out_of_guest, guest, str(back))),
        ):
            started = time.perf_counter()
            copy()
            yield {"secs": time.perf_counter() - started, "bytes": copying.done.size}


if __name__ == "__main__":
    main()
