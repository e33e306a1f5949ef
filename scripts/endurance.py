"""Ten thousand commands in one VM in a row, then two hundred at once: descriptors, processes and memory must not grow.

Usage: scripts/endurance [--execs 10000] [--at-once 200] [--image IMAGE]

Runs a server of its own in a scratch directory, with the images of the data directory. Exit code 1 when something grew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from noid_bench.endurance import Endurance
from noid_bench.rig import image_to_use, link_image, scratch_directory
from noid_bench.run import agent_process

from noid.client.settings import Endpoint
from noid.core import paths
from noid.core.layout import Layout
from noid.core.vms import processes

WARM_UP = 200
MEM_MIB = 256


def main() -> int:
    """Run it and say what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--execs", type=int, default=10_000)
    options.add_argument("--at-once", type=int, default=200)
    options.add_argument("--image")
    asked = options.parse_args()
    images = Layout(paths.data_dir()).images
    image = image_to_use(images, asked.image)
    with scratch_directory(paths.data_dir()) as data_dir:
        link_image(images / image, Layout(data_dir).images / image)
        (data_dir / "server.toml").write_text(f"max_ws_sessions = {asked.at_once + 8}\n[pool]\nsize = 0\n")
        environment = {**os.environ, "NOID_DATA_DIR": str(data_dir)}
        noid = [str(Path(sys.executable).with_name("noid"))]
        with agent_process(data_dir, environment):
            subprocess.run(
                [*noid, "create", "endurance", "--image", image, "--mem", str(MEM_MIB)], env=environment, check=True
            )
            try:
                return endure(data_dir, asked.execs, asked.at_once)
            finally:
                subprocess.run([*noid, "destroy", "--yes", "endurance"], env=environment, check=True)


def endure(data_dir: Path, execs: int, at_once: int) -> int:
    """Do both, and return the exit code."""
    server_pid = int((data_dir / "agent.lock").read_text())
    (vmm_pid,) = {found.pid for found in processes.find(data_dir)} - {server_pid}
    endurance = Endurance(
        endpoint=Endpoint(socket_path=str(paths.socket_path(data_dir))),
        vm="endurance",
        server_pid=server_pid,
        vmm_pid=vmm_pid,
    )
    endurance.in_a_row(WARM_UP)
    endurance.at_once(at_once)
    before = endurance.footprint()
    print(f"after warming up: {before}", flush=True)
    grown = []
    for what, run, count in (("in a row", endurance.in_a_row, execs), ("at once", endurance.at_once, at_once)):
        began = time.monotonic()
        run(count)
        after = endurance.footprint()
        print(f"{count} {what} ({time.monotonic() - began:.1f} s): {after}", flush=True)
        grown += [f"{count} {what}: {line}" for line in after.growth(before)]
    print("\n".join(f"GREW {line}" for line in grown) or "nothing grew")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
