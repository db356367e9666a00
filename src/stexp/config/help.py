"""``--help``: what a command is for and the keys that people change most; ``--help-all``: every key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from omegaconf import DictConfig, OmegaConf, open_dict

from stexp.config.plugins import Sources
from stexp.files import CONF

COLUMN = 44
"""Where comments begin."""


def help_text(cfg: DictConfig, name: str, groups: Mapping[str, Sequence[str]], sources: Sources) -> str:
    """What a command does, examples, and the keys that people change most.

    Parameters
    ----------
    cfg
        The command's config with Hydra's own part, which holds the text.
    groups
        Group -> choices.
    sources
        Where choices come from besides ``conf/``.
    """
    text = Template(cfg.hydra.help.template).safe_substitute(CONFIG=_keys(cfg, name, groups, sources)).rstrip()
    text = "\n\n".join([text, *_choices_from(groups, sources)])
    more = f"Every key: stexp-{name} --help-all. The version: --version."
    return f"{text}\n\nA method, data set or encoder of your own: plugins=[MODULE]. {more}"


def whole_help_text(cfg: DictConfig, name: str, groups: Mapping[str, Sequence[str]], sources: Sources) -> str:
    """Every choice and key of a command with its value; for the parameters see :func:`help_text`."""
    choices = cfg.hydra.runtime.choices
    lines = [cfg.hydra.help.header, ""]
    of_command = [group for group in groups if not group.startswith("hydra/")]
    if of_command:
        lines.append("== Choices: group=choice ==")
        lines += [f"{group}={choices[group] or 'null'}  of {', '.join(groups[group])}" for group in of_command]
        lines.append("")
    lines += [f"{part}\n" for part in _choices_from(groups, sources)]
    keys = _keys(cfg, name, groups, sources)
    return "\n".join([*lines, "== Keys: key=value, with dots for what stands further in ==", keys])


def _choices_from(groups: Iterable[str], sources: Sources) -> list[str]:
    """A paragraph on the choices that plug-ins and the search path bring; none where they bring none."""
    origins = {f"{group}={choice}": origin for group in groups for choice, origin in sources.choices(group).items()}
    if not origins:
        return []
    return ["\n".join(["== From plug-ins and the search path ==", *(f"{k:{COLUMN}}  {v}" for k, v in origins.items())])]


def _keys(cfg: DictConfig, name: str, groups: Iterable[str], sources: Sources) -> str:
    """The config as yaml, with the comments of the files that it is composed of."""
    comments = _comments(CONF / f"{name}.yaml")
    for group, folder in itertools.product(groups, (CONF, *sources.folders)):
        of_choice = _comments(folder / group / f"{cfg.hydra.runtime.choices[group]}.yaml")
        comments |= {f"{group}.{key}": text for key, text in of_choice.items()}
    cfg = cfg.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    return "\n".join(
        f"{line:{COLUMN}}  # {comments[key]}" if key in comments else line
        for line, key in _keyed_lines(OmegaConf.to_yaml(cfg))
    )


def _comments(path: Path) -> dict[str, str]:
    """Key -> the comment behind it, of a yaml and of those it is made of; none where a choice has no file."""
    if not path.is_file():
        return {}
    comments: dict[str, str] = {}
    for parent in OmegaConf.select(OmegaConf.load(path), "defaults", default=[]):
        if isinstance(parent, str) and parent != "_self_":
            comments |= _comments(path.with_name(f"{parent}.yaml"))
    for line, key in _keyed_lines(path.read_text(encoding="utf-8")):
        if key and (comment := re.search(r"\s#\s*(.+)$", line)):
            comments[key] = comment[1]
    return comments


def _keyed_lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines of a yaml, each with its dotted key, "" where it has none."""
    above: list[tuple[int, str]] = []  # indent, key
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):", line)
        if match:
            while above and above[-1][0] >= len(match[1]):
                above.pop()
            above.append((len(match[1]), match[2]))
        yield line, ".".join(key for _, key in above) if match else ""
