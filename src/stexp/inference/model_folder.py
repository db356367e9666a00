"""An exported model: a folder of tensors and plain data that is whole or refused.

``model.json``
    What the model is: method and arguments, panel, protocol, tile, stain, provenance, checksums (SHA-256) of the
    other files and of itself.
``model.safetensors``
    Weights of the method (``model.``) and, where it reads frozen features, of their encoder (``features.``).
``bank.safetensors``
    Of a method that retrieves: the reference spots. ``prototypes.safetensors`` instead, of one that learned prototypes.
``references.jpg``
    Small tiles of some of them, which reports show.
``known.safetensors``
    Of a method that embeds tiles: embeddings of the training's; see :mod:`stexp.inference.out_of_distribution`.
``genes.csv``
    Every gene that can be predicted, with the accuracy to expect and the width of its interval.

A folder may come from anyone: nothing of it is executed, and its values are judged before they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from PIL import Image

from stexp.data.digests import checksum
from stexp.data.slides.pictures import Sheet, read_sheet
from stexp.errors import InputError
from stexp.files import naming, restore, write_atomically, write_csv
from stexp.inference.bank import Bank, read_bank, write_bank
from stexp.inference.intervals import COLUMNS
from stexp.inference.model_facts import check, read_json
from stexp.inference.out_of_distribution import KnownTiles
from stexp.inference.prototype_bank import AnyBank, read_prototype_bank, write_prototype_bank
from stexp.inference.tensors import (
    AGAIN,
    FLOATS,
    INTEGERS,
    check_size,
    damaged,
    read_arrays,
    read_weights,
    write_arrays,
)

FORMAT = "stexp-model 2"
ACCURACY = ("expected_pearson", "expected_floor")


@dataclass(frozen=True)
class ExportedModel:
    """What an exported folder holds.

    Attributes
    ----------
    facts
        ``model.json``, with ``digest``, by which everything made with the model names it.
    genes
        Index gene; ``in_panel``, ``expected_pearson``, ``expected_floor``, ``expected_floor_name``,
        ``beats_floor`` (NA where too few patients say so), ``n_held_out_sections``; with intervals
        ``interval_quantile``, ``interval_offset``, ``coverage_measured``.
    known
        Tiles of the training, of a method that embeds tiles.
    """

    facts: dict
    weights: dict[str, torch.Tensor]
    bank: AnyBank | None
    genes: pd.DataFrame
    tiles: Sheet | None = None
    known: KnownTiles | None = None

    @property
    def digest(self) -> str:
        return self.facts["digest"]


def write(folder: Path, model: ExportedModel, embedding_dtype: str = "float32") -> str:
    """Write a folder beside its place and rename it when whole, in place of one that is there; returns its digest."""
    with _new_folder(folder) as part:
        return _fill(part, model, embedding_dtype)["digest"]


def copy(source: Path, folder: Path) -> None:
    """Copy the files of an exported model, its own alone, as `write` puts them in place.

    Raises
    ------
    InputError
        One of the two folders lies in the other, or the model was changed or damaged.
    """
    own, new = source.resolve(), folder.resolve()
    if own == new:
        return
    if own in new.parents or new in own.parents:
        raise InputError(f"{folder} and the model's own folder {source} lie in each other; choose another place")
    files = _read_facts(source)["files"]
    _check_files(source, files)
    with _new_folder(folder) as part:
        for name in ("model.json", *files):
            shutil.copyfile(source / name, part / name)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of an exported model when the body ends without an error."""
    if folder.exists() and not (folder / "model.json").is_file():
        raise InputError(f"{folder} is there and no exported model; choose another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                with naming(folder, part):
                    yield part
                    _put_in_place(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # where it is not in its place
    except Timeout:
        raise InputError(f"another process writes {folder}; wait for it, or choose another output") from None


def _fill(part: Path, model: ExportedModel, embedding_dtype: str) -> dict:
    """Write all files into the folder `part`; ``model.json`` as it stands there."""
    facts = model.facts
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in model.weights.items()}
    write_arrays(part / "model.safetensors", weights)
    if isinstance(model.bank, Bank):
        write_bank(part / "bank.safetensors", model.bank, embedding_dtype)
    elif model.bank is not None:
        write_prototype_bank(part / "prototypes.safetensors", model.bank, embedding_dtype)
    if model.tiles is not None:
        with naming(part / "references.jpg"):
            (part / "references.jpg").write_bytes(model.tiles.jpeg)
        facts = {**facts, "reference_tiles": model.tiles.names}
    if model.known is not None:
        arrays = {"embedding": model.known.embedding, "distance": model.known.distance, "k": np.array(model.known.k)}
        write_arrays(part / "known.safetensors", arrays)
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors lets no one else read
    write_csv(model.genes, part / "genes.csv", index="gene")
    facts = {
        "format": FORMAT,
        **facts,
        "files": {path.name: checksum(path, hashlib.sha256()) for path in sorted(part.iterdir())},
    }
    facts["digest"] = _digest(facts)
    write_atomically(part / "model.json", json.dumps(facts, indent=1))
    return facts


def _put_in_place(part: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of one that was killed
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def clean(folder: Path) -> None:
    """Delete what a killed `write` left beside a folder that is whole."""
    for suffix in ("part", "old"):
        shutil.rmtree(folder.with_name(f".{folder.name}.{suffix}"), ignore_errors=True)


def read(folder: str | Path) -> ExportedModel:
    """Read a folder that `write` made.

    Raises
    ------
    InputError
        No exported model, one of another format, or a file that is missing, damaged or was changed.
    """
    folder = Path(folder)
    facts = _read_facts(folder)
    files = facts["files"]
    _check_files(folder, files)
    names = facts.get("reference_tiles", [])
    tiles = _read_sheet(folder / "references.jpg", names) if "references.jpg" in files else None
    return ExportedModel(
        facts,
        weights=read_weights(folder / "model.safetensors"),
        bank=_read_bank(folder, files),
        genes=read_genes(folder / "genes.csv", facts),
        tiles=tiles,
        known=_read_known(folder / "known.safetensors") if "known.safetensors" in files else None,
    )


def _read_bank(folder: Path, files: dict[str, str]) -> AnyBank | None:
    if "prototypes.safetensors" in files:
        return read_prototype_bank(folder / "prototypes.safetensors")
    return read_bank(folder / "bank.safetensors") if "bank.safetensors" in files else None


def _read_facts(folder: Path) -> dict:
    """``model.json``, whole and as it was written."""
    path = folder / "model.json"
    if not path.is_file():
        raise InputError(f"{folder} is no exported model: it has no model.json")
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        kind = str(facts.get("format"))[:40]
        raise InputError(f"{path} is of format {kind!r}, this stexp reads {FORMAT!r}; {AGAIN} with this stexp")
    if facts.get("digest") != _digest(facts):
        raise InputError(f"{path} was changed or damaged: its checksum is another; {AGAIN}")
    check(facts)
    return facts


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Refuse a folder that lacks a file of its list, or holds another than was written."""
    for name in ("model.safetensors", "genes.csv"):
        if name not in files:
            raise InputError(f"{folder / 'model.json'} does not name {name} among its files; {AGAIN}")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}; {AGAIN}")
        if checksum(folder / name, hashlib.sha256()) != expected:
            raise InputError(f"{folder / name} was changed or damaged: its checksum is another; {AGAIN}")


def read_genes(path: Path, facts: dict) -> pd.DataFrame:
    """``genes.csv``, see `ExportedModel`."""
    check_size(path, bytes_per_byte=4)
    numbers = [*ACCURACY, *COLUMNS, "n_held_out_sections"]
    try:
        genes = pd.read_csv(
            path,
            dtype={"gene": str, "expected_floor_name": str, "in_panel": bool, "beats_floor": "boolean"},
            keep_default_na=False,  # NA may be a gene
            na_values={key: [""] for key in (*numbers, "beats_floor")},
        ).set_index("gene")
        genes.index = genes.index.map(restore)
    except (ValueError, KeyError, OverflowError) as error:
        raise damaged(path, error) from error
    if not len(genes) or not genes.index.is_unique or "in_panel" not in genes:
        raise damaged(path, "it names no gene, or one twice")
    for column in (column for column in numbers if column in genes):
        if genes[column].dtype.kind not in "iuf" or np.isinf(genes[column].to_numpy(float)).any():
            raise damaged(path, f"{column} holds more than numbers")
    if "beats_floor" in genes and "flags" not in facts["expected"]:
        genes["beats_floor"] = pd.array([pd.NA] * len(genes), dtype="boolean")  # of before flags were calibrated
    return genes


def _read_known(path: Path) -> KnownTiles:
    arrays, _ = read_arrays(path, {"embedding": (FLOATS, 2), "distance": (FLOATS, 1), "k": (INTEGERS, 0)}, {})
    embedding, distance, k = arrays["embedding"], arrays["distance"], int(arrays["k"])
    if not (1 <= k <= len(embedding) == len(distance) and embedding.shape[1]):
        raise damaged(path, f"{len(embedding)} tiles, {len(distance)} distances to the {k} nearest")
    if (np.diff(distance) < 0).any():
        raise damaged(path, "its distances do not ascend")
    return KnownTiles(embedding, distance, k)


def _read_sheet(path: Path, names: list[str]) -> Sheet:
    """Tiles of references; their image is decoded when one is shown."""
    try:
        return read_sheet(names, path.read_bytes())
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # of the image
        raise damaged(path, error) from None


def _digest(facts: dict) -> str:
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
