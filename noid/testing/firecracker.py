"""A Firecracker without KVM: a program that answers as the real one does, with a made-up guest, and fails on demand.

::

    simulated = SimulatedFirecracker(tmp_path)
    config = FirecrackerConfig(binary=str(simulated.program))
    simulated.arm("PUT /snapshot/create", "die", when="during")

Order rules, statuses and texts of errors are those of the real API (`noid.testing.firecracker_api`); its guest is that
of `noid.testing.simulated_vmm`, and its agent answers to `noid.testing.simulated_exec` behind the vsock's handshake.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import noid

_STARTER = """#!{python} -ISs
import sys
sys.path.append({root!r})
sys.argv.insert(1, {directory!r})
from noid.testing.firecracker_process import main
main()
"""
WHATS = frozenset({"refuse", "garble", "hang", "cut", "die", "late", "kill"})
WHENS = frozenset({"before", "during", "after"})


class SimulatedFirecracker:
    """The program in *directory*, which is made.

    Args:
        directory: Of its own.
        version: What it says it is.
        kvm: ``works``, or ``dead``: guests start and never do anything.
    """

    def __init__(self, directory: Path, *, version: str = "1.17.0-dev", kvm: str = "works") -> None:
        self.directory = directory
        self.program = directory / "firecracker"
        self._numbers = itertools.count(1)
        (directory / "faults").mkdir(parents=True)
        (directory / "setup.json").write_text(json.dumps({"version": version, "kvm": kvm}))
        root = str(Path(noid.__file__).parents[1])
        starter = _STARTER.format(python=sys.executable, root=root, directory=str(directory))
        self.program.write_text(starter)
        self.program.chmod(0o755)

    def arm(
        self,
        call: str,
        what: str,
        *,
        when: str = "before",
        text: str = "refused on demand",
        secs: float = 1.0,
        nth: int = 1,
        pid: int = 0,
    ) -> None:
        """Let something go wrong once, at the next *call*: a method and a path, or ``start``.

        Args:
            call: Such as ``PUT /machine-config`` or ``PATCH /vm``.
            what: ``refuse`` (400), ``garble`` (400, with a body that is no JSON, as the real one's HTTP layer says it),
                ``hang`` (no answer, for ever), ``cut`` (the connection), ``die`` (SIGKILL), ``late``, or ``kill``:
                another process is killed and the call goes on.
            when: ``before`` the call has its effect, ``after``, or, of ``PUT /snapshot/create``, ``during``. What is
                refused has no effect.
            text: What a refusal says.
            secs: How much later a late answer comes.
            nth: Which *call* from now on, of all processes of this program.
            pid: Who is killed.

        Raises:
            ValueError: there is no such thing.
        """
        if what not in WHATS or when not in WHENS:
            raise ValueError(f"{what!r} {when!r}: use one of {sorted(WHATS)} and one of {sorted(WHENS)}")
        partial = self.directory / "faults" / f"{next(self._numbers):03}.partial"
        fault = {"call": call, "what": what, "when": when, "text": text, "secs": secs, "nth": nth, "pid": pid}
        partial.write_text(json.dumps(fault))
        partial.rename(partial.with_suffix(".armed"))

    def disarm(self) -> None:
        """Forget what has not happened."""
        for path in (self.directory / "faults").glob("*.armed"):
            path.unlink()

    def struck(self) -> bool:
        """Whether all that was armed has happened."""
        return not list((self.directory / "faults").glob("*.armed"))

    def calls(self) -> list[str]:
        """Return what all processes of this program were asked, in order."""
        try:
            return (self.directory / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
