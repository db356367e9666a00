"""Prototypes of a run: what each stands for, and its tiles, in ``prototypes.json`` and ``prototypes.h5``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stexp.data.datamodule import SpotDataModule
from stexp.data.slides import pictures
from stexp.evaluation.prototype_record import FACTS, TILES
from stexp.files import write_atomically
from stexp.models.method import References
from stexp.models.prototypes import Standing, stand_for
from stexp.runs.tiles import tiles_of, with_image

SHOWN, GENES = 8, 6  # tiles and genes of a prototype


def name_prototypes(
    data: SpotDataModule, standing: Standing, rows: np.ndarray, embedding: torch.Tensor
) -> pd.DataFrame:
    """A table of prototypes as of spots: section, patient and spot, and ``row``, the data's spot that pictures it.

    Parameters
    ----------
    rows, embedding : (R,), (R, D)
        The references that the prototypes stand for, as rows of the data's spots.

    Returns
    -------
    DataFrame
        ``row`` is the nearest of its spots that has an image, -1 where none has.
    """
    nearest = standing.nearest(embedding, with_image(data)[rows])
    return standing.names.assign(row=[rows[each[0]] if len(each) else -1 for each in nearest])


def write_prototypes(folder: Path, data: SpotDataModule, references: References) -> pd.DataFrame:
    """Write what prototypes stand for, and the tiles nearest to each; returns `name_prototypes`.

    ``prototypes.json`` has of every prototype its ``name``, number of ``spots``, these by ``sections``, the ``genes``
    that stand out among prototypes with their difference to the mean of all, and the names of its ``tiles``, nearest
    first; the tiles lie in ``prototypes.h5`` as `pictures` keeps them. Of very many prototypes those of most spots.
    """
    assert references.prototype is not None  # of a method that has them
    rows = references.retrieved_rows
    place = pd.Index(references.rows).get_indexer(rows)
    embedding = references.embedding[torch.from_numpy(place).to(references.embedding.device)]
    spots = data.spots.iloc[rows]
    standing = stand_for(references.prototype[place], embedding, spots)
    nearest = standing.nearest(embedding, with_image(data)[rows])
    expression = standing.mean(torch.from_numpy(data.target[rows])).numpy()
    difference, spread = expression - expression.mean(axis=0), expression.std(axis=0)
    # by the spread among prototypes, so that the same genes do not lead everywhere
    standing_out = difference / np.where(spread > 0, spread, np.inf)
    member, section = standing.member.cpu().numpy(), spots["section"].to_numpy(str)
    facts, shown = [], []
    largest = np.argsort(-np.bincount(member), kind="stable")[: pictures.BANK_TILES // SHOWN]
    for at in largest:
        tiles = rows[nearest[at][:SHOWN]]
        shown += list(tiles)
        genes = np.argsort(-np.nan_to_num(standing_out[at], nan=-np.inf), kind="stable")[:GENES]
        by_section = pd.Series(section[member == at]).value_counts()
        facts.append(
            {
                "name": str(standing.names.index[at]),
                "spots": int((member == at).sum()),
                "sections": {str(name): int(n) for name, n in by_section.items()},
                "genes": {data.panel[gene]: round(float(difference[at, gene]), 3) for gene in genes},
                "tiles": list(data.spots.index[tiles]),
            }
        )
    sheet = pictures.sheet(list(data.spots.index[shown]), tiles_of(data, np.array(shown))) if shown else None
    pictures.write(folder / TILES, {}, sheet)
    record = {"prototypes": facts, "of": len(standing.number), "references": len(rows)}
    write_atomically(folder / FACTS, json.dumps(record, indent=1))
    return name_prototypes(data, standing, rows, embedding)
