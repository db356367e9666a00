"""Choices from elsewhere than ``conf/``: of plug-ins, and of the folders on Hydra's search path."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from stexp import construct
from stexp.documents import parse_yaml
from stexp.errors import InputError
from stexp.files import CONF
from stexp.runs.plugins import load_plugins

log = logging.getLogger(__name__)

SEARCH_PATH = "hydra.searchpath"
SOURCES = ("plugins", SEARCH_PATH)
"""Keys of every command that say where choices come from; they are no keys of its config."""
CONFIG_DIR = ("--config-dir", "-cd")
FROM_DATA = ("n_genes", "n_positions", "n_features")
"""Arguments of a method that come from its data."""


@dataclass(frozen=True)
class Source:
    """A folder of configs laid out as ``conf/``.

    Parameters
    ----------
    origin
        What brings it, for messages: a plug-in, or an entry of the search path.
    plugin
        Its plug-in; None of the search path.
    """

    origin: str
    folder: Path
    plugin: str | None = None

    def choices(self, group: str) -> list[str]:
        return sorted(path.stem for path in (self.folder / group).glob("*.yaml"))


@dataclass(frozen=True)
class Sources:
    """Where a command line takes choices from besides ``conf/``.

    Parameters
    ----------
    plugins
        Named on the command line.
    search_path
        Folders of these plug-ins, those of the command line, and those of installed plug-ins, in this order.
    classes
        Methods of the plug-ins that no config names: class -> dotted path. Each is a choice, too.
    """

    plugins: tuple[str, ...] = ()
    search_path: tuple[Source, ...] = ()
    classes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, plugins: Sequence[str], search_path: Sequence[str]) -> Sources:
        """Those of a command line; its plug-ins are imported.

        Raises
        ------
        InputError
            No such module or folder; or one of them brings a choice that stexp or another has.
        """
        named = load_plugins(plugins)
        brought = [source for name in named if (source := _source_of(name)) is not None]
        sources = [*brought, *(_source_at(place) for place in search_path)]
        _refuse_twins(sources)
        installed = [source for source in _installed() if source.plugin not in named]
        described = _described([path for source in brought for path in (source.folder / "model").glob("*.yaml")])
        taken = {choice: source.origin for source in sources for choice in source.choices("model")}
        taken |= {path.stem: "stexp" for path in (CONF / "model").glob("*.yaml")}
        classes = list(_offer_methods(named, described, taken))
        _offer_features([choice for source in [*sources, *installed] for choice in source.choices("image_encoder")])
        return cls(tuple(named), (*sources, *installed), tuple(classes))

    @property
    def folders(self) -> list[Path]:
        return [source.folder for source in self.search_path]

    @property
    def overrides(self) -> list[str]:
        """As Hydra takes them."""
        places = [f"'file://{folder}'" for folder in self.folders]
        return [f"{SEARCH_PATH}=[{','.join(places)}]"] if places else []

    def choices(self, group: str) -> dict[str, str]:
        """Choices of a group that come from here -> what brings them."""
        own = {choice: source.origin for source in self.search_path for choice in source.choices(group)}
        return own | ({name: f"{path} with its arguments" for name, path in self.classes} if group == "model" else {})


@cache
def default_sources() -> Sources:
    """Those of a command line that names none: the installed plug-ins."""
    return Sources.of([], [])


def as_search_path(arguments: Sequence[str]) -> list[str]:
    """Arguments with ``--config-dir DIR`` as an entry of the search path."""
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, sign, folder = argument.partition("=")
        if flag not in CONFIG_DIR:
            out.append(argument)
            continue
        folder = folder if sign else next(rest, "")
        if not folder:
            raise InputError(f"{flag}: a folder laid out as conf/ would fit, with model/mine.yaml in it, say")
        quoted = f"file://{os.path.abspath(os.path.expanduser(folder))}".replace("'", "\\'")
        out.append(f"{SEARCH_PATH}=['{quoted}']")
    return out


def used_plugins(config: DictConfig, sources: Sources) -> list[str]:
    """Plug-ins of a composed config: those named, and the installed ones that a choice or a class is from."""
    choices = config.hydra.runtime.choices
    chosen = [
        source.plugin
        for source in sources.search_path
        if source.plugin and any(choice in source.choices(str(group)) for group, choice in choices.items())
    ]
    rest = {key: value for key, value in OmegaConf.to_container(config, resolve=False).items() if key != "hydra"}  # type: ignore[union-attr]
    installed = list(dict.fromkeys([*chosen, *construct.plugins_in(rest)]))
    construct.require_plugins(installed, "this command")
    return list(dict.fromkeys([*sources.plugins, *installed]))


def _source_of(plugin: str) -> Source | None:
    """``conf/`` inside a package, which need not be imported; None of a module, or a package without."""
    folder = _folder_of(plugin)
    return Source(plugin, folder / "conf", plugin) if folder and (folder / "conf").is_dir() else None


def _folder_of(package: str) -> Path | None:
    top, *inner = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    folders = [Path(place, *inner) for place in places]
    return next((folder for folder in folders if folder.is_dir()), None)


@cache
def _installed() -> tuple[Source, ...]:
    sources = [source for name in construct.installed_plugins() if (source := _source_of(name)) is not None]
    for choice, first, second in _twins(sources):  # no reason to refuse every command
        log.warning(
            "%s is of %s and of %s, which is installed: that of %s is taken", choice, first, second.origin, first
        )
    return tuple(sources)


def _source_at(place: str) -> Source:
    """An entry of Hydra's search path."""
    kind, sign, name = place.partition("://")
    if not sign or kind not in ("file", "pkg"):
        raise InputError(f"{SEARCH_PATH}: {place} is no place; file://FOLDER or pkg://PACKAGE.FOLDER would fit")
    if kind == "file":
        folder: Path | None = Path(name).expanduser().absolute()
    else:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        folder = _folder_of(name.replace("/", "."))
    if folder is None or not folder.is_dir():
        raise InputError(
            f"{SEARCH_PATH}: there is no folder {place}; it is to hold folders as conf/ does, such as model/"
        )
    return Source(place, folder)


def _refuse_twins(sources: Sequence[Source]) -> None:
    for choice, first, second in _twins(sources):
        raise InputError(f"{choice} is of {first} and of {second.origin}: rename {second.folder / choice}.yaml")


def _twins(sources: Sequence[Source]) -> Iterator[tuple[str, str, Source]]:
    """Configs that two places bring, of which Hydra takes the first in silence: their name, the first, the second."""
    ours = {path.relative_to(CONF): "stexp" for path in CONF.rglob("*.yaml")}
    groups = {str(relative.parent) for relative in ours} | {"experiment"}
    for source in sources:
        for relative in [Path(group, f"{choice}.yaml") for group in sorted(groups) for choice in source.choices(group)]:
            if ours.setdefault(relative, source.origin) != source.origin:
                yield str(relative.with_suffix("")), ours[relative], source


def _described(configs: Iterable[Path]) -> set[Any]:
    """What configs of plug-ins name as their ``_target_``, each as it is defined, whichever path leads to it."""
    out = set()
    for path in configs:
        try:
            node = parse_yaml(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            continue  # Hydra says what is wrong with it where it is chosen
        target = node.get("_target_") if isinstance(node, dict) else None
        if construct.plugin_of(target) is None:
            continue
        with suppress(InputError):  # there is no such class: said where the config is chosen
            out.add(construct.get_object(str(target)))
    return out


def _offer_methods(plugins: Iterable[str], described: set[Any], taken: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Make a choice of each method of plug-ins that no config describes: its class, with its arguments as keys.

    Parameters
    ----------
    taken
        Choices that there are already -> whose they are.
    """
    lightning: Any = sys.modules.get("pytorch_lightning")  # a method has imported it
    offered = dict(taken)
    for plugin in plugins:
        modules = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{plugin}.")]
        kinds = dict.fromkeys(kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass))
        for kind in kinds:
            path = f"{kind.__module__}.{kind.__qualname__}"
            if lightning is None or not issubclass(kind, lightning.LightningModule) or inspect.isabstract(kind):
                continue
            if not path.startswith(f"{plugin}.") or kind in described or offered.get(kind.__name__) == path:
                continue
            if kind.__name__ in offered:
                raise InputError(
                    f"model={kind.__name__} is of {offered[kind.__name__]} and of {path}: rename one, or name it in a "
                    f"conf/model/<choice>.yaml of the plug-in"
                )
            offered[kind.__name__] = path
            ConfigStore.instance().store(group="model", name=kind.__name__, node=_node_of(kind, path))
            yield kind.__name__, path


def _node_of(kind: type, path: str) -> dict[str, Any]:
    """What would stand in the yaml of a method: its arguments, ``???`` where one has no default."""
    node: dict[str, Any] = {"_target_": path, "name": kind.__name__}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in FROM_DATA:
            continue
        if name == "image_encoder":
            node[name] = "${image_encoder}"
        elif parameter.default is parameter.empty:
            node[name] = "???"
        elif parameter.default is None or isinstance(parameter.default, bool | int | float | str):
            node[name] = parameter.default
        elif isinstance(parameter.default, list | tuple):
            node[name] = list(parameter.default)
    return node


def _offer_features(encoders: Iterable[str]) -> None:
    """Make ``features=NAME`` of stexp-prepare a choice for image encoders."""
    for name in encoders:
        node = {"defaults": [{"override /image_encoder@_global_.image_encoder": name}], "features": name}
        ConfigStore.instance().store(group="features", name=name, node=node, package="_global_")


def offer_features() -> None:
    """Make each image encoder of ``conf/`` a choice of ``features=``, under the keys that stexp-train has it under."""
    _offer_features(sorted(path.stem for path in (CONF / "image_encoder").glob("*.yaml")))
