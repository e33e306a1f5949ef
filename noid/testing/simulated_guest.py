"""The guest of a simulated VM: memory, clock, randomness, processes, a tiny command language. No sockets or threads.

Everything the guest knows is in `SimulatedGuest.memory`, a flat mapping of *pages* (JSON values by key), so that a
capture is a copy of it and a clone continues from it in the middle of a command. Time is the guest's: it is told how
long it ran, and never looks at the host's clock but to boot.

Understood are ``true false echo cat tee sleep hostname date count yes env pwd id sync poweroff reboot`` and
``ticker`` (a numbered line with the guest's generation, again and again), ``stty size`` and ``sh -c`` with ``;``,
``&&``, ``>``, ``>>``, ``>&2``, ``exit N`` and ``trap '' TERM``. Any other program does not exist.

What processes write is kept in their logs, in memory too, and so are processes that have ended, until they are
released: `ENDED_MAX` at most, the oldest go first.

Standard library only: this runs inside the simulated VMM process.
"""

from __future__ import annotations

import base64
import hashlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from noid.testing import simulated_ring as ring
from noid.testing.simulated_disk import SimulatedDisk
from noid.testing.simulated_shell import parse

Page = dict[str, Any]
TICK_SECS = 0.05
BLOCKED_SECS = 0.005
STDIN_BUFFER_BYTES = 65536
ENDED_MAX = 64
UNSENT_BYTES_MAX = 65536
_YES_BYTES = 32768
USERS = {"root": "/root", "noid": "/home/noid"}
# paths inside the guest, so nothing insecure about any of them
_DIRECTORIES = {"", "/root", "/home", "/home/noid", "/tmp", "/run", "/dev", "/dev/shm", "/etc", "/usr", "/var"}  # noqa: S108
_IN_MEMORY = ("/dev/shm/", "/run/", "/tmp/")  # noqa: S108
_IGNORED = (0, signal.SIGCHLD, signal.SIGCONT, signal.SIGWINCH)
#: What the serial console calls the program in its foreground; hosts' ids are greater.
CONSOLE_ID = 0
_UUID = "/proc/sys/kernel/random/uuid"


class Refused(Exception):
    """The process cannot be started as asked: an unknown user or working directory."""


def changes(parent: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pages of *memory* that differ from *parent*; a page that is gone is None."""
    changed = {key: page for key, page in memory.items() if key not in parent or parent[key] != page}
    return changed | {key: None for key in parent if key not in memory}


def merged(parent: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return *parent* with *changed* applied: the inverse of `changes`."""
    return {key: page for key, page in {**parent, **changed}.items() if page is not None}


class SimulatedGuest:
    """A guest on *disk* that continues from *memory*; an empty memory boots.

    Raises:
        ValueError: *disk* and *memory* are not of one instant.

    What it does is appended to `events`: ``(pid, "stdin", bytes consumed)``, ``(pid, "released")`` and
    ``(0, "end", reason)``, which whoever drives it takes away. Output and ends are in the logs and pages of processes.

    *unsent* says from which offset on the log of a process must not be forgotten, because somebody who reads it has not
    been sent the rest: whoever drives this keeps it up to date.
    """

    def __init__(self, disk: SimulatedDisk, memory: dict[str, Any]) -> None:
        self.disk = disk
        self.memory = memory
        self.events: list[tuple[Any, ...]] = []
        self.unsent: dict[int, int] = {}
        if not memory:
            memory |= {"uptime": 0.0, "wall_offset": time.time(), "seed": time.time_ns(), "draws": 0, "next_pid": 100}
            memory["hostname"] = (disk.read("/etc/hostname") or b"noid").decode().strip()
            memory["disk_sequence"] = disk.sequence
        elif memory["disk_sequence"] != disk.sequence:
            raise ValueError(
                f"the disk was written {disk.sequence} times, but the guest's memory knows {memory['disk_sequence']}:"
                " they were not frozen at one instant, a real guest would now corrupt its file system"
            )

    # --- what the machine drives -----------------------------------------------------------------------------------

    def run_until(self, uptime: float) -> float | None:
        """Let the guest live until *uptime* and return when it next has something to do, or None."""
        self.memory["uptime"] = max(uptime, self.memory["uptime"])
        due: list[float] = []
        for pid, process in self._processes():
            if process.get("kill_at", uptime + 1) <= uptime:
                self._end(pid, None, signal.SIGKILL)
                continue
            now = process["now"]
            if "due" in now and now["due"] <= uptime:
                self._act(pid, now, uptime)
            live = self.memory.get(f"process:{pid}")
            if live is not None:
                due += [at for at in (live["now"].get("due"), live.get("kill_at")) if at is not None]
        return min(due, default=None)

    def _act(self, pid: int, now: Page, uptime: float) -> None:
        """Let a process whose time has come do what it does."""
        again = {**now, "due": max(now["due"], uptime - TICK_SECS) + TICK_SECS}
        match now["kind"]:
            case "count":
                self._write(now["path"], f"{int(self._read(now['path']) or b'0') + 1}\n".encode())
                self._page(pid, now=again)
            case "ticker" if self.may_write(pid):
                generation = (self._read("/run/noid/generation") or b"0").decode().strip()
                self._emit(pid, 1, f"{now['ticks']} {generation}\n".encode())
                self._page(pid, now=again | {"ticks": now["ticks"] + 1})
            case "yes" if self.may_write(pid):
                self._emit(pid, 1, b"y\n" * (_YES_BYTES // 2))
                self._page(pid, now=again if pid not in self.unsent else {**now, "due": uptime})
            case "ticker" | "yes":
                self._page(pid, now=now | {"due": uptime + BLOCKED_SECS})
            case _:
                self._proceed(pid, status=0)

    def may_write(self, pid: int) -> bool:
        """Whether the pipe of a process has room: always while nobody reads it, because then the oldest goes."""
        unsent = self.unsent.get(pid)
        return unsent is None or self.log(pid)["end"] - unsent < UNSENT_BYTES_MAX

    def start(
        self,
        process_id: int,
        argv: list[str],
        env: dict[str, str],
        cwd: str | None,
        user: str | None,
        stdin: bool,
        *,
        tty: list[int] | None = None,
        log_bytes: int = 1 << 20,
        label: str = "",
    ) -> int:
        """Start a process and return its pid. *process_id* is the host's name for it; *tty* is columns and rows.

        Raises:
            Refused: no such user or directory, or the id is taken.
        """
        user = user or "root"
        if user not in USERS:
            raise Refused(f"there is no user {user!r} in the guest")
        directory = cwd or USERS[user]
        if directory.rstrip("/") not in _DIRECTORIES | self._parents():
            raise Refused(f"working directory {directory!r}: No such file or directory")
        if self.pid_of(process_id) is not None:
            raise Refused(f"there is a process {process_id:08x} already")
        pid = self.memory["next_pid"]
        self.memory["next_pid"] = pid + 1
        home = {"HOME": USERS[user], "USER": user, "PATH": "/usr/bin:/bin"}
        self.memory[f"log:{pid}"] = ring.new_log(log_bytes)
        self.memory[f"process:{pid}"] = {
            "argv": argv, "env": home | env, "cwd": directory, "user": user, "todo": [[argv, None, None]], "status": 0,
            "now": {"kind": "new"}, "stdin": "", "stdin_open": stdin, "ignored": [],
            "id": process_id, "tty": tty, "label": label, "started": int(self._wall() * 1e9),
        }  # fmt: skip
        return int(pid)

    def begin(self, pid: int) -> None:
        """Let a process that was just started run its first command."""
        self._proceed(pid, status=0)

    def pid_of(self, process_id: int) -> int | None:
        """Return the pid of the process the host calls *process_id*, or None."""
        return next((pid for pid, page in self._all() if page["id"] == process_id), None)

    def log(self, pid: int) -> Page:
        """Return the log of a process: see `noid.testing.simulated_ring`."""
        log: Page = self.memory[f"log:{pid}"]
        return log

    def exit(self, pid: int) -> list[int | None] | None:
        """Return code and signal of a process that has ended, else None."""
        exit_: list[int | None] | None = self.memory.get(f"ended:{pid}", {}).get("exit")
        return exit_

    def stdin_taken(self, pid: int) -> int:
        """How much input a process has been given, 0 once it has ended."""
        return int(self.memory.get(f"process:{pid}", {}).get("stdin_taken", 0))

    def stdin_window(self, pid: int) -> int:
        """Return how much more input a process can be given before it reads."""
        return max(0, STDIN_BUFFER_BYTES - len(self.memory.get(f"process:{pid}", {}).get("stdin", "")) * 3 // 4)

    def forget_sent(self, pid: int) -> None:
        """Drop from a log what is over its limit and was sent."""
        self.memory[f"log:{pid}"] = ring.trimmed(self.log(pid), self.unsent.get(pid))

    def listing(self) -> list[Page]:
        """Return what there is of processes, oldest first."""
        return [
            {
                "id": page["id"], "pid": pid, "running": "exit" not in page, "tty": page["tty"] is not None,
                "stdin": page.get("stdin_open", False), "start": self.log(pid)["start"], "end": self.log(pid)["end"],
                "exit": page.get("exit"), "started": page["started"], "label": page["label"],
            }
            for pid, page in sorted(self._all())
            if page["id"] != CONSOLE_ID
        ]  # fmt: skip

    def resize(self, pid: int, columns: int, rows: int) -> None:
        """Change the size of a process' terminal, if it has one."""
        if (process := self.memory.get(f"process:{pid}")) is not None and process["tty"] is not None:
            self._page(pid, tty=[columns, rows])

    def end(self, pid: int, grace_secs: float) -> None:
        """Send TERM, and KILL after the grace."""
        if grace_secs > 0:
            self.signal(pid, signal.SIGTERM)
        if f"process:{pid}" in self.memory:
            self._page(pid, kill_at=self.memory["uptime"] + grace_secs)

    def release(self, pid: int, grace_secs: float) -> None:
        """Forget a process as soon as it has ended, and see to that."""
        if f"process:{pid}" in self.memory:
            self._page(pid, forget=True)
            self.end(pid, grace_secs)
        else:
            self._forget(pid)

    def feed(self, pid: int, data: bytes | None) -> None:
        """Give a process input; None ends it."""
        if data and b"\x03" in data and self.memory.get(f"process:{pid}", {}).get("tty"):
            self.signal(pid, signal.SIGINT)  # as the kernel does for a terminal's foreground
        process = self.memory.get(f"process:{pid}")
        if process is None or not process["stdin_open"]:
            if data:
                self.events.append((pid, "stdin", len(data)))  # nobody will read it: it counts as read
            return
        held = base64.b64decode(process["stdin"]) + (data or b"")
        taken = process.get("stdin_taken", 0) + len(data or b"")
        process = self._page(pid, stdin=base64.b64encode(held).decode(), stdin_open=data is not None, stdin_taken=taken)
        if process["now"]["kind"] == "read" and self._drain(pid):
            self._proceed(pid, status=0)

    def signal(self, pid: int, signo: int) -> None:
        """Send a signal, as the kernel would."""
        process = self.memory.get(f"process:{pid}")
        if process is None or signo in process["ignored"] or signo in _IGNORED:
            return
        self._end(pid, None, signo)

    def wake(self, hostname: str, machine_id: str, unix_ns: int, entropy: bytes, generation: int) -> list[Page]:
        """Become somebody else and return what changed, as a receipt's items."""
        memory = self.memory
        clock = self._wall()
        memory["wall_offset"] = unix_ns / 1e9 - memory["uptime"]
        memory["seed"] = hashlib.sha256(f"{memory['seed']}".encode() + entropy).hexdigest()
        name, memory["hostname"] = memory["hostname"], hostname
        identity = (self._read("/etc/machine-id") or b"").decode().strip()
        self._write("/etc/hostname", f"{hostname}\n".encode())
        self._write("/etc/machine-id", f"{machine_id}\n".encode())
        self._write("/run/noid/generation", f"{generation}\n".encode())
        return [
            {"name": "clock", "status": "done", "before": f"{clock:.3f}", "after": f"{self._wall():.3f}"},
            {"name": "randomness", "status": "done"},
            {"name": "hostname", "status": "done", "before": name, "after": hostname},
            {"name": "machine-id", "status": "done", "before": identity, "after": machine_id},
            {"name": "boot-id", "status": "done"},
            {"name": "network", "status": "done"},
            {"name": "generation", "status": "done", "after": str(generation)},
        ]

    # --- files, clock, randomness ----------------------------------------------------------------------------------

    def _read(self, path: str) -> bytes | None:
        if path == _UUID:
            self.memory["draws"] += 1
            digest = hashlib.sha256(f"{self.memory['seed']}/{self.memory['draws']}".encode()).hexdigest()
            return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-a{digest[17:20]}-{digest[20:32]}\n".encode()
        if path == "/proc/uptime":
            return f"{self.memory['uptime']:.2f} 0.00\n".encode()
        if path == "/proc/sys/kernel/hostname":
            return f"{self.memory['hostname']}\n".encode()
        if path == "/run/console_size":
            columns, rows = self.memory.get("console_size", (0, 0))
            return f"{columns} {rows}\n".encode()
        if path.startswith(_IN_MEMORY):
            page = self.memory.get(f"file:{path}")
            return None if page is None else base64.b64decode(page)
        return self.disk.read(path)

    def _write(self, path: str, data: bytes) -> None:
        if path == "/dev/null":
            return
        if path.startswith(_IN_MEMORY):
            self.memory[f"file:{path}"] = base64.b64encode(data).decode()
            return
        self.disk.write(path, data)
        self.memory["disk_sequence"] = self.disk.sequence

    def _parents(self) -> set[str]:
        files = [key.removeprefix("file:") for key in self.memory if key.startswith("file:")]
        return {name.rsplit("/", depth)[0] for name in [*files, *self.disk.names()] for depth in (1, 2)}

    def _wall(self) -> float:
        return float(self.memory["wall_offset"] + self.memory["uptime"])

    # --- processes -------------------------------------------------------------------------------------------------

    def _processes(self) -> Iterator[tuple[int, Page]]:
        return iter([(int(key[8:]), page) for key, page in self.memory.items() if key.startswith("process:")])

    def _all(self) -> Iterator[tuple[int, Page]]:
        kinds = ("process:", "ended:")
        return iter([(int(k.partition(":")[2]), page) for k, page in self.memory.items() if k.startswith(kinds)])

    def _page(self, pid: int, **fields: Any) -> Page:
        page: Page = {**self.memory[f"process:{pid}"], **fields}  # a new object: captures hold the old one
        self.memory[f"process:{pid}"] = page
        return page

    def _end(self, pid: int, code: int | None, signo: int | None = None) -> None:
        page = self.memory.pop(f"process:{pid}")
        self.memory[f"ended:{pid}"] = {key: page[key] for key in ("id", "tty", "label", "started")} | {
            "exit": [code, signo]
        }
        if page.get("forget"):
            self._forget(pid)
        ended = [pid for pid, page in sorted(self._all()) if "exit" in page and pid not in self.unsent]
        for oldest in ended[:-ENDED_MAX]:
            self._forget(oldest)

    def _forget(self, pid: int) -> None:
        del self.memory[f"ended:{pid}"], self.memory[f"log:{pid}"]
        self.events.append((pid, "released"))

    def _emit(self, pid: int, stream: int, data: bytes) -> None:
        if self.memory[f"process:{pid}"]["tty"] is not None:
            stream, data = 1, data.replace(b"\n", b"\r\n")
        self.memory[f"log:{pid}"] = ring.appended(self.log(pid), stream, data)
        self.forget_sent(pid)

    def _proceed(self, pid: int, status: int) -> None:
        """Run the process' next commands until one takes time or none is left."""
        process = self._page(pid, status=status, now={"kind": "new"})
        while process["todo"]:
            (argv, condition, target), *rest = process["todo"]
            self._page(pid, todo=rest)
            if condition == "&&" and process["status"] != 0:
                process = self.memory[f"process:{pid}"]
                continue
            if argv[0] == "exit":
                break
            try:
                outcome = self._run(pid, argv, target)
            except (OSError, ValueError, LookupError) as error:
                outcome = self._say(pid, f"{argv[0]}: {getattr(error, 'strerror', None) or error}", 2)
            if outcome is None:
                return
            process = self._page(pid, status=outcome)
        else:
            argv = ["exit"]
        self._end(pid, int(argv[1]) % 256 if argv[1:] else process["status"])

    def _say(self, pid: int, text: str, status: int) -> int:
        self._emit(pid, 2, f"{text}\n".encode())
        return status

    def _out(self, pid: int, target: str | None, data: bytes) -> int:
        if target is None or target == "&2":
            self._emit(pid, 1 if target is None else 2, data)
        else:
            append, path = target.startswith("+"), target.lstrip("+")
            self._write(path, ((self._read(path) or b"") if append else b"") + data)
        return 0

    def _run(self, pid: int, argv: list[str], target: str | None) -> int | None:
        """Run one command; return its status, or None when it goes on."""
        process = self.memory[f"process:{pid}"]
        name, arguments = argv[0].rpartition("/")[2], argv[1:]
        uptime = self.memory["uptime"]
        match name, arguments:
            case (("true" | "false"), _):
                return int(name == "false")
            case (("sh" | "bash"), ["-c", script, *_]):
                self._page(pid, todo=[*parse(script), *process["todo"]])
                return 0
            case "trap", [_, *signals]:
                names = [signal.Signals[f"SIG{s.removeprefix('SIG')}"].value for s in signals]
                self._page(pid, ignored=[*process["ignored"], *names])
                return 0
            case "echo", _:
                return self._out(pid, target, " ".join(arguments).encode("utf-8", "surrogateescape") + b"\n")
            case "env", []:
                return self._out(pid, target, "".join(f"{k}={v}\n" for k, v in process["env"].items()).encode())
            case "pwd", []:
                return self._out(pid, target, process["cwd"].encode() + b"\n")
            case "id", ["-un"]:
                return self._out(pid, target, process["user"].encode() + b"\n")
            case "hostname", []:
                return self._out(pid, target, self.memory["hostname"].encode() + b"\n")
            case "date", [form]:
                secs, nanos = divmod(int(self._wall() * 1e9), 10**9)
                text = form.removeprefix("+").replace("%s", str(secs)).replace("%N", f"{nanos:09d}")
                return self._out(pid, target, text.encode() + b"\n")
            case "sync", _:
                self.disk.flush()
                return 0
            case "cat", [path, *_] if path != "-":
                for path in arguments:
                    data = self._read(path)
                    if data is None:
                        return self._say(pid, f"cat: {path}: No such file or directory", 1)
                    self._out(pid, target, data)
                return 0
            case (("poweroff" | "reboot"), _):
                self.events.append((0, "end", "shutdown" if name == "poweroff" else "reset"))
                return 0
            case "cat", _:
                self._page(pid, now={"kind": "read", "path": None, "target": target})
            case "tee", [path]:
                self._write(path, b"")
                self._page(pid, now={"kind": "read", "path": path, "target": target})
            case "sleep", [secs]:
                self._page(pid, now={"kind": "sleep", "due": uptime + float(secs)})
            case "count", [path]:
                self._page(pid, now={"kind": "count", "path": path, "due": uptime})
            case "yes", []:
                self._page(pid, now={"kind": "yes", "due": uptime})
            case "ticker", []:
                self._page(pid, now={"kind": "ticker", "due": uptime, "ticks": 0})
            case "stty", ["size"]:
                return self._out(pid, target, "{1} {0}\n".format(*process["tty"] or (0, 0)).encode())
            case _:
                return self._say(pid, f"{argv[0]}: not found", 127)
        reads = self.memory[f"process:{pid}"]["now"]["kind"] == "read"
        return 0 if reads and self._drain(pid) else None

    def _drain(self, pid: int) -> bool:
        """Let a reading process read what it was given; return whether that was the end."""
        process = self.memory[f"process:{pid}"]
        now = process["now"]
        if data := base64.b64decode(process["stdin"]):
            if now["path"]:
                self._write(now["path"], (self._read(now["path"]) or b"") + data)
            self._out(pid, now["target"], data)
            self.events.append((pid, "stdin", len(data)))
            self._page(pid, stdin="")
        return not process["stdin_open"]
