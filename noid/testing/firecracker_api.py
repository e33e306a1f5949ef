"""What Firecracker's API allows when, and what it answers: statuses and texts as recorded from the real one.

``tests/vmm_firecracker/recorded.json`` is the recording, and replayed against this. Standard library only.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noid.testing.firecracker_machine import KernelInvalid, RestoreError, SimulatedMicroVm, restored, runs_trial
from noid.testing.simulated_tap import attached

Answer = tuple[int, Any]
_CMDLINE_BYTES_MAX = 2048
_VCPUS_MAX = 32
_SERDE = "An error occurred when deserializing the json body of a request"
_PRE_BOOT = "The requested operation is not supported before starting the microVM."
_POST_BOOT = "The requested operation is not supported after starting the microVM."
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what is known, and what must be there
    "machine-config": (
        ("vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"),
        ("vcpu_count", "mem_size_mib"),
    ),
    "boot-source": (("kernel_image_path", "initrd_path", "boot_args"), ("kernel_image_path",)),
    "vm": (("state",), ("state",)),
    "actions": (("action_type",), ("action_type",)),
    "snapshot/create": (
        ("snapshot_type", "snapshot_path", "mem_file_path"),
        ("snapshot_path", "mem_file_path"),
    ),
    "snapshot/load": (
        (
            "snapshot_path", "mem_file_path", "mem_backend", "enable_diff_snapshots", "track_dirty_pages", "resume_vm",
            "network_overrides", "vsock_override", "clock_realtime", "huge_pages",
        ),
        ("snapshot_path",),
    ),
    "vsock": (("guest_cid", "uds_path", "vsock_id"), ("guest_cid", "uds_path")),
}  # fmt: skip
_SINCE: dict[str, tuple[int, int]] = {
    "network_overrides": (1, 12), "track_dirty_pages": (1, 13), "vsock_override": (1, 16), "clock_realtime": (1, 16),
    "huge_pages": (1, 17),
}  # fmt: skip


Interrupt = Callable[[], object]
"""What happens in the middle of a call."""


class Refusal(Exception):
    """A request that is answered with 400. Its text is Firecracker's."""


class Api:
    """One Firecracker: what it was told, and its machine once that runs."""

    def __init__(self, *, version: str, kvm: str, name: str, selector: selectors.BaseSelector) -> None:
        self.machine: SimulatedMicroVm | None = None
        self.exit_status: int | None = None
        self._version = version
        self._kvm = kvm
        self._name = name
        self._selector = selector
        self._boot_path = False
        self._shape: dict[str, Any] = {"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": False}
        self._boot: dict[str, Any] | None = None
        self._drives: dict[str, dict[str, Any]] = {}
        self._cards: dict[str, dict[str, Any]] = {}
        self._vsock: dict[str, Any] | None = None
        self._listener: socket.socket | None = None

    def handle(self, method: str, path: str, body: bytes | None, interrupt: Interrupt | None) -> Answer:
        """Do what is asked and return status and content."""
        try:
            return self._handle(method, path.strip("/"), body, interrupt)
        except Refusal as refusal:
            return 400, {"fault_message": str(refusal)}

    def _handle(self, method: str, path: str, body: bytes | None, interrupt: Interrupt | None) -> Answer:
        kind, _, rest = path.partition("/")
        if method == "GET" and body is None:
            return self._get(kind, path)
        if body is None and method in ("PUT", "PATCH"):
            raise Refusal(f"Empty {method} request.")
        calls: dict[tuple[str, str], Callable[[dict[str, Any]], None]] = {
            ("PUT", "machine-config"): self._machine_config,
            ("PUT", "boot-source"): self._boot_source,
            ("PUT", "drives"): lambda content: self._drive(rest, content),
            ("PUT", "network-interfaces"): lambda content: self._card(rest, content),
            ("PUT", "vsock"): self._put_vsock,
            ("PUT", "entropy"): self._accept_device,
            ("PUT", "balloon"): self._accept_device,
            ("PUT", "metrics"): self._accept,
            ("PUT", "logger"): self._accept,
            ("PUT", "actions"): self._action,
            ("PATCH", "vm"): self._state,
        }
        if kind == "snapshot" and method == "PUT" and rest in ("create", "load"):
            content = _parsed(f"snapshot/{rest}", body or b"", self._version)
            return self._create(content, interrupt) if rest == "create" else self._load(content)
        if (method, kind) not in calls:
            raise Refusal(f"Invalid request method and/or path: {method} {f'/{path}' if kind == 'snapshot' else kind}.")
        calls[method, kind](_parsed(kind, body or b"", self._version))
        return 204, None

    # --- reading ---------------------------------------------------------------------------------------------------

    def _get(self, kind: str, path: str) -> Answer:
        if not path:
            state = "Not started" if self.machine is None else "Paused" if self.machine.is_paused else "Running"
            facts = {"id": self._name, "state": state, "vmm_version": self._version, "app_name": "Firecracker"}
            return 200, facts
        if path == "version":
            return 200, {"firecracker_version": self._version}
        if path == "machine-config":
            shape = {name: self._shape[name] for name in ("vcpu_count", "mem_size_mib")}
            tracked = self._shape["track_dirty_pages"]
            return 200, {**shape, "smt": False, "track_dirty_pages": tracked, "huge_pages": "None"}
        raise Refusal(f"Invalid request method and/or path: GET {kind}.")

    # --- before the start ------------------------------------------------------------------------------------------

    def _accept(self, _: dict[str, Any]) -> None:
        if self.machine is not None:
            raise Refusal(_POST_BOOT)

    def _accept_device(self, content: dict[str, Any]) -> None:
        self._accept(content)
        self._boot_path = True

    def _machine_config(self, content: dict[str, Any]) -> None:
        self._accept_device(content)
        if not 0 < content["vcpu_count"] <= _VCPUS_MAX:
            raise Refusal(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an "
                "even number if SMT is enabled."
            )
        if content["mem_size_mib"] <= 0:
            raise Refusal(
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page "
                "size."
            )
        self._shape = {"track_dirty_pages": False, **content}

    def _boot_source(self, content: dict[str, Any]) -> None:
        self._accept_device(content)
        if not Path(content["kernel_image_path"]).exists():
            raise Refusal("Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)")
        if content.get("initrd_path") is not None and not Path(content["initrd_path"]).exists():
            raise Refusal(
                "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. "
                "No such file or directory (os error 2)"
            )
        if len(content.get("boot_args") or "") > _CMDLINE_BYTES_MAX:
            raise Refusal("Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided.")
        self._boot = content

    def _drive(self, drive_id: str, content: dict[str, Any]) -> None:
        if content.get("drive_id") != drive_id:
            raise Refusal("The id from the path does not match the id from the body!")
        self._accept_device(content)
        _see_disk(content["path_on_host"])
        self._drives[drive_id] = content

    def _card(self, card_id: str, content: dict[str, Any]) -> None:
        if content.get("iface_id") != card_id:
            raise Refusal("The id from the path does not match the id from the body!")
        self._accept_device(content)
        _connect_card(content["host_dev_name"])
        self._cards[card_id] = content

    def _put_vsock(self, content: dict[str, Any]) -> None:
        self._accept_device(content)
        listener = _bound_vsock(content["uds_path"])
        if self._listener is not None:
            self._listener.close()
        self._vsock, self._listener = content, listener

    def _action(self, content: dict[str, Any]) -> None:
        kinds = ("FlushMetrics", "InstanceStart", "SendCtrlAltDel")
        if content["action_type"] not in kinds:
            raise Refusal(_unknown_variant(content["action_type"], kinds, content))
        if content["action_type"] != "InstanceStart":
            if self.machine is None:
                raise Refusal(_PRE_BOOT)
            if content["action_type"] == "SendCtrlAltDel":
                self.machine.restart()
            return
        if self.machine is not None:
            raise Refusal(_POST_BOOT)
        if self._boot is None:
            raise Refusal("Start microvm error: Cannot start microvm without kernel configuration.")
        self._start(self._boot)

    def _start(self, boot: dict[str, Any]) -> None:
        if runs_trial(boot["kernel_image_path"], works=self._kvm == "works"):
            return
        try:
            self.machine = SimulatedMicroVm.booted(
                boot, self._shape, self._drives, self._vsock, self._listener, self._selector
            )
        except KernelInvalid as error:
            raise Refusal(
                "Start microvm error: System configuration error: Cannot load kernel due to invalid memory "
                "configuration or invalid kernel image: Kernel Loader: failed to load bzImage kernel image: Kernel "
                "Loader: Invalid bzImage"
            ) from error
        self.machine.cards = self._cards

    # --- while it runs ---------------------------------------------------------------------------------------------

    def _state(self, content: dict[str, Any]) -> None:
        if content["state"] not in ("Paused", "Resumed"):
            raise Refusal(_unknown_variant(content["state"], ("Paused", "Resumed"), content))
        if self.machine is None:
            raise Refusal(_PRE_BOOT)
        if content["state"] == "Paused":
            self.machine.pause()
        else:
            self.machine.resume()

    def _create(self, content: dict[str, Any], interrupt: Interrupt | None) -> Answer:
        if self.machine is None:
            raise Refusal(_PRE_BOOT)
        if not self.machine.is_paused:
            raise Refusal(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: "
                "save/restore unavailable while running"
            )
        what = "snapshot backing file"
        try:
            self.machine.save_state(Path(content["snapshot_path"]))
            if interrupt is not None:
                interrupt()
            what = "memory backing file"
            diff = content.get("snapshot_type", "Full") == "Diff"
            self.machine.save_memory(Path(content["mem_file_path"]), diff=diff)
        except OSError as error:
            step = "open" if error.filename else "write"
            text = f"{error.strerror} (os error {error.errno})"
            raise Refusal(f"Create snapshot error: Cannot perform {step} on the {what}: {text}") from error
        return 204, None

    def _load(self, content: dict[str, Any]) -> Answer:
        if (content.get("mem_backend") is None) == (content.get("mem_file_path") is None):
            many = content.get("mem_backend") is not None
            text = "exclusively is required" if many else "is required"
            what = "too many fields" if many else "missing field"
            raise Refusal(f"{_SERDE}: {what}: either `mem_backend` or `mem_file_path` {text}.")
        if self.machine is not None:
            raise Refusal(_POST_BOOT)
        if self._boot_path:
            raise Refusal(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        memory = (content.get("mem_backend") or {}).get("backend_path") or content["mem_file_path"]
        try:
            self.machine = restored(
                content,
                memory,
                self._version,
                self._selector,
                bind=_bound_vsock,
                see_disk=_see_disk,
                connect=attached,
            )
        except (RestoreError, Refusal) as error:
            self.exit_status = 1  # too dirty to recover, the real one says
            raise Refusal(f"Load snapshot error: Failed to restore from snapshot: {error}") from error
        return 204, None


def _see_disk(path: str) -> None:
    if not Path(path).exists():
        raise Refusal(
            "Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating "
            f"the backing file: No such file or directory (os error 2) {path}"
        )


def _connect_card(tap: str) -> None:
    try:
        attached(tap)  # the descriptor is the process's, until it ends
    except OSError as error:
        raise Refusal(
            "Network config error: Could not create the network device: Open tap device failed: Error while creating "
            f"ifreq structure: {error.strerror} (os error {error.errno}). Invalid TUN/TAP Backend provided by {tap}. "
            "Check our documentation on setting up the network devices."
        ) from error


def _bound_vsock(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise Refusal(
            "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: "
            f"{error.strerror} (os error {error.errno})"
        ) from error
    listener.listen(8)
    listener.setblocking(False)
    return listener


def _parsed(kind: str, body: bytes, version: str) -> dict[str, Any]:
    """Return the body as the real one reads it: unknown and missing fields are errors, with their place."""
    text = body.decode()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Refusal(f"{_SERDE}: EOF while parsing an object at line 1 column {len(text)}.") from error
    known, needed = _FIELDS.get(kind, ((), ()))
    number = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    known = tuple(name for name in known if _SINCE.get(name, (0, 0)) <= number)
    for name in content if known else ():
        if name not in known:
            listed = ", ".join(f"`{field}`" for field in known)
            column = text.index(f'"{name}"') + len(name) + 2
            raise Refusal(f"{_SERDE}: unknown field `{name}`, expected one of {listed} at line 1 column {column}.")
    for name in needed:
        if name not in content:
            raise Refusal(f"{_SERDE}: missing field `{name}` at line 1 column {len(text)}.")
    return dict(content)


def _unknown_variant(value: str, variants: tuple[str, ...], content: dict[str, Any]) -> str:
    names = [f"`{variant}`" for variant in variants]
    listed = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
    return f"{_SERDE}: unknown variant `{value}`, expected {listed} at line 1 column {len(json.dumps(content)) - 1}."
