"""Loading plugins and choosing backends. The only module that talks to pluggy."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
from noid.core.config.reading import build_record
from noid.core.config.settings import Config
from noid.errors import ConfigError

logger = logging.getLogger(__name__)

GROUP = "noid"
KINDS = ("vmm", "storage", "exec", "network", "auth")
_HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, f"{GROUP}_spec"))
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
        self._disabled = frozenset(disabled)
        found: list[tuple[str, object]] = []
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
            if entry.name in disabled:
                continue
            name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
            try:
                plugin = entry.load()
            except Exception as error:
                logger.warning("plugin %s of %s %s failed to import: %s", entry.name, name, version, error)
                cause = f"{type(error).__name__}: {error}" if str(error) else repr(error)
                self.loaded.append(LoadedPlugin(name=entry.name, distribution=name, version=version, error=cause))
                continue
            found.append((entry.name, plugin))
            hooks = _implemented(plugin)
            self.loaded.append(LoadedPlugin(name=entry.name, distribution=name, version=version, hooks=hooks))
        for plugin in extra:
            if not any(plugin is other for _, other in found):
                named = getattr(plugin, "name", None) or getattr(plugin, "__name__", type(plugin).__name__)
                found.append((str(named), plugin))
        for name, plugin in sorted(found, key=lambda pair: pair[0], reverse=True):
            self._register(name, plugin)  # pluggy calls the last registered first; hooks promise name order
        self._offers: dict[str, dict[str, BackendSpec[Any]]] = {}

    def _register(self, name: str, plugin: object) -> None:
        """Register *plugin*; one whose hooks are not as specified counts as one that cannot be imported.

        Raises:
            ConfigError: another plugin has that name.
        """
        if self._manager.has_plugin(name):
            raise ConfigError(f"there are two plugins named {name!r}. Uninstall one of their distributions.")
        problem: str | None = None
        unknown = [hook for hook in _implemented(plugin) if not hasattr(hookspecs, hook)]
        if unknown:
            near = difflib.get_close_matches(unknown[0], _HOOKS, n=1)
            problem = f"it implements the unknown hook {unknown[0]!r}" + (f" (is {near[0]!r} meant?)" if near else "")
        else:
            try:
                self._manager.register(plugin, name)
            except pluggy.PluginValidationError as error:
                if self._manager.is_registered(plugin):  # depends on pluggy's version
                    self._manager.unregister(plugin)
                problem = " ".join(str(error).split())
        if problem is not None:
            logger.warning("plugin %s is not used: %s", name, problem)
            listed = [known for known in self.loaded if known.name == name]
            if not listed:
                raise ConfigError(f"plugin {name!r} cannot be used: {problem}.")
            self.loaded[self.loaded.index(listed[0])] = replace(listed[0], hooks=(), error=problem)

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
        if not config.backends.exec:
            raise ConfigError(f"[backends] exec is empty. Name one of: {', '.join(sorted(self.offers('exec')))}.")
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
        if kind in self._offers:
            return self._offers[kind]
        specs: dict[str, BackendSpec[Any]] = {}
        for offered in getattr(self.hook, f"{kind}_backend")():
            for spec in offered if isinstance(offered, list | tuple) else [offered]:
                if spec.name in specs:
                    raise ConfigError(f"two plugins offer a {kind} backend named {spec.name!r}. Remove one of them.")
                specs[spec.name] = spec
        self._offers[kind] = specs
        return specs

    def check(self, config: Config) -> None:
        """Refuse what names no backend or sets one up wrongly, as far as that can be said without trying any.

        Raises:
            ConfigError: says what there may be.
        """
        self.check_sections(config)
        self.execs(config)
        for kind in KINDS:
            name = getattr(config.backends, kind)
            if isinstance(name, str) and name != "auto":
                self._select(kind, name, config)

    def check_sections(self, config: Config) -> None:
        """Refuse a ``[plugins.*]`` section that belongs to no plugin: its settings would be ignored without a word.

        Raises:
            ConfigError: names the nearest section there may be.
        """
        known = {f"{_ENTRY_PREFIX[kind]}_{name}" for kind in KINDS for name in self.offers(kind)}
        known |= {plugin.name for plugin in self.loaded} | self._disabled
        for section in sorted(config.plugins.keys() - known):
            near = difflib.get_close_matches(section, known, n=1)
            hint = f"Did you mean [plugins.{near[0]}]?" if near else f"There may be: {', '.join(sorted(known))}."
            raise ConfigError(f"{config.source or 'configuration'}: [plugins.{section}] is of no plugin. {hint}")

    def _select(self, kind: str, name: str, config: Config) -> tuple[BackendSpec[Any], Any]:
        offers = self.offers(kind)
        spec = offers.get(name)
        section = f"{_ENTRY_PREFIX[kind]}_{name}"
        if spec is None:
            failed = [plugin for plugin in self.loaded if plugin.error]
            for plugin in failed:
                if plugin.name == section:
                    raise ConfigError(f"the {kind} backend {name!r} is {_failure(plugin)}.")
            known = ", ".join(sorted(offers)) or "none"
            others = "".join(f" Not to be had is {_failure(plugin)}." for plugin in failed)
            raise ConfigError(f"there is no {kind} backend {name!r}. [backends] {kind} may be: {known}.{others}")
        where = f"{config.source or 'configuration'}: [plugins.{section}]"
        table: Mapping[str, Any] = config.plugins.get(section, {})
        return spec, build_record(spec.config, table, where)

    def _nothing(self, kind: str) -> str:
        raise ConfigError(
            f'no plugin found a {kind} backend for "auto" on this host. Name one in server.toml [backends] {kind}: '
            f"{', '.join(sorted(self.offers(kind))) or 'none is installed'}."
        )


def _implemented(plugin: object) -> tuple[str, ...]:
    """Return the hooks *plugin* says it implements, sorted; without those it says need not exist here."""
    found = []
    for name in dir(plugin):
        options = getattr(getattr(plugin, name, None), f"{GROUP}_impl", None)
        if isinstance(options, dict) and not (options.get("optionalhook") and name not in _HOOKS):
            found.append(options.get("specname") or name)
    return tuple(sorted(found))


def _failure(plugin: LoadedPlugin) -> str:
    return (
        f"plugin {plugin.name} of {plugin.distribution} {plugin.version}".rstrip()
        + f", which cannot be imported: {plugin.error}"
    )
