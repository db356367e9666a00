"""``model.json``: read and judged before anything is built from it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stexp.data.slides.stain import METHODS as STAINS
from stexp.documents import parse_json
from stexp.errors import InputError
from stexp.inference.bank import LONGEST
from stexp.inference.tensors import AGAIN
from stexp.protocol import Protocol

LARGEST = 256 << 20  # bytes of model.json
DEEPEST = 32  # objects and lists within each other
MOST = 1 << 24  # of what is counted: genes, positions, neighbours
LARGEST_TILE = 4096  # pixels a side
NEEDED = (
    *("method", "model", "sizes", "features_by", "k", "panel", "protocol", "data", "fold", "tile", "stain"),
    *("precision", "channels_last", "interval", "looks", "expected", "licences", "trained"),
)
"""Keys without which nothing is predicted, or said of what is."""


def read_json(path: Path) -> dict:
    """The values of ``model.json``.

    Raises
    ------
    InputError
        Not JSON of an object, or one too large or nested too deep to be a model's.
    """
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} is damaged: it has {path.stat().st_size / 1e6:.0f} MB; {AGAIN}")
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
        depth = _depth(facts)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}); {AGAIN}") from None
    if not isinstance(facts, dict) or depth > DEEPEST:
        raise InputError(f"{path} is damaged: it holds no object, or one nested deeper than {DEEPEST}; {AGAIN}")
    return facts


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def check(facts: dict) -> None:
    """Refuse values that no export writes: another type, out of range, not finite, or sizes that contradict.

    Raises
    ------
    InputError
        One line that names the key.
    """
    lacking = sorted({*NEEDED} - {*facts})
    if lacking:
        raise InputError(f"model.json does not say {', '.join(lacking)}; {AGAIN}")
    top = _Part(facts, "")
    for key in ("method", "data", "fold", "precision"):
        top.text(key)
    top.truth("channels_last")
    panel = top.names("panel")
    if not panel or len(set(panel)) < len(panel):
        raise top.refuse("panel", "names, each once,")
    sizes = top.part("sizes")
    for key in sizes.values:
        sizes.number(key, 1, MOST, whole=True)
    if sizes.values.get("n_genes") != len(panel):
        raise sizes.refuse("n_genes", f"{len(panel)}, the length of the panel,")
    top.number("k", 1, MOST, whole=True, optional=True)
    protocol = top.part("protocol")
    for key in protocol.values:
        if key not in {field.name for field in fields(Protocol)}:
            raise InputError(f"model.json: protocol has no {key!r}; {AGAIN}")
    _check_tile(top.part("tile"))
    if facts["stain"] is not None:
        _check_stain(top.part("stain"))
    for name in top.part("looks").values:
        _check_look(_Part(facts["looks"][name], f"looks.{name}."))
    if not facts["looks"]:
        raise top.refuse("looks", "those of a section at least")
    if facts["interval"] is not None:
        _check_interval(top.part("interval"))
    if facts.get("known_tiles") is not None:
        known = top.part("known_tiles")
        for key in ("limit", "held_out_share"):
            known.number(key, 0, 1)
    for key in ("expected", "licences", "trained"):
        top.part(key)


def _check_tile(tile: _Part) -> None:
    tile.number("px", 1, LARGEST_TILE, whole=True)
    for key in ("um", "trained_um_per_px"):
        tile.number(key, 0, 1e6, above=True, optional=True)
    scales = tile.part("um_per_px")
    for name in scales.values:
        scales.number(name, 0, 1e6, above=True, optional=True)


def _check_stain(stain: _Part) -> None:
    method = stain.text("method", STAINS)
    target = stain.part("target")
    target.matrix("glass", (3,), above=0)
    if method == "reinhard":
        target.matrix("mean", (3,))
        target.matrix("sd", (3,), above=0)
    else:
        target.matrix("stains", (2, 3))
        target.matrix("strength", (2,), above=0)


def _check_look(look: _Part) -> None:
    for key in ("tissue", "blur", "od_red", "od_green", "od_blue", "grain", "grain_half", "grain_double"):
        look.number(key, -1e6, 1e6, optional=key != "tissue")
    if look.values.get("stains") is not None:
        look.matrix("stains", (2, 3))
    if "thumbnail" in look.values:
        look.text("thumbnail")


def _check_interval(interval: _Part) -> None:
    interval.number("alpha", 0, 1)
    interval.truth("spread")
    interval.text("note")
    interval.number("coverage", 0, 1, optional=True)
    groups = interval.part("coverage_by_group")
    for name in groups.values:
        groups.number(name, 0, 1, optional=True)


@dataclass(frozen=True)
class _Part:
    """An object of ``model.json``, each of its values asked for with what it may be."""

    values: Any
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            raise InputError(f"model.json: {self.where.rstrip('.')} is no object; {AGAIN}")

    def refuse(self, key: str, fits: str) -> InputError:
        value = json.dumps(self.values.get(key))
        shown = value if len(value) < 60 else f"{value[:60]}..."
        return InputError(f"model.json: {self.where}{key}={shown}: {fits} would fit; {AGAIN}")

    def part(self, key: str) -> _Part:
        return _Part(self.values.get(key), f"{self.where}{key}.")

    def number(
        self,
        key: str,
        least: float,
        most: float,
        *,
        whole: bool = False,
        above: bool = False,
        optional: bool = False,
    ) -> None:
        """Refuse all but a finite number from `least` (`above`: more than it) to `most`."""
        value = self.values.get(key)
        if value is None and optional:
            return
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (is_number and least <= value <= most and not (above and value == least)):
            kind = "a whole number" if whole else "a number"
            raise self.refuse(key, f"{kind} {'above' if above else 'from'} {least:g} to {most:g}")

    def text(self, key: str, choices: Collection[str] = ()) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.refuse(key, " or ".join(choices) if choices else "a text")
        return value

    def truth(self, key: str) -> None:
        if not isinstance(self.values.get(key), bool):
            raise self.refuse(key, "true or false")

    def names(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) and len(name) <= LONGEST for name in value):
            raise self.refuse(key, "a list of names")
        return value

    def matrix(self, key: str, shape: tuple[int, ...], above: float = -math.inf) -> None:
        """Refuse all but finite numbers of a shape of one or two dimensions, more than `above`."""
        value: Any = self.values.get(key)
        rows: Any = value if len(shape) == 2 else [value]
        fits = isinstance(rows, list) and len(rows) == (shape[0] if len(shape) == 2 else 1)
        if not fits or not all(isinstance(row, list) and len(row) == shape[-1] for row in rows):
            raise self.refuse(key, f"numbers of shape {shape}")
        for number in (number for row in rows for number in row):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not (is_number and math.isfinite(number) and number > above):
                raise self.refuse(key, f"finite numbers of shape {shape}")
