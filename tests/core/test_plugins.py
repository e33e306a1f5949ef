"""Plugins: how they are found, how the backend is chosen, and what a broken one does to the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from noid import hookspecs
from noid.core.backends import BackendSpec, VmmFeatures
from noid.core.config.settings import Backends, Config
from noid.core.plugins import KINDS, Plugins
from noid.errors import ConfigError
from noid.hookspecs import hookimpl

FEATURES = VmmFeatures(
    accelerator="none", disk_formats=frozenset({"raw"}), disk_pivot=False, network_kinds=frozenset({"none"})
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    limit: int = 1
    path: Path | None = None


def spec(name: str) -> BackendSpec[Any]:
    @contextlib.asynccontextmanager
    async def opened(_config: Settings, _context: object) -> AsyncIterator[object]:
        yield object()

    return BackendSpec(name, Settings, opened)


class Offers:
    """A plugin that offers VMM and storage backends of the given names."""

    def __init__(self, name: str, *vmms: str, probe: str | None = None) -> None:
        self.name = name
        self._vmms = vmms
        self._probe = probe

    @hookimpl
    def vmm_backend(self) -> list[BackendSpec[Any]]:
        return [spec(name) for name in self._vmms]

    @hookimpl
    def storage_backend(self) -> BackendSpec[Any]:
        return spec(f"{self.name}_storage")

    @hookimpl
    def probe_vmm(self) -> str | None:
        return self._probe

    @hookimpl
    def probe_storage(self, data_dir: Path, vmm_disk_formats: frozenset[str]) -> str | None:
        return f"{self.name}_storage" if "raw" in vmm_disk_formats else None

    @hookimpl
    def boot_args(self) -> list[str]:
        return [self.name]


def config(*, vmm: str = "auto", storage: str = "auto", **sections: dict[str, Any]) -> Config:
    return Config(data_dir=Path("/nowhere"), backends=Backends(vmm=vmm, storage=storage), plugins=sections)


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one module and its entry point, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(entry: str, source: str, *, distribution: str, module: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[noid]\n{entry} = {module}\n")
        importlib.invalidate_caches()

    return install


WORKING = """
import contextlib, dataclasses
from noid.core.backends import BackendSpec
from noid.hookspecs import hookimpl

@dataclasses.dataclass
class Settings:
    pass

@contextlib.asynccontextmanager
async def opened(config, context):
    yield None

@hookimpl
def vmm_backend():
    return BackendSpec("fancy", Settings, opened)
"""


# --- finding ---------------------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_and_listed_with_its_distribution(install: Install) -> None:
    install("vmm_fancy", WORKING, distribution="noid-fancy", module="noid_fancy_found")
    plugins = Plugins()
    assert plugins.vmm(config(vmm="fancy"))[0].name == "fancy"
    listed = {plugin.name: plugin for plugin in plugins.loaded}["vmm_fancy"]
    assert (listed.distribution, listed.version, listed.hooks) == ("noid-fancy", "1.2", ("vmm_backend",))
    assert listed.error is None


def test_a_plugin_that_cannot_be_imported_is_an_error_only_when_it_is_selected(install: Install) -> None:
    install("vmm_fancy", "import no_such_thing", distribution="noid-fancy", module="noid_fancy_broken")
    plugins = Plugins(Offers("plain", "plain"))
    assert plugins.vmm(config(vmm="plain"))[0].name == "plain"
    with pytest.raises(ConfigError) as refused:
        plugins.vmm(config(vmm="fancy"))
    for fact in ("vmm_fancy", "noid-fancy", "1.2", "ModuleNotFoundError", "no_such_thing"):
        assert fact in str(refused.value)


def test_a_plugin_of_another_name_that_could_not_be_imported_is_mentioned_too(install: Install) -> None:
    install("acme", "1 / 0", distribution="acme-noid", module="acme_noid_broken")
    with pytest.raises(ConfigError, match=r"no vmm backend 'fancy'.*plugin acme of acme-noid 1\.2.*ZeroDivisionError"):
        Plugins().vmm(config(vmm="fancy"))


def test_a_disabled_plugin_is_not_imported(install: Install) -> None:
    install("vmm_fancy", "raise SystemExit", distribution="noid-fancy", module="noid_fancy_disabled")
    plugins = Plugins(disabled=["vmm_fancy"])
    assert "vmm_fancy" not in [plugin.name for plugin in plugins.loaded]
    plugins.check_sections(config(vmm_fancy={}))


@pytest.mark.parametrize(
    ("hook", "says"),
    [("def vm_backend(): pass", r"unknown hook 'vm_backend' \(is 'vmm_backend' meant\?\)"),
     ("def on_event(evnt): pass", "evnt")],
)  # fmt: skip
def test_a_hook_that_is_not_as_specified_counts_as_not_importable(install: Install, hook: str, says: str) -> None:
    source = f"from noid.hookspecs import hookimpl\n@hookimpl\n{hook}\n"
    install("vmm_fancy", source, distribution="noid-fancy", module=f"noid_fancy_{hook[4:6]}")
    plugins = Plugins(Offers("plain", "plain"))
    assert plugins.vmm(config(vmm="plain"))[0].name == "plain"
    with pytest.raises(ConfigError, match=says):
        plugins.vmm(config(vmm="fancy"))


def test_a_hook_of_a_newer_noid_may_be_marked_as_optional(install: Install) -> None:
    source = "from noid.hookspecs import hookimpl\n@hookimpl(optionalhook=True)\ndef quantum(): pass\n"
    install("vmm_fancy", source, distribution="noid-fancy", module="noid_fancy_optional")
    assert {plugin.name: plugin.error for plugin in Plugins().loaded}["vmm_fancy"] is None


def test_two_plugins_of_one_name_are_an_error(install: Install) -> None:
    install("vmm_fancy", WORKING, distribution="noid-fancy", module="noid_fancy_one")
    install("vmm_fancy", WORKING, distribution="noid-fancier", module="noid_fancy_two")
    with pytest.raises(ConfigError, match="two plugins named 'vmm_fancy'"):
        Plugins()


def test_an_installed_plugin_given_again_is_one_plugin() -> None:
    import noid_storage_copy

    assert "copy" in Plugins(noid_storage_copy).offers("storage")


# --- choosing --------------------------------------------------------------------------------------------------------


def test_two_offers_of_one_name_are_an_error() -> None:
    plugins = Plugins(Offers("a", "fancy"), Offers("b", "fancy"))
    with pytest.raises(ConfigError, match="two plugins offer a vmm backend named 'fancy'"):
        plugins.vmm(config(vmm="fancy"))


def test_auto_takes_what_the_first_probe_in_name_order_names() -> None:
    plugins = Plugins(Offers("b", "two", probe="two"), Offers("a", "one"), Offers("0", "zero", probe="zero"))
    assert plugins.vmm(config())[0].name == "zero"
    assert plugins.storage(config(), FEATURES)[0].name == "0_storage"


def test_auto_for_which_nobody_has_an_answer_says_what_there_is() -> None:
    installed = [entry.name for entry in Plugins().loaded]
    plugins = Plugins(Offers("a", "one"), disabled=installed)
    with pytest.raises(ConfigError, match=r'for "auto" on this host.*\[backends\] vmm: one'):
        plugins.vmm(config())


def test_the_disk_formats_of_the_vmm_reach_the_probe() -> None:
    plugins = Plugins(Offers("a", "one"), disabled=[entry.name for entry in Plugins().loaded])
    with pytest.raises(ConfigError, match='no plugin found a storage backend for "auto"'):
        plugins.storage(config(), dataclasses.replace(FEATURES, disk_formats=frozenset({"vhd"})))


def test_a_name_nobody_offers_is_refused_with_those_offered() -> None:
    with pytest.raises(ConfigError, match=r"no vmm backend 'three'.*may be: .*one, .*two"):
        Plugins(Offers("a", "one", "two")).vmm(config(vmm="three"))


def test_no_exec_backend_at_all_is_refused() -> None:
    nothing = dataclasses.replace(config(), backends=Backends(exec=()))
    with pytest.raises(ConfigError, match=r"\[backends\] exec is empty"):
        Plugins().execs(nothing)


def test_what_is_asked_of_a_plugin_once_is_asked_once() -> None:
    asked = []

    class Counted:
        @hookimpl
        def auth_backend(self) -> BackendSpec[Any]:
            asked.append(1)
            return spec("counted")

    plugins = Plugins(Counted())
    for _ in range(3):
        plugins.auth(dataclasses.replace(config(), backends=Backends(auth="counted")))
    assert asked == [1]


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_section_becomes_the_plugins_own_record() -> None:
    plugins = Plugins(Offers("a", "one"))
    assert plugins.vmm(config(vmm="one", vmm_one={"limit": 3, "path": "/x"}))[1] == Settings(limit=3, path=Path("/x"))
    assert plugins.vmm(config(vmm="one"))[1] == Settings()


def test_an_unknown_key_in_a_section_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"\[plugins\.vmm_one\]: unknown key 'limt'\. Did you mean 'limit'\?"):
        Plugins(Offers("a", "one")).vmm(config(vmm="one", vmm_one={"limt": 3}))


def test_a_section_of_no_plugin_is_refused_and_one_of_a_plugin_not_selected_is_not() -> None:
    plugins = Plugins(Offers("a", "one"))
    plugins.check_sections(config(vmm="qemu", vmm_one={}, storage_copy={}, net_none={}))
    with pytest.raises(ConfigError, match=r"\[plugins\.vmm_on\] is of no plugin\. Did you mean \[plugins\.vmm_one\]"):
        plugins.check_sections(config(vmm_on={}))


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_the_order_of_the_plugins_names() -> None:
    plugins = Plugins(Offers("b"), Offers("c"), Offers("a"))
    answers = [args[0] for args in plugins.hook.boot_args(spec=None, lease=None)]
    assert answers == ["a", "b", "c"]


def test_two_plugins_with_one_path_for_the_initrd_are_an_error() -> None:
    class Files:
        @hookimpl
        def initrd_files(self) -> dict[str, bytes]:
            return {"surprise": b""}

    one, two = Files(), Files()
    one.name, two.name = "one", "two"  # type: ignore[attr-defined]  # what a plugin may have
    assert Plugins(one).initrd_files("x86_64").get("surprise") == b""
    with pytest.raises(ConfigError, match="two plugins put 'surprise' into the initrd"):
        Plugins(one, two).initrd_files("x86_64")


def test_every_hook_says_when_it_is_called_and_every_kind_of_backend_has_one() -> None:
    hooks = {name: value for name, value in vars(hookspecs).items() if hasattr(value, "noid_spec")}
    assert {f"{kind}_backend" for kind in KINDS} <= hooks.keys()
    for name, hook in hooks.items():
        assert hook.__doc__, f"{name} has no documentation"
