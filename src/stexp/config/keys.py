"""Keys and choices of a command line, checked against a config before it is composed with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, Node, OmegaConf

from stexp.errors import InputError, did_you_mean
from stexp.files import CONF

OTHER_NAMES = {
    "learningrate": "lr",
    "epochs": "max_epochs",
    "nepochs": "max_epochs",
    "batchsize": "batch_size",
    "bs": "batch_size",
    "dataset": "data",
    "encoder": "image_encoder",
    "backbone": "image_encoder",
    "method": "model",
    "gpus": "devices",
    "ngpus": "devices",
    "wd": "weight_decay",
    "neighbors": "k",
    "neighbours": "k",
    "out": "output_dir",
    "output": "output_dir",
    "outdir": "output_dir",
}
"""What people type, without ``_`` and in lower case -> the last part of the key that they mean."""
NAMES_OF_FOLDERS = ("output_dir", "root", "cache_dir")


def check_choices(overrides: Iterable[Override], groups: Mapping[str, Collection[str]]) -> None:
    """InputError for a choice that its group does not have.

    Parameters
    ----------
    groups
        Those of the command: name -> choices.
    """
    for override in overrides:
        group = override.key_or_group
        if group not in groups or override.is_delete():
            continue
        value = override.value()
        for choice in value if isinstance(value, list) else [value]:
            if not isinstance(choice, str) or choice not in groups[group]:
                choices = [name for name in groups[group] if name != "default"]
                typed = override.get_value_element_as_str()
                raise InputError(f"{group}={typed}: choose {', '.join(choices)}{did_you_mean(str(choice), choices)}")


def check_keys(
    overrides: Iterable[Override], base: DictConfig, more: Iterable[str] = (), folders: Iterable[Path] = (CONF,)
) -> None:
    """InputError for a key that is not there, with the nearest that is.

    Parameters
    ----------
    overrides
        Those that change keys, not choices.
    base
        The config without them.
    more
        Words that the command takes besides.
    folders
        Where choices lie.
    """
    for override in overrides:
        key = override.key_or_group
        if override.is_add() or override.is_force_add():
            continue
        node = _nodes(base, key)[-1]
        if node is None:
            raise InputError(f"there is no key {key}{_nearest(key, base, more, folders)}")
        if not OmegaConf.is_dict(node) or node._is_none() or node._is_interpolation() or override.is_delete():
            continue
        value = override.value()
        to_other_node = value is None or (isinstance(value, str) and value.startswith("${"))
        if not to_other_node and not (isinstance(value, dict) and set(value) <= set(node)):
            raise InputError(f"{key} holds keys of its own; {key}.NAME=VALUE changes one, +{key}.NAME=VALUE adds one")


def check_kinds(overrides: Iterable[Override], base: DictConfig, config: DictConfig) -> None:
    """InputError for a switch that is no switch, a value that is one, or a name that is none.

    ``no`` and ``off`` are words to Hydra, and words are true to Python.

    Parameters
    ----------
    base, config
        The config without and with the overrides.
    """
    for override in overrides:
        key = override.key_or_group
        if override.is_delete():
            continue
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(base, parent) if parent else base
        if not OmegaConf.is_dict(node) or last not in list(node):  # `in node` leaves out what is still to be given
            continue  # it was added
        required = OmegaConf.is_missing(node, last)
        before, after = None if required else node[last], OmegaConf.select(config, key)
        typed = f"{key}={override.get_value_element_as_str()}"
        if isinstance(before, bool) and not isinstance(after, bool):
            raise InputError(f"{typed}: true or false would fit")
        if isinstance(after, bool) and before is not None and not isinstance(before, bool):
            raise InputError(f"{typed}: it is no switch; by itself it is {last}={before}")
        if after in (None, "") and (required or (before is not None and last in NAMES_OF_FOLDERS)):
            raise InputError(f"{typed}: a name would fit")


def keys_of(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a config, dotted, parents before what they hold."""
    for key in map(str, config):
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if _holds_keys(node):
            yield from keys_of(node, f"{prefix}{key}.")


def _holds_keys(node: object) -> TypeGuard[DictConfig]:
    return isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation())


def _nodes(config: DictConfig, key: str) -> list:
    """Nodes on the way to a key, the config's own first; the last one is None where the way ends before."""
    nodes: list = [config]
    for part in re.split(r"[.\[]", key.replace("]", "")):
        if OmegaConf.is_list(nodes[-1]):
            break  # an index, which Hydra judges
        if not _holds_keys(nodes[-1]) or part not in list(nodes[-1]):
            return [*nodes, None]
        nodes.append(nodes[-1]._get_node(part))
    return nodes


def _choices_with(group: str, key: str, folders: Iterable[Path]) -> list[str]:
    """Choices of a group in which a key stands."""
    files = [file for folder in folders if group for file in sorted((folder / group).glob("*.yaml"))]
    return [file.stem for file in files if key in (OmegaConf.load(file) or {})]


def _nearest(key: str, base: DictConfig, more: Iterable[str], folders: Iterable[Path]) -> str:
    """What may have been meant by a key that is not there, as the end of a sentence."""
    keys = list(dict.fromkeys(keys_of(base)))
    parent, _, last = key.rpartition(".")
    meant = OTHER_NAMES.get(re.sub("[-_]", "", last.lower()), last)
    siblings = [other.rpartition(".")[2] for other in keys if parent and other.rpartition(".")[0] == parent]
    if meant in siblings:
        return f"; did you mean {parent}.{meant}?"
    node = _nodes(base, parent)[-1] if parent else None
    if isinstance(node, Node) and node._is_interpolation() and OmegaConf.is_dict(OmegaConf.select(base, parent)):
        home = OmegaConf.select(base, parent)  # where the keys themselves stand
        return f"; did you mean {home._get_full_key(last)}?"
    choices = [f"{parent}={choice}" for choice in _choices_with(parent, last, folders)]
    if choices:
        return f"; {' and '.join(choices[:3])} {'has' if len(choices) == 1 else 'have'} it"
    anywhere = [other for other in keys if other.rpartition(".")[2] == meant]
    if anywhere and (meant != last or not parent):
        return f"; did you mean {anywhere[0]}?"
    if siblings:
        return did_you_mean(last, siblings, f"{parent}.") or f"; {parent} has {', '.join(siblings)}"
    if parent in keys:
        return f"; +{key}=VALUE adds it" if _holds_keys(node) else f"; {parent} is one value, {parent}=VALUE sets it"
    return did_you_mean(key, [*keys, *more]) or "; --help-all lists them"
