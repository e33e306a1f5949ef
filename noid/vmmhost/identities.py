"""A user id for each VM's process, out of a range nobody else uses.

What keeps VMs apart is that no two living processes have the same one; files of VMs are only reached by who has them in
its room. So nothing is written down: the kernel knows who lives.
"""

from __future__ import annotations

import random
from pathlib import Path

from noid.errors import BackendError


class Identities:
    """The user ids of *uids* but the first, which is the group of all of them. *taken* ones are not given."""

    def __init__(self, uids: range, taken: set[int]) -> None:
        self.group = uids.start
        self._first = uids.start + 1
        self._count = len(uids) - 1
        self._taken = taken
        self._next = random.randrange(self._count)  # noqa: S311  # two agents with one range shall seldom meet

    def take(self) -> int:
        """Return a user id that no process has, and nobody gets before `release`.

        Raises:
            BackendError: there is none left.
        """
        for _ in range(self._count):
            uid = self._first + self._next
            self._next = (self._next + 1) % self._count
            if uid not in self._taken:
                self._taken.add(uid)
                return uid
        raise BackendError(
            f"all {self._count} user ids of [sandbox] uids are in use. Destroy VMs, or make the range larger."
        )

    def adopt(self, uid: int) -> None:
        """Keep *uid* taken, which a process of an earlier agent has; one that is not ours to give is passed over."""
        if self._first <= uid < self._first + self._count:
            self._taken.add(uid)

    def release(self, uid: int) -> None:
        """Let *uid* be given again. Its process has ended."""
        self._taken.discard(uid)


def user_of(pid: int) -> tuple[int, int] | None:
    """Return the user and the group id the process *pid* acts as, or None: there is none.

    Its directory's owner says less: that is root, too, where a process has changed its user.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    ids = {line.split()[0]: int(line.split()[2]) for line in lines if line.startswith(("Uid:", "Gid:"))}
    return (ids["Uid:"], ids["Gid:"]) if len(ids) == 2 else None


def users_within(uids: range) -> set[int]:
    """Return the user ids of *uids* that processes have. Reads all of ``/proc``."""
    found = (user_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {user[0] for user in found if user is not None and user[0] in uids}
