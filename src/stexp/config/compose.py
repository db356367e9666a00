"""What a command line changes: composed into a config, and said in one line where it does not fit."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from stexp import __version__
from stexp.config import command, to_plain
from stexp.config.ending import end_quickly
from stexp.config.help import help_text, whole_help_text
from stexp.config.keys import check_choices, check_keys, check_kinds
from stexp.config.plugins import CONFIG_DIR, SOURCES, Sources, as_search_path, default_sources, used_plugins
from stexp.errors import InputError
from stexp.files import CONF
from stexp.hardware import watch_cores
from stexp.protocol import Protocol

log = logging.getLogger(__name__)

MULTIRUN = {"-m", "--multirun"}
HYDRA_FLAGS = frozenset(
    [
        *("--cfg", *CONFIG_DIR, "--config-name", "--config-path", "--experimental-rerun", "--hydra-help", "--info"),
        *("--multirun", "--package", "--resolve", "--run", "--shell-completion"),
    ]
)
PROTOCOL = f"{Protocol.__module__}.{Protocol.__qualname__}"
OF_HYDRA = ("hydra", "hydra/launcher", "hydra/sweeper")
OF_SWEEPS = ("sweep", "dry_run")
"""Keys of ``stexp-train -m`` that are none of the config's."""


def entry(
    name: str, multirun: Callable[[list[str]], int] | None = None, bare: str | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a function of a config a command: key=value on its command line change ``conf/<name>.yaml``.

    Hydra itself takes over where the line holds one of its flags (``--cfg job``) or another sweeper.

    Parameters
    ----------
    multirun
        What ``-m`` calls with the other arguments; its result is the exit status.
    bare
        Said where nothing stands on the command line.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        of_hydra = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)

        @functools.wraps(task)
        def main() -> None:
            watch_cores()
            end_quickly()
            with command():
                sys.argv[1:] = as_search_path(sys.argv[1:])
            flags = {argument for argument in sys.argv[1:] if argument.startswith("-")}
            arguments = [argument for argument in sys.argv[1:] if argument not in MULTIRUN]
            if "--version" in flags:
                print(f"stexp {__version__}")
            elif flags & {"--help", "-h", "--help-all"}:
                _print_help(name, [argument for argument in arguments if argument not in flags], "--help-all" in flags)
            elif (
                flags - MULTIRUN
                or (flags and multirun is None)
                or any(text.startswith(("hydra/sweeper=", "hydra.mode=")) for text in arguments)
            ):
                _leave_to_hydra(of_hydra, name, flags)
            else:
                with command():
                    if flags and multirun is not None:
                        sys.exit(multirun(arguments))
                    if bare and not arguments:
                        log.info("%s", bare)
                    cfg = compose(name, arguments)
                task(cfg)

        return main

    return decorate


def _print_help(name: str, arguments: Sequence[str], whole: bool) -> None:
    with command():
        sources, _ = split(arguments)
        cfg = compose(name, arguments, with_hydra=True)
        text = (whole_help_text if whole else help_text)(cfg, name, _groups(name, sources), sources)
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # of --help | head; the flush at the end would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _leave_to_hydra(of_hydra: Callable[[], Any], name: str, flags: set[str]) -> None:
    of_job = [text for text in sys.argv[1:] if "=" in text and not text.startswith("-")]
    with command():
        for flag in sorted(flags):
            if flag.startswith("--") and flag.partition("=")[0] not in HYDRA_FLAGS:
                key = flag.removeprefix("--").partition("=")[0].replace("-", "_")
                raise InputError(f"{flag}: what changes is given as key=value, as in {key}=VALUE")
    with command():
        for text in of_job:
            if is_of_test(text) and text != "test_data=null":
                how = ", ".join(sorted(flags)) or "a sweep"
                raise InputError(f"{text}: Hydra itself ({how}) knows no test_data=; leave it out")
        sources, _ = split(of_job)
        if not flags & MULTIRUN and not any(text.startswith("hydra") for text in split(of_job)[1]):
            compose(name, of_job)  # what is mistyped is said as ever
    flags_and_values = [text for text in sys.argv[1:] if text not in of_job]
    of_job = [text for text in of_job if text.partition("=")[0] not in SOURCES] + sources.overrides
    if sources.plugins:
        of_job.append(f"+plugins=[{','.join(sources.plugins)}]")
    sys.argv[1:] = [*of_job, *flags_and_values]
    of_hydra()


def parse(arguments: Iterable[str]) -> list[Override]:
    """Arguments of a command line, read as Hydra reads them."""
    parser, overrides = OverridesParser.create(), []
    for argument in arguments:
        # shells leave ~ alone after key=, and Hydra reads it as a deletion
        argument = re.sub(r"(?<==)~[^'\"]*$", lambda path: quoted(path[0]), argument)
        try:
            overrides.append(parser.parse_override(argument))
        except HydraException:
            raise InputError(
                f"{argument} is no key=value; a value with spaces or signs goes into quotes within quotes: "
                f"\"data.sheet='my sheet (1).csv'\""
            ) from None
    return overrides


def quoted(value: Any) -> str:
    """A value as it stands behind ``key=``, in quotes where Hydra would read it as something else than this text."""
    text = str(value)
    words = ("null", "true", "false", "nan", "inf")
    if re.fullmatch(r"[A-Za-z_/][\w./+-]*", text, re.ASCII) and text.lower() not in words:
        return text
    return QuotedString(text, Quote.single).with_quotes()


def unquoted(value: str) -> str:
    """A value of a command line without the quotes that it may need there."""
    return str(parse([f"x={value}"])[0].value())


def listed_names(value: str) -> list[str]:
    """Names of a command line: a list, one, or null for none."""
    names = parse([f"x={value}"])[0].value()
    if names is None:
        return []
    return [str(name) for name in names] if isinstance(names, list) else [str(names)]


def compose(name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """``conf/<name>.yaml`` with the choices and values of a command line.

    Raises
    ------
    InputError
        A key or choice that is not there, with the nearest that is; or an argument that cannot be read.
    """
    sources, overrides = split(overrides)
    overrides, of_test = _apart(overrides) if name == "train" else (overrides, [])
    config = _checked(name, parse(overrides), sources, with_hydra)
    if of_test:
        _add_cohort(config, of_test, sources)
    return config


def _apart(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What changes a run, and what changes the data set that it is tested on, which is composed by itself."""
    rest: list[str] = []
    choice: str | None = None
    changes: list[str] = []
    for text in overrides:
        if not is_of_test(text):
            rest.append(text)
        elif re.match(r"test_data=", text):
            choice = None if parse([text])[0].value() is None else text  # the last one holds
        elif re.match(r"[+~]*test_data\.", text):
            changes.append(text)
        else:
            raise InputError(f"{text}: test_data=NAME is the choice, as in data=NAME")
    if changes and choice is None:
        raise InputError(f"{changes[0]}: of which data set? test_data=NAME is the choice, as in data=NAME")
    return rest, [] if choice is None else [choice, *changes]


def is_of_test(argument: str) -> bool:
    """Whether an argument is about the data set that is tested in place of a part of the one that trains."""
    return re.match(r"[+~]*test_data(?![\w-])", argument) is not None


def _add_cohort(config: DictConfig, of_test: Sequence[str], sources: Sources) -> None:
    """Put another data set, which is tested as a whole, into a config."""
    from stexp.data.cohorts import check_protocol  # pandas and anndata, which --help does without

    check_protocol(to_plain(config.protocol))
    try:
        other = _checked("train", parse(text.replace("test_", "", 1) for text in of_test), sources, False)
        node = to_plain(other.data)
    except InputError as error:  # keys of it, and no name of a file
        raise InputError(re.sub(r"(?<![^\s(])data(?=[.=])", "test_data", str(error))) from None
    with open_dict(config):
        config.test_data, config.protocol.hold_out = node, "cohort"
        plugins = list(dict.fromkeys([*(config.get("plugins") or []), *(other.get("plugins") or [])]))
        if plugins:
            config.plugins = plugins


def _checked(name: str, parsed: Sequence[Override], sources: Sources, with_hydra: bool) -> DictConfig:
    """A config with keys and choices that are there; see `compose`."""
    of_sweep = [each.input_line for each in parsed if each.key_or_group.partition(".")[0] in OF_HYDRA]
    if of_sweep and not with_hydra:
        raise InputError(f"{of_sweep[0]}: Hydra's own settings are for sweeps; give -m, or leave it out")
    for override in parsed:
        key = override.key_or_group
        if override.is_sweep_override():
            raise InputError(f"{override.input_line}: several values need -m; one value that is a list is {key}=[a,b]")
        if name == "train" and key in OF_SWEEPS:
            raise InputError(f"{key}= belongs to a sweep: stexp-train -m sweep=table1")
    groups = _groups(name, sources, frozenset(each.key_or_group for each in parsed)) if parsed else {}
    check_choices(parsed, groups)
    choices: list[Override] = []
    changes: list[Override] = []
    for override in parsed:
        (choices if override.key_or_group in groups or override.package else changes).append(override)
    try:
        base = _compose(name, choices, sources)
        more = ("plugins", *(OF_SWEEPS if name == "train" else ()))
        check_keys(changes, base, more, (CONF, *sources.folders))
        config = _compose(name, parsed, sources) if changes else base
        check_kinds([each for each in changes if not each.key_or_group.startswith("hydra.")], base, config)
    except (HydraException, OmegaConfBaseException) as error:  # what neither a key nor a choice explains
        raise InputError(f"config: {str(error).splitlines()[0]}") from None
    _check_protocol(config)
    plugins = used_plugins(config, sources)
    with open_dict(config):
        if plugins:  # a run says what it was made with
            config.plugins = plugins
        if not with_hydra:
            del config["hydra"]
    return config


def _check_protocol(config: DictConfig) -> None:
    """InputError for a class of a protocol that is not ours: its fields are all that splits and scores look at."""
    target = str(config.get("protocol", {}).get("_target_", PROTOCOL))
    if target != PROTOCOL:
        raise InputError(
            f"protocol._target_={target}: a protocol is the values of {PROTOCOL}, and splits and scores ask no class "
            f"of another; conf/protocol/NAME.yaml of the plug-in, with _target_: {PROTOCOL} and values of its own, "
            f"would fit"
        )


def split(arguments: Iterable[str]) -> tuple[Sources, list[str]]:
    """Where a command line takes choices from, its plug-ins imported; and its other arguments."""
    of_sources: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        (of_sources if argument.partition("=")[0] in SOURCES else rest).append(argument)
    values: dict[str, list[str]] = {key: [] for key in SOURCES}
    for override in parse(of_sources):
        if override.is_sweep_override() or override.value() is None:
            raise InputError(f"{override.input_line}: a list would fit: {override.key_or_group}=[a,b]")
        value = override.value()
        values[override.key_or_group] += map(str, value if isinstance(value, list) else [value])
    return (Sources.of(*values.values()) if of_sources else default_sources()), rest


def groups_of(name: str, arguments: Iterable[str]) -> dict[str, list[str]]:
    """Groups of a command -> their choices, those of the plug-ins and search path of a command line among them."""
    return _groups(name, split(arguments)[0])


def _compose(name: str, overrides: Sequence[Override], sources: Sources) -> DictConfig:
    lines = [override.input_line for override in overrides if override.input_line is not None]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, [*lines, *sources.overrides], return_hydra_config=True)


@functools.cache
def _groups(name: str, sources: Sources, among: frozenset[str] | None = None) -> dict[str, list[str]]:
    """Groups of a command, all or those of some names, and their choices; each takes Hydra a hundredth of a second."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        groups = hydra.compose(name, sources.overrides, return_hydra_config=True).hydra.runtime.choices
        loader = GlobalHydra.instance().config_loader()
        choices = {
            str(group): loader.get_group_options(str(group), config_name=name, overrides=sources.overrides)
            for group in groups
            if among is None or group in among
        }
    return {group: names for group, names in choices.items() if names}
