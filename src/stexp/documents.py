"""YAML and JSON that a stranger may have written: whatever is wrong with them is a ValueError of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml

LARGEST = 16 << 20
"""Letters of YAML that are read: a config has thousands."""


class _WithoutAliases(yaml.SafeLoader):
    """Refuses aliases, by which a few lines stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML document; ValueError where it has aliases, is nested too deep, too large or damaged."""
    if len(text) > LARGEST:
        raise ValueError(f"{len(text) / 1e6:.0f} MB of YAML, up to {LARGEST / 1e6:.0f} MB are read")
    try:
        return yaml.load(text, _WithoutAliases)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def parse_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Plain values of a JSON document; ValueError where it is nested too deep or damaged.

    Parameters
    ----------
    parse_constant
        As :func:`json.loads` has it.
    """
    try:
        return json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
