"""What a run keeps of its prototypes: ``prototypes.json``, and the names of its tiles' file."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from stexp.evaluation.records import read_json

FACTS, TILES = "prototypes.json", "prototypes.h5"


class Prototype(TypedDict):
    """One prototype: the number of its spots, these by section, what stands out of it, and its nearest tiles.

    ``genes`` are names with the difference of their expression to the mean of all prototypes.
    """

    name: str
    spots: int
    sections: dict[str, int]
    genes: dict[str, float]
    tiles: list[str]


class Prototypes(TypedDict):
    """Those of most spots, of how many, and how many references they all stand for."""

    prototypes: list[Prototype]
    of: int
    references: int


def read_prototypes(folder: Path) -> Prototypes:
    """Prototypes of a run folder; InputError where the file is missing or damaged."""
    return read_json(folder / FACTS, Prototypes)
