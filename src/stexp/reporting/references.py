"""References that predictions of a retrieving method come from."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from stexp.errors import InputError


def neighbour_table(adata: ad.AnnData, spots: str | Sequence[str] = "all") -> pd.DataFrame:
    """The references that a prediction comes from most, a row for each of up to five.

    Parameters
    ----------
    spots
        ``all``, or names of spots.

    Returns
    -------
    DataFrame
        spot, rank, weight (of all retrieved references a spot's weights sum to 1), reference, and its section, patient
        and, where known, spot.

    Raises
    ------
    InputError
        The method does not retrieve, or a spot is not there.
    """
    if "neighbours" not in adata.obsm or "references" not in adata.uns:
        raise InputError("downstream.neighbours: these predictions name no references; their method does not retrieve")
    if isinstance(spots, str) and spots == "all":
        rows = np.arange(adata.n_obs)
    else:
        names = [spots] if isinstance(spots, str) else [str(spot) for spot in spots]
        rows = adata.obs_names.get_indexer(names)
        if (rows < 0).any():
            unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
            raise InputError(
                f"downstream.neighbours: {', '.join(unknown[:5])} not among the {adata.n_obs} spots "
                f"({', '.join(adata.obs_names[:3])}, ...)"
            )
    which, weight = adata.obsm["neighbours"][rows], adata.obsm["neighbour_weights"][rows]
    references = adata.uns["references"].iloc[which.ravel()]
    table = pd.DataFrame(
        {
            "spot": np.repeat(adata.obs_names.to_numpy(str)[rows], which.shape[1]),
            "rank": np.tile(np.arange(1, which.shape[1] + 1), len(rows)),
            "weight": weight.ravel(),
            "reference": references.index.to_numpy(str),
        }
    )
    for key in references:
        table[f"reference_{key}"] = references[key].to_numpy(str)
    return table
