"""Plug-ins: packages of the user's that bring methods, data sets, encoders and protocols; see `stexp.construct`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

from stexp import construct
from stexp.errors import InputError, did_you_mean

log = logging.getLogger(__name__)

SUFFIXES = (".py", ".yaml")
"""Files of a plug-in that decide what it computes."""
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def load_plugins(names: Iterable[str]) -> list[str]:
    """Import plug-ins and let configs name what they define.

    Parameters
    ----------
    names
        Of modules or packages in the current folder, on ``PYTHONPATH`` or installed.

    Returns
    -------
    list of str
        The names, each once.

    Raises
    ------
    InputError
        No such module, or one that is no plug-in: of the standard library, of stexp, or an installed package that does
        not say that it belongs to stexp. What a plug-in raises while it is imported comes as it is.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        spec = _spec_of(name)
        _refuse_library(name, spec)
        module = importlib.import_module(name)
        if spec.origin and getattr(module, "__file__", None) and not Path(spec.origin).samefile(str(module.__file__)):
            raise InputError(
                f"plugins: {name} is {spec.origin}, but {module.__file__} was imported; rename one of them"
            )
        construct.allow(name)
    return names


def _spec_of(name: str) -> ModuleSpec:
    if not _NAME.fullmatch(name) or name.endswith(".py"):
        near = f": {Path(name).stem}" if name.endswith(".py") else ""
        raise InputError(f"plugins: {name} is no name of a module or package, as import has it{near}")
    top = name.partition(".")[0]
    _refuse_top(name, top)
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as python -m has it; a command that is installed starts from its own folder
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # of the plug-in's own imports
        spec = None
    if spec is None or (spec.origin is None and not _holds_code(spec)):
        near = did_you_mean(top, importable(Path(here)))
        inner = f"; {top} is there and has no {name.partition('.')[2]}" if near.endswith(f" {top}?") else near
        raise InputError(
            f"plugins: there is no module {name}: neither {name.replace('.', '/')}.py nor a folder of this name in "
            f"{here}, and none is installed{inner}"
        )
    return spec


def _holds_code(spec: ModuleSpec) -> bool:
    """Whether a folder without ``__init__.py``, which import takes for a package, is one."""
    return any(any(Path(folder).glob("*.py")) for folder in spec.submodule_search_locations or [])


def _refuse_top(name: str, top: str) -> None:
    # To allow a package is to let any config name any class in it. Nobody's method lives in the standard library,
    # where subprocess.Popen does; a user who types plugins=[os] has been told to by somebody.
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        raise InputError(f"plugins: {name} is a module of Python itself, and no plug-in; call yours otherwise")
    if top == "stexp":
        raise InputError(f"plugins: {name} is of stexp itself, and needs not be named")


def _refuse_library(name: str, spec: ModuleSpec) -> None:
    """InputError for an installed package that does not say it belongs to stexp.

    For the reason above: with plugins=[torch], a config of anybody's could name whatever class torch defines. A file
    or folder of the user's own is theirs to allow; a package that was installed has to say that it is meant for
    configs, by the entry point, or at least to build on stexp.
    """
    places = [Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib", "stdlib")]
    origin = spec.origin or next(iter(spec.submodule_search_locations or []), None)
    if origin is None or not any(place in Path(origin).resolve().parents for place in places):
        return
    for owner in packages_distributions().get(name.partition(".")[0], []):
        of_owner = distribution(owner)
        requires = {re.split(r"[^\w.-]", each, maxsplit=1)[0].lower() for each in of_owner.requires or []}
        if "stexp" in requires or of_owner.entry_points.select(group=construct.ENTRY_POINTS):
            return
    raise InputError(
        f"plugins: {name} is an installed package that neither names the entry point {construct.ENTRY_POINTS} nor "
        f"requires stexp, so that it is no plug-in: all its classes could be called by configs"
    )


def importable(folder: Path) -> list[str]:
    """Names of the modules and packages in a folder."""
    files = [path.stem for path in folder.glob("*.py")]
    packages = [path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    return sorted(name for name in [*files, *packages] if _NAME.fullmatch(name))


def record(names: Iterable[str]) -> dict[str, dict[str, str | None]]:
    """Version (null: not installed) and digest of the files of plug-ins, by name."""
    return {name: {"version": _version(name), "digest": _digest(name)} for name in names}


def require_as_recorded(versions: object, what: object) -> None:
    """Import the plug-ins that a run or a model was made with; log which of them have other files today.

    Raises
    ------
    InputError
        See :func:`stexp.construct.require_plugins`.
    """
    construct.require_plugins(versions, what)
    if not isinstance(versions, Mapping):
        return
    for name, facts in versions.items():
        then = facts.get("digest") if isinstance(facts, Mapping) else None
        if then is not None and then != _digest(name):
            log.warning("the plug-in %s changed since %s was made: it may compute something else", name, what)


def _version(name: str) -> str | None:
    owner = construct.installed_plugins().get(name)
    if owner is None:
        return None
    try:
        return distribution(owner).version
    except PackageNotFoundError:
        return None


def _digest(name: str) -> str | None:
    """Hash of a plug-in's sources and configs, their names among them; None of what is no file, as in a notebook."""
    module: Any = importlib.import_module(name)
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    files = [(path.relative_to(folder).as_posix(), path) for folder in folders for path in folder.rglob("*")]
    if not folders and getattr(module, "__file__", None) is None:
        return None
    if not folders:
        files = [(Path(module.__file__).name, Path(module.__file__))]
    digest = hashlib.blake2b(digest_size=16)
    for relative, path in sorted(files):
        if path.suffix in SUFFIXES and path.is_file():
            digest.update(f"{relative}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
