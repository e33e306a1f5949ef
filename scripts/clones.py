"""Wakes N clones of one checkpoint, a few at a time, and proves that no two of them have anything in common.

Usage: scripts/clones [N] [--image NAME] [--together K] [--work DIR]. Ends with status 0 only if every claim was seen:

- the bytes a program draws that was running in the checkpoint, at the first moment it can know that it was cloned;
- UUIDs of the kernel and of a Python started afterwards, hostname, machine-id, boot-id: all different;
- every clone's receipt has all that is required;
- a TLS handshake succeeds in a guest woken from a checkpoint whose clock was a day behind, and did not before.

What was seen is kept in DIR. Ended early, by whatever, the same command goes on from there; done, DIR is removed. The
script has an agent of its own in DIR and leaves neither it nor a VM behind.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from noid.core import paths

NOID = Path(sys.executable).with_name("noid")
SERVER = Path(sys.executable).with_name("noid-server")
SOURCE, DAY_OLD = "source", "day-old"
MEM_MIB = 256
PATIENCE_SECS = 600
SEEN = "seen.jsonl"
#: Facts that must differ between any two clones.
UNIQUE = ("earliest", "kernel_uuid", "python_uuid", "urandom", "hostname", "machine_id", "boot_id", "generation")

#: Runs in the checkpoint and in every clone: looks without a pause, draws as soon as it sees that it was cloned.
WATCHER = r"""
import os, random
random.seed(1)
path, own = "/run/noid/generation", open("/run/noid/generation").read()
open("/tmp/watching", "w").close()
while open(path).read() == own:
    pass
drawn = os.getrandom(16).hex()
open("/tmp/earliest.new", "w").write(f"{drawn} {random.random()}")
os.rename("/tmp/earliest.new", "/tmp/earliest")
"""

FACTS = r"""
import json, os, pathlib, time, uuid
def read(path): return pathlib.Path(path).read_text().strip()
while not os.path.exists("/tmp/earliest"): time.sleep(0.01)
earliest, repeated = read("/tmp/earliest").split()
print(json.dumps({
    "earliest": earliest, "repeated": repeated, "kernel_uuid": read("/proc/sys/kernel/random/uuid"),
    "python_uuid": str(uuid.uuid4()), "urandom": os.urandom(16).hex(), "hostname": os.uname().nodename,
    "machine_id": read("/etc/machine-id"), "boot_id": read("/proc/sys/kernel/random/boot_id"),
    "generation": read("/run/noid/generation"), "clock": time.time(),
}))
"""

HANDSHAKE = r"""
import socket, ssl, threading
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain("/tmp/cert.pem", "/tmp/key.pem")
client = ssl.create_default_context(cafile="/tmp/cert.pem")
left, right = socket.socketpair()
def serve():
    try:
        server.wrap_socket(left, server_side=True).recv(1)
    except (ssl.SSLError, OSError):
        pass
threading.Thread(target=serve, daemon=True).start()
try:
    print(client.wrap_socket(right, server_hostname="guest.test").version())
except ssl.SSLCertVerificationError as error:
    print(error.verify_message)
"""


class Unproved(Exception):
    """A claim did not hold."""


class Agent:
    """An agent of our own in a data directory, asked over its unix socket: no process for each question."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.environment = os.environ | {"NOID_DATA_DIR": str(data_dir)}

    def command(self, *argv: str | Path) -> str:
        """Run ``noid`` or ``noid-server`` to its end."""
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unproved(f"{' '.join(map(str, argv))} failed: {done.stderr.strip()}")
        return done.stdout

    def ask(self, method: str, path: str, **fields: object) -> Any:
        """Make one request and return the decoded answer."""
        connection = HTTPConnection("localhost", timeout=PATIENCE_SECS)
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            connection.sock.settimeout(PATIENCE_SECS)
            connection.sock.connect(str(paths.socket_path(self.data_dir)))
            connection.request(method, f"/v1/vms{path}", json.dumps(fields), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        if answer.status >= 400:
            raise Unproved(f"{method} {path}: {answer.status} {text.decode(errors='replace')}")
        return json.loads(text) if text else None

    def run(self, vm: str, *argv: str, user: str = "root") -> str:
        """Run a command in a VM; it must succeed."""
        done = self.ask("POST", f"/{vm}/exec", command=argv, user=user)
        if done["exit_code"] != 0:
            raise Unproved(f"{argv[0]} in {vm} ended with {done['exit_code']}: {done['stdout']}")
        return str(done["stdout"]).strip()

    def names(self) -> list[str]:
        """Return the names of the VMs there are."""
        return [vm["name"] for vm in self.ask("GET", "")]

    def end(self) -> None:
        """Destroy the VMs and end the agent."""
        lock = self.data_dir / "agent.lock"
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            for name in self.names():
                self.ask("DELETE", f"/{name}")
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int(lock.read_text().split()[0])
            os.kill(pid, signal.SIGTERM)
            until = time.monotonic() + 60
            while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
                time.sleep(0.05)  # between two looks at somebody else's child


@contextlib.contextmanager
def agent_in(work: Path, image: str) -> Iterator[Agent]:
    """Start an agent in *work*, and end it with all its VMs, whatever happens. A day old or not, images are kept."""
    agent = Agent(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / "server.toml").write_text('require_unique = "strict"\n[pool]\nsize = 0\n')
    try:
        if not (work / "images" / image).is_dir():
            agent.command(SERVER, "image", "build", "--name", image, "--data-dir", work)
        agent.command(NOID, "list")
        for name in agent.names():  # of a run that was killed
            agent.ask("DELETE", f"/{name}")
        yield agent
    finally:
        agent.end()


def prepare(agent: Agent, image: str) -> str:
    """Return the checkpoint all are cloned from, in which the watcher runs."""
    made = agent.ask("POST", "", name=SOURCE, mem_mib=MEM_MIB, image=image)
    print(f"source made in {sum(made['timings'].values()):.1f} s", flush=True)
    start = 'setsid python3 -c "$0" >/dev/null 2>&1 </dev/null & until [ -e /tmp/watching ]; do sleep 0.05; done'
    agent.run(SOURCE, "sh", "-c", start, WATCHER)
    taken = agent.ask("POST", f"/{SOURCE}/checkpoints", label="watching")
    agent.ask("DELETE", f"/{SOURCE}")
    return str(taken["id"])


def seen_of(agent: Agent, checkpoint: str, number: int) -> dict[str, Any]:
    """Wake clone *number*, ask it everything, end it."""
    name = f"clone-{number}"
    woken = agent.ask("POST", f"/{SOURCE}/restore", checkpoint_id=checkpoint, new_name=name)
    try:
        asked = time.time()
        facts: dict[str, Any] = json.loads(agent.run(name, "python3", "-c", FACTS))
    finally:
        agent.ask("DELETE", f"/{name}")
    lacking = [item for item in woken["receipt"] if item["required"] and item["status"] != "done"]
    return facts | {
        "number": number, "checkpoint": checkpoint, "wake_secs": woken["timings"]["wake"], "lacking": lacking,
        "clock_error_secs": max(0.0, asked - facts["clock"], facts["clock"] - time.time()),
    }  # fmt: skip


def clone(agent: Agent, checkpoint: str, numbers: list[int], together: int, seen: list[dict[str, Any]]) -> None:
    """Wake clones with these numbers, *together* at a time, and write down what is seen as it comes."""
    began, results = time.monotonic(), agent.data_dir / SEEN
    with results.open("a") as file, concurrent.futures.ThreadPoolExecutor(together) as pool:
        rest = iter(numbers)
        running = {pool.submit(seen_of, agent, checkpoint, number) for number in itertools.islice(rest, together)}
        done = 0
        while running:
            ended, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                seen.append(future.result())
                file.write(json.dumps(seen[-1]) + "\n")
                file.flush()
                done += 1
                running |= {pool.submit(seen_of, agent, checkpoint, number) for number in itertools.islice(rest, 1)}
                if done % 20 == 0 or done == len(numbers):
                    secs = time.monotonic() - began
                    print(f"{len(seen)} clones, {done / secs:.1f} a second", flush=True)


def judge(seen: list[dict[str, Any]]) -> None:
    """Hold what was seen against the claims."""
    for fact in UNIQUE:
        twice = [value for value, count in Counter(one[fact] for one in seen).items() if count > 1]
        if twice:
            raise Unproved(f"{fact} is the same in several clones: {twice[:5]}")
    lacking = [one["number"] for one in seen if one["lacking"]]
    if lacking:
        raise Unproved(f"clones {lacking[:10]} have receipts that lack something")
    late = [one["number"] for one in seen if one["clock_error_secs"] > 2.0]
    if late:
        raise Unproved(f"the clocks of clones {late[:10]} are more than 2 s off")
    wakes = sorted(one["wake_secs"] for one in seen)
    repeated = len({one["repeated"] for one in seen})
    print(f"{len(seen)} clones: {', '.join(UNIQUE)} all different, all receipts have what is required")
    print(f"wake: median {wakes[len(wakes) // 2] * 1000:.1f} ms, slowest {wakes[-1] * 1000:.1f} ms")
    print(f"what nobody outside can repair: {repeated} different numbers of a generator seeded before the checkpoint")


def handshake(agent: Agent, image: str) -> None:
    """Prove that TLS works in a guest woken from a checkpoint in which it is yesterday."""
    agent.ask("POST", "", name=DAY_OLD, mem_mib=MEM_MIB, image=image)
    for name, content in zip(("cert.pem", "key.pem"), certificate(), strict=True):
        agent.run(DAY_OLD, "sh", "-c", 'printf %s "$0" > "$1"', content, f"/tmp/{name}")  # noqa: S108  # in the guest
    agent.run(DAY_OLD, "date", "-s", f"@{time.time() - 86_400:.0f}")
    before = agent.run(DAY_OLD, "python3", "-c", HANDSHAKE)
    if "not yet valid" not in before:
        raise Unproved(f"yesterday the certificate should not have been valid: {before}")
    taken = agent.ask("POST", f"/{DAY_OLD}/checkpoints")
    agent.ask("POST", f"/{DAY_OLD}/restore", checkpoint_id=taken["id"], new_name="today")
    after = agent.run("today", "python3", "-c", HANDSHAKE)
    if not after.startswith("TLSv1"):
        raise Unproved(f"the handshake failed: {after}")
    print(f"TLS in a guest woken from a day-old checkpoint: {after}; before the wake: {before}")


def certificate() -> tuple[str, str]:
    """Return certificate and key of ``guest.test``, valid since an hour ago."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "index").touch()
        (place / "ca.conf").write_text(
            f"[ca]\ndefault_ca=d\n[d]\ndatabase={place}/index\nnew_certs_dir={place}\ndefault_md=sha256\n"
            "policy=p\nrand_serial=yes\nx509_extensions=e\n[p]\ncommonName=supplied\n"
            "[e]\nsubjectAltName=DNS:guest.test\nbasicConstraints=CA:TRUE\n"
        )
        since, until = ((datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y%m%d%H%M%SZ") for hours in (-1, 240))
        request: list[str | Path] = [
            "openssl",
            "req",
            "-new",
            "-nodes",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ]
        sign: list[str | Path] = ["openssl", "ca", "-batch", "-notext", "-selfsign", "-config", place / "ca.conf"]
        for command in (
            [*request, "-subj", "/CN=guest.test", "-keyout", place / "key", "-out", place / "request"],
            [*sign, "-keyfile", place / "key", "-in", place / "request", "-out", place / "cert",
             "-startdate", since, "-enddate", until],
        ):  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
        return (place / "cert").read_text(), (place / "key").read_text()


def main() -> int:
    """Prove it all; 0 if everything was seen."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="scripts/clones", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clones", metavar="N", nargs="?", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--image", default="default", help="with python3 in it (default)")
    parser.add_argument("--together", metavar="K", type=int, default=4, help="how many at a time (4)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(tempfile.gettempdir()) / "noid-clones")
    options = parser.parse_args()
    work, results = options.work.absolute(), options.work.absolute() / SEEN
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seen = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    try:
        with agent_in(work, options.image) as agent:
            if not seen:
                handshake(agent, options.image)
            checkpoint = seen[0]["checkpoint"] if seen else prepare(agent, options.image)
            had = {one["number"] for one in seen}
            numbers = [number for number in range(options.clones) if number not in had]
            clone(agent, checkpoint, numbers, options.together, seen)
            judge(seen)
    except Unproved as error:
        print(f"Not proved: {error}\nWhat was seen is in {work}; the same command goes on from there.", file=sys.stderr)
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
