"""What a command line changes: composed into a config, and said in one line where it does not fit."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stexp.config import CONF, command
from stexp.errors import InputError

MULTIRUN = {"-m", "--multirun"}
OF_HYDRA = ("hydra", "hydra/launcher", "hydra/sweeper")
NAMES_OF_FOLDERS = ("output_dir", "root", "cache_dir")


def entry(
    name: str, multirun: Callable[[list[str]], int] | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a function of a config a command: key=value on its command line change ``conf/<name>.yaml``.

    Hydra itself takes over where the line holds one of its flags (``--help``, ``--cfg job``) or another sweeper.

    Parameters
    ----------
    multirun
        What ``-m`` calls with the other arguments; its result is the exit status.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        of_hydra = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)

        @functools.wraps(task)
        def main() -> None:
            arguments = [argument for argument in sys.argv[1:] if argument not in MULTIRUN]
            many = len(arguments) < len(sys.argv) - 1
            foreign = any(argument.startswith(("-", "hydra/sweeper=", "hydra.mode=")) for argument in arguments)
            if foreign or (many and multirun is None):
                if not many and not any(argument.startswith("hydra") for argument in arguments):
                    with command():  # what is mistyped is said as ever
                        compose(name, [text for text in arguments if "=" in text and not text.startswith("-")])
                try:
                    return of_hydra()
                except BrokenPipeError:  # of --help | head; the flush at the end would fail again
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    sys.exit(1)
            with command():
                if many:
                    sys.exit(multirun(arguments))
                cfg = compose(name, arguments)
            task(cfg)

        return main

    return decorate


def parse(arguments: Iterable[str]) -> list[Override]:
    """Arguments of a command line, read as Hydra reads them."""
    parser, out = OverridesParser.create(), []
    for argument in arguments:
        try:
            out.append(parser.parse_override(argument))
        except HydraException:
            raise InputError(
                f"{argument} is no key=value; a value with spaces or signs goes into quotes within quotes: "
                f"\"data.sheet='my sheet (1).csv'\""
            ) from None
    return out


def quoted(value: Any) -> str:
    """A value as it stands behind ``key=``, in quotes where Hydra would read it as something else than this text."""
    text = str(value)
    words = ("null", "true", "false", "nan", "inf")
    if re.fullmatch(r"[A-Za-z_/][\w./+-]*", text, re.ASCII) and text.lower() not in words:
        return text
    return QuotedString(text, Quote.single).with_quotes()


def compose(name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """``conf/<name>.yaml`` with the choices and values of a command line.

    Raises
    ------
    InputError
        A key or choice that is not there, with the nearest that is; or an argument that cannot be read.
    """
    parsed = parse(overrides)
    of_sweep = [o.input_line for o in parsed if o.get_key_element().lstrip("+~").partition(".")[0] in OF_HYDRA]
    if of_sweep and not with_hydra:
        raise InputError(f"{of_sweep[0]}: Hydra's own settings are for sweeps; give -m, or leave it out")
    several = [override for override in parsed if override.is_sweep_override()]
    if several:
        key = several[0].get_key_element()
        raise InputError(f"{several[0].input_line}: several values need -m; one value that is a list is {key}=[a,b]")
    try:
        config = _compose(name, overrides, with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(name, overrides, error)) from None
    _check_kinds(name, overrides, config)
    return config


def _check_kinds(name: str, overrides: Sequence[str], config: DictConfig) -> None:
    """InputError for a switch that is no switch, a value that is one, or a name that is none.

    ``no`` and ``off`` are words to Hydra, and words are true to Python.
    """
    base = _compose(name, _choices(overrides))
    for override in parse(overrides):
        key = override.get_key_element().lstrip("+~").partition("@")[0]
        if override.is_delete() or key.partition(".")[0] == "hydra" or (CONF / key).is_dir():
            continue
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(base, parent) if parent else base
        if not OmegaConf.is_dict(node) or last not in list(node):  # `in node` leaves out what is still to be given
            continue  # it was added
        required = OmegaConf.is_missing(node, last)
        before, after = None if required else node[last], OmegaConf.select(config, key)
        given = f"{key}={override.get_value_element_as_str()}"
        if isinstance(before, bool) and not isinstance(after, bool):
            raise InputError(f"{given}: true or false would fit")
        if isinstance(after, bool) and before is not None and not isinstance(before, bool):
            raise InputError(f"{given}: it is no switch; by itself it is {last}={before}")
        if after in (None, "") and (required or (before is not None and last in NAMES_OF_FOLDERS)):
            raise InputError(f"{given}: a name would fit")


def _choices(overrides: Sequence[str]) -> list[str]:
    """Those that choose a file of a folder of conf/, on which the keys depend."""
    return [text for text in overrides if (CONF / text.partition("=")[0].lstrip("+~").partition("@")[0]).is_dir()]


def _compose(name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, list(overrides), return_hydra_config=with_hydra)


def _explain(name: str, overrides: Sequence[str], error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        known = [choice for choice in error.options if choice != "default"]
        return f"{group}={option}: choose {', '.join(known)}{meant(option, known)}"
    said = str(error).splitlines()[0]
    unknown = re.search(r"(?:override|delete from config\.) '([^'@]+)", said)
    if not unknown:
        return f"config: {said}"
    key = unknown[1]
    if key in ("sweep", "dry_run"):
        return f"{key}= belongs to a sweep: stexp-train -m sweep=table1"
    try:
        known = list(dict.fromkeys(_keys(_compose(name, _choices(overrides)))))
    except (HydraException, OmegaConfBaseException):
        known = []
    if key in known:
        return f"{key} holds keys of its own; {key}.NAME=VALUE changes one, +{key}.NAME=VALUE adds one"
    parent, _, last = key.rpartition(".")
    same = [other for other in known if other.rpartition(".")[2] == key]
    siblings = [other.rpartition(".")[2] for other in known if parent and other.rpartition(".")[0] == parent]
    if same:
        near = f"; did you mean {same[0]}?"
    elif parent in known and not siblings:
        near = f"; +{key}=VALUE adds it"
    elif siblings:
        near = meant(last, siblings, f"{parent}.") or f"; {parent} has {', '.join(siblings)}"
    else:
        near = (
            meant(key, [*known, *(("sweep", "dry_run") if name == "train" else ())])
            or f"; stexp-{name} --cfg job lists them"
        )
    return f"there is no key {key}{near}"


def meant(key: str, known: Sequence[str], prefix: str = "") -> str:
    """``; did you mean X?`` for the nearest of what is known; nothing where none is near."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in config:
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if OmegaConf.is_dict(node) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{prefix}{key}.")
