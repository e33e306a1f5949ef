"""Loading plugins and choosing backends. The only module that talks to pluggy."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from noid import hookspecs
from noid.core.backends import (
    AuthBackend,
    BackendSpec,
    ExecBackend,
    NetworkBackend,
    StorageBackend,
    VmmBackend,
    VmmFeatures,
)
from noid.core.config import Config, build_record
from noid.errors import ConfigError

logger = logging.getLogger(__name__)

GROUP = "noid"
KINDS = ("vmm", "storage", "exec", "network", "auth")
_ENTRY_PREFIX = {"vmm": "vmm", "storage": "storage", "exec": "exec", "network": "net", "auth": "auth"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPlugin:
    """A plugin as `noid-server plugins` lists it. *error* says why it could not be imported."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    error: str | None = None


class Plugins:
    """The plugins of one agent: every installed one, minus *disabled*, plus the objects given.

    A value, not a global: tests pass plugin objects. A plugin that fails to import is remembered and becomes an error
    only when it is selected.
    """

    def __init__(self, *extra: object, disabled: Collection[str] = ()) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self.loaded: list[LoadedPlugin] = []
        found: list[tuple[str, object]] = []
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
            if entry.name in disabled:
                continue
            name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
            try:
                plugin = entry.load()
            except Exception as error:
                logger.warning("plugin %s of %s %s failed to import: %s", entry.name, name, version, error)
                self.loaded.append(
                    LoadedPlugin(name=entry.name, distribution=name, version=version, error=str(error) or repr(error))
                )
                continue
            found.append((entry.name, plugin))
            hooks = tuple(h for h in dir(hookspecs) if hasattr(plugin, h) and hasattr(getattr(plugin, h), "noid_impl"))
            self.loaded.append(LoadedPlugin(name=entry.name, distribution=name, version=version, hooks=hooks))
        found += [(getattr(plugin, "name", type(plugin).__name__), plugin) for plugin in extra]
        for name, plugin in reversed(found):  # pluggy calls the last registered first; hooks promise name order
            self._manager.register(plugin, name)

    @property
    def hook(self) -> Any:
        """The relay of pluggy: ``plugins.hook.on_event(event=...)``. Arguments by keyword only."""
        return self._manager.hook

    def initrd_files(self, architecture: str) -> dict[str, bytes]:
        """Return what every guest's initrd carries.

        Raises:
            ConfigError: two plugins offer one path.
        """
        files: dict[str, bytes] = {}
        for offered in self.hook.initrd_files(architecture=architecture):
            for path in offered.keys() & files.keys():
                raise ConfigError(f"two plugins put {path!r} into the initrd. Remove one of them.")
            files.update(offered)
        return files

    def vmm(self, config: Config) -> tuple[BackendSpec[VmmBackend], Any]:
        """Return the selected VMM's spec and its configuration."""
        name = config.backends.vmm
        if name == "auto":
            name = self.hook.probe_vmm() or self._nothing("vmm")
        return self._select("vmm", name, config)

    def storage(self, config: Config, vmm: VmmFeatures) -> tuple[BackendSpec[StorageBackend], Any]:
        """Return the selected storage's spec and its configuration."""
        name = config.backends.storage
        if name == "auto":
            probe = self.hook.probe_storage
            name = probe(data_dir=config.data_dir, vmm_disk_formats=vmm.disk_formats) or self._nothing("storage")
        return self._select("storage", name, config)

    def execs(self, config: Config) -> list[tuple[BackendSpec[ExecBackend], Any]]:
        """Return the selected exec backends, preferred first."""
        return [self._select("exec", name, config) for name in config.backends.exec]

    def network(self, config: Config) -> tuple[BackendSpec[NetworkBackend], Any]:
        """Return the selected network's spec and its configuration."""
        return self._select("network", config.backends.network, config)

    def auth(self, config: Config) -> tuple[BackendSpec[AuthBackend], Any]:
        """Return the selected keeper of tokens and its configuration."""
        return self._select("auth", config.backends.auth, config)

    def offers(self, kind: str) -> dict[str, BackendSpec[Any]]:
        """Return every backend of *kind* on offer, by name.

        Raises:
            ConfigError: two plugins offer one name.
        """
        specs: dict[str, BackendSpec[Any]] = {}
        for offered in getattr(self.hook, f"{kind}_backend")():
            for spec in offered if isinstance(offered, list | tuple) else [offered]:
                if spec.name in specs:
                    raise ConfigError(f"two plugins offer a {kind} backend named {spec.name!r}. Remove one of them.")
                specs[spec.name] = spec
        return specs

    def _select(self, kind: str, name: str, config: Config) -> tuple[BackendSpec[Any], Any]:
        offers = self.offers(kind)
        spec = offers.get(name)
        section = f"{_ENTRY_PREFIX[kind]}_{name}"
        if spec is None:
            for plugin in self.loaded:
                if plugin.error and plugin.name == section:
                    raise ConfigError(
                        f"the {kind} backend {name!r} is plugin {plugin.name} of {plugin.distribution} "
                        f"{plugin.version}, which cannot be imported: {plugin.error}."
                    )
            known = ", ".join(sorted(offers)) or "none"
            raise ConfigError(f"there is no {kind} backend {name!r}. [backends] {kind} may be: {known}.")
        where = f"{config.source or 'configuration'}: [plugins.{section}]"
        table: Mapping[str, Any] = config.plugins.get(section, {})
        return spec, build_record(spec.config, table, where)

    def _nothing(self, kind: str) -> str:
        raise ConfigError(
            f'no plugin found a {kind} backend for "auto" on this host. Name one in server.toml [backends] {kind}: '
            f"{', '.join(sorted(self.offers(kind))) or 'none is installed'}."
        )
