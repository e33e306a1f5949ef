"""The VMM process of a simulated VM: one OS process per VM, with a control socket, an exec socket and a disk it locks.

It is started by `noid.testing.simulated_vmm` with one JSON argument and reports on descriptor 3 that its vCPUs run,
or why not. Its pid, its sockets, its lock and its death are real, so that ``kill -9``, adoption and the reaping of
orphans are tested on what they are for; only the guest is made up.

- ``<run_dir>/control.sock``: one JSON request per line, one JSON answer per line.
- ``<run_dir>/exec.sock``: the guest agent's byte stream, JSON lines; like a QEMU chardev it serves one client at a
  time, and the next one waits in the queue without being told.
- ``<run_dir>/console.in``: input of the serial console, see `noid.testing.simulated_console`.
- ``<run_dir>/end.json``: why it ended, if it ended by itself.

What its guest does is in `noid.testing.simulated_driver`. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import socket
import sys
from pathlib import Path
from typing import Any

from noid.testing.simulated_console import SimulatedConsole
from noid.testing.simulated_disk import SimulatedDisk
from noid.testing.simulated_driver import Line, SimulatedMachine
from noid.testing.simulated_guest import changes

REPORT_FD = 3


def digest(memory: dict[str, Any]) -> str:
    """Return what a device state says about the memory it belongs to."""
    return hashlib.sha256(json.dumps(memory, sort_keys=True).encode()).hexdigest()


class ControlledMachine(SimulatedMachine):
    """A machine made from *config*, with a control socket."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.run_dir = Path(config["run_dir"])
        disk = SimulatedDisk(config["disk"])
        self.parent = self._memory_image()
        selector = selectors.DefaultSelector()
        control = self._listen("control.sock")
        super().__init__(
            disk=disk,
            memory=self.parent,
            cmdline=config.get("cmdline", ""),
            exec_listener=self._listen("exec.sock"),
            console=SimulatedConsole(self.run_dir / "console.in", Path(config["console"]), selector),
            selector=selector,
        )
        selector.register(control, selectors.EVENT_READ, self._accept_control)

    def _memory_image(self) -> dict[str, Any]:
        """Return the pages of the image the machine maps; of a cold boot, none."""
        if "state" not in self.config:
            kernel = Path(self.config["kernel"]).read_bytes()[:1024]
            if not kernel.startswith(b"\x7fELF") and kernel[0x202:0x206] != b"HdrS":
                raise ValueError(f"{self.config['kernel']} is neither an ELF vmlinux nor a bzImage")
            with Path(self.config["initrd"]).open("rb"), Path(self.config["memory"]).open("w") as image:
                image.write("{}")
            return {}
        state = json.loads(Path(self.config["state"]).read_bytes())
        memory: dict[str, Any] = json.loads(Path(self.config["memory"]).read_bytes())
        for field in ("cpus", "mem_mib"):
            if state[field] != self.config[field]:
                raise ValueError(f"{field} is {self.config[field]}, but the state was saved with {state[field]}")
        if state["memory"] != digest(memory):
            raise ValueError("the memory image is not the one this device state was saved with")
        return memory

    def _listen(self, name: str) -> socket.socket:
        path = self.run_dir / name
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(8)
        listener.setblocking(False)
        return listener

    # --- control ---------------------------------------------------------------------------------------------------

    def _accept_control(self, listener: socket.socket) -> None:
        line = Line(listener.accept()[0])

        def on_request(_: socket.socket) -> None:
            requests = line.receive()
            if requests is None:
                self.selector.unregister(line.socket)
                line.socket.close()
                return
            for request in requests:
                try:
                    line.socket.setblocking(True)  # an answer is small, or its reader is our backend
                    line.send({"ok": self._control(request)})
                except (OSError, ValueError) as error:
                    line.send({"error": str(error), "errno": getattr(error, "errno", None)})
                finally:
                    line.socket.setblocking(False)

        self.selector.register(line.socket, selectors.EVENT_READ, on_request)

    def _control(self, request: dict[str, Any]) -> Any:
        match request["op"]:
            case "status":
                return {"paused": self.paused, "disk": self.disk.path, "instance": self.config["instance"]}
            case "pause":
                self.pause()
            case "flush":
                self.disk.flush()
            case "power_button":
                self.disk.flush()
                if not self.paused and not self.is_stubborn():
                    self.guest.events.append((0, "end", "shutdown"))
            case "resume":
                self.resume()
            case "capture" | "pivot" if not self.paused:
                raise ValueError(f"{request['op']} needs a paused machine; this one runs")
            case "capture":
                # What is on its way to the host belongs to its conversation with this machine; the logs are memory.
                memory = dict(self.guest.memory)
                state = {"cpus": self.config["cpus"], "mem_mib": self.config["mem_mib"], "memory": digest(memory)}
                with (Path(request["into"]) / "state").open("w") as file:
                    json.dump(state, file)
                    file.flush()
                return changes(self.parent, memory)
            case "pivot":
                self.disk.pivot(request["path"])
            case unknown:
                raise ValueError(f"unknown request {unknown}")
        self._update_exec()
        return None

    def _end(self, reason: str) -> None:
        if self.host is not None:
            self.host.flush()
        partial = self.run_dir / "end.json.partial"
        partial.write_text(json.dumps({"reason": reason}))
        partial.rename(self.run_dir / "end.json")
        sys.exit(0)


def main() -> None:
    """Run the machine of the first argument."""
    config = json.loads(sys.argv[1])
    try:
        machine = ControlledMachine(config)
    except (OSError, ValueError, KeyError) as error:
        report = {"error": str(error), "errno": getattr(error, "errno", None)}
        os.write(REPORT_FD, json.dumps(report).encode())
        sys.exit(1)
    os.write(REPORT_FD, b'{"ok": null}')
    os.close(REPORT_FD)
    machine.serve()
