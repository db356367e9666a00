"""Sections kept in the cache as they were read: their counts lie in a file, and memory holds what is looked at."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.cache import write_whole
from stexp.data.kept_counts import KeptCounts
from stexp.data.parallel import on_all_cores
from stexp.data.section import Section
from stexp.errors import InputError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
_genes: dict[str, pd.DataFrame] = {}
"""Tables of genes by their hash: one for all sections that measure the same."""


@contextmanager
def keeping(folder: Path | None) -> Iterator[None]:
    """Keep sections that :func:`read_each` reads inside in a folder; None: in memory."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def read_each(
    items: Iterable[Item], total: int, what: str, read: Callable[[Item], Section], at_most: int | None = None
) -> list[Section]:
    """Sections of a data set, in order, by :func:`~stexp.data.parallel.on_all_cores`; kept where `keeping` says so."""
    folder = _folder.get()

    def read_one(item: Item) -> Section:
        section = read(item)
        return section if folder is None else keep(section, folder)

    return on_all_cores(items, total, what, read_one, at_most)


def keep(section: Section, folder: Path) -> Section:
    """A section with its counts in a file of a folder, or as it is where that cannot be written."""
    image = _file_image(section.name, section.spots)
    path = folder / f"{section.name}-{hashlib.blake2b(image, digest_size=12).hexdigest()}.h5ad"
    try:
        if not (path.is_file() and path.stat().st_size == len(image) and path.read_bytes() == image):
            write_whole(path, image)
    except InputError as error:
        log.warning("section %s stays in memory: %s", section.name, error)
        return section
    spots, kept = open_counts(path)
    return replace(section, spots=spots, kept=kept)


def _file_image(name: str, spots: ad.AnnData) -> bytes:
    """The bytes of an h5ad whose counts lie in it as they lie in memory; `name` tells it from others made at once."""
    counts = sp.csr_matrix(spots.X, copy=True)
    counts.sum_duplicates()
    obs = spots.obs.copy()
    text = [column for column in obs if obs[column].dtype == object]
    obs[text] = obs[text].astype("category")
    var = spots.var.copy()
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        ad.io.write_elem(file, "/", ad.AnnData(obs=obs, var=var, obsm=dict(spots.obsm), layers=dict(spots.layers)))
        file.pop("X", None)  # that anndata before 0.12 writes of none
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": counts.shape})
        for part in ("data", "indices", "indptr"):
            group.create_dataset(part, data=getattr(counts, part))  # contiguous, to be mapped
        group["total"] = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        genes = hashlib.blake2b(pd.util.hash_pandas_object(var).to_numpy().tobytes(), digest_size=16)
        genes.update(json.dumps([*var.columns, *var.index]).encode())
        facts = {"uns": dict(spots.uns), "text": text, "genes": genes.hexdigest()}
        file.attrs["stexp"] = json.dumps(facts)
        file.flush()
        return file.id.get_file_image()


def open_counts(path: Path) -> tuple[ad.AnnData, KeptCounts]:
    """Spots of a kept section, their counts memory-mapped.

    Raises
    ------
    OSError, KeyError
        The file is missing or damaged.
    """
    with h5py.File(path, "r") as file:
        facts = json.loads(file.attrs["stexp"])
        obs = ad.io.read_elem(file["obs"])
        for name in facts["text"]:
            obs[name] = obs[name].astype(object)
        if facts["genes"] not in _genes:
            _genes[facts["genes"]] = ad.io.read_elem(file["var"])
        obsm, layers = (ad.io.read_elem(file[key]) for key in ("obsm", "layers"))
        group = file["X"]
        matrix, total = sp.csr_matrix(tuple(group.attrs["shape"]), dtype=group["data"].dtype), group["total"][:]
        for part in ("data", "indices", "indptr"):
            setattr(matrix, part, _mapped(path, group[part]))  # its constructor would read or copy some of them
    matrix.has_canonical_format = True
    spots = ad.AnnData(matrix, obs=obs, var=_genes[facts["genes"]], obsm=obsm, layers=layers, uns=facts["uns"])
    return spots, KeptCounts(path, matrix, total)


def _mapped(path: Path, values: h5py.Dataset) -> np.ndarray:
    offset = values.id.get_offset()
    if offset is None:  # nothing in it
        return values[:]
    return np.memmap(path, mode="r", dtype=values.dtype, offset=offset, shape=values.shape)
