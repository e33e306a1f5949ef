"""What the lifecycle works with: one agent's open backends and its store, images and supervisor, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from noid.core.backends import NetworkBackend, StorageBackend, VmmBackend
from noid.core.config.settings import Config
from noid.core.database.store import Store
from noid.core.events import Events
from noid.core.images import Images
from noid.core.layout import Layout
from noid.core.people.quotas import Quotas
from noid.core.plugins import Plugins
from noid.core.vms.supervisor import Supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything an operation may need. Lives as long as the agent."""

    config: Config
    layout: Layout
    plugins: Plugins
    store: Store
    images: Images
    vmm: VmmBackend
    storage: StorageBackend
    network: NetworkBackend
    supervisor: Supervisor
    events: Events
    quotas: Quotas
