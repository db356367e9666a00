"""``model.json``: read and judged before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # those of typing carry no annotations before Python 3.12
    get_args,
)

from pydantic import Field
from typing_extensions import TypedDict

from stexp.arguments import Between, Count, NotNegative, Share, Whole, check_fields, check_keys
from stexp.documents import parse_json
from stexp.errors import InputError
from stexp.evaluation.records import Spots
from stexp.inference.bank import LONGEST
from stexp.inference.tensors import AGAIN
from stexp.protocol import Protocol

LARGEST = 256 << 20  # bytes of model.json
DEEPEST = 32  # objects and lists within each other

Name = Annotated[str, Field(max_length=LONGEST)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
"""Of what is counted: genes, positions, neighbours."""
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Above0 = Annotated[float, Field(gt=0, le=1e6)]
Colours = Annotated[list[Number], Field(min_length=3, max_length=3)]
Stains = Annotated[list[Colours], Field(min_length=2, max_length=2)]
Bank = Literal["bank.safetensors", "prototypes.safetensors"]
File = Literal["model.safetensors", Bank, "references.jpg", "known.safetensors", "genes.csv"]
FILES: tuple[str, ...] = get_args(File)
"""What a folder may hold beside ``model.json``."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{1,128}$")]


class Tile(TypedDict):
    """See :func:`stexp.inference.places.lay_out`."""

    px: Annotated[int, Field(ge=1, le=4096)]
    um: Above0 | None
    trained_um_per_px: Above0 | None
    um_per_px: dict[Name, Above0 | None]


class StainTarget(TypedDict):
    """See :meth:`stexp.data.slides.stain.StainNormaliser.state`."""

    glass: Annotated[list[Above0], Field(min_length=3, max_length=3)]
    stains: Stains
    strength: Annotated[list[Above0], Field(min_length=2, max_length=2)]


class Stain(TypedDict):
    method: Literal["macenko"]
    target: StainTarget


class Interval(TypedDict):
    """See :func:`stexp.inference.intervals.calibrate`."""

    alpha: Between
    spread: bool
    n_spots: Whole
    coverage: Share | None
    coverage_by_group: dict[Name, Share | None]
    note: str


class KnownTiles(TypedDict):
    """See :mod:`stexp.inference.out_of_distribution`."""

    spots: Count
    apart: str
    limit: Share
    held_out_share: Share


class Look(TypedDict):
    """See :func:`stexp.inference.slide_checks.look`."""

    tissue: Number
    blur: NotRequired[Number | None]
    od_red: NotRequired[Number | None]
    od_green: NotRequired[Number | None]
    od_blue: NotRequired[Number | None]
    grain: NotRequired[Number | None]
    grain_half: NotRequired[Number | None]
    grain_double: NotRequired[Number | None]
    stains: NotRequired[Stains | None]
    thumbnail: NotRequired[str]


class Flags(TypedDict):
    """See :func:`stexp.inference.expected.reliability_of_flags`."""

    patients: Count
    flags: Whole
    held: Share | None
    missed: Share | None


class Expected(TypedDict):
    runs: list[Name]
    sections: list[Name]
    flags: NotRequired[Flags | None]


Manifest = dict[Name, dict[Name, str]]
Base = TypedDict(
    "Base",
    {
        "model": str,
        "digest": Digest,
        "data": Name,
        "fold": Name,
        "looks": dict[Name, str],
        "sections": NotRequired[dict[Name, list[Name]] | None],
        "data_manifest": NotRequired[Manifest | None],
        "spots": NotRequired[Spots | None],
        "from": NotRequired["Base | None"],
    },
)
"""A model that a training began at, and the one before it; see :mod:`stexp.inference.base`."""
Trained = TypedDict(
    "Trained",
    {
        "run": str,
        "checkpoint": Digest,
        "data_manifest": Manifest | None,
        "sections": dict[Literal["train", "validation", "test", "reference"], list[Name]],
        "spots": NotRequired[Spots],
        "from": NotRequired[Base | None],
    },
)


class RunScores(TypedDict):
    """What a run scored on its held-out sections; see :func:`stexp.inference.export.export`."""

    protocol: Name
    fold: Name
    scores: dict[Name, Number | None]
    floors: dict[Name, dict[Name, Number | None]]
    ceiling: dict[Name, Number | None]
    n_spots: Count
    n_genes: Count


class PlugIn(TypedDict):
    """See :func:`stexp.runs.plugins.record`."""

    version: str | None
    digest: str | None


class Licences(TypedDict):
    weights: str
    data: str


class Reproduced(TypedDict):
    """How far the exported model is from its run on the same spots."""

    spots: Whole
    mean_difference: NotNegative
    largest_difference: NotNegative


class BankSize(TypedDict):
    spots: Size
    of: Size
    embedding: Literal["float32", "float16"]
    loss: NotRequired[dict[Name, Number | None]]


class ModelFacts(TypedDict):
    """All of ``model.json`` that something is computed from, or said by; older exports lack what is not required."""

    method: Name
    model: dict[str, Any]
    sizes: dict[Literal["n_genes", "n_positions", "n_features"], Size]
    features_by: dict[str, Any] | None
    k: Size | None
    panel: Annotated[list[Name], Field(min_length=1)]
    protocol: dict[str, Any]
    data: Name
    fold: Name
    tile: Tile
    stain: Stain | None
    precision: Name
    channels_last: bool
    licences: Licences
    trained: Trained
    scores: NotRequired[list[RunScores]]
    plugins: NotRequired[dict[Name, PlugIn]]
    reproduces: Reproduced
    bank: NotRequired[BankSize]
    expected: Expected
    interval: Interval | None
    known_tiles: KnownTiles | None
    looks: Annotated[dict[Name, Look], Field(min_length=1)]
    reference_tiles: NotRequired[list[str]]
    files: dict[File, Digest]


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
    check_fields("model.json", facts, ModelFacts, AGAIN)
    panel, sizes = facts["panel"], facts["sizes"]
    check_keys(Protocol, facts["protocol"], "protocol of model.json")
    if len(set(panel)) < len(panel):
        raise InputError(f"model.json: panel names a gene twice; {AGAIN}")
    if sizes.get("n_genes") != len(panel):
        raise InputError(f"model.json: sizes.n_genes is {sizes.get('n_genes')}, the panel has {len(panel)}; {AGAIN}")
