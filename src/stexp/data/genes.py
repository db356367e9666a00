"""Which genes are predicted, and on what scale."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from stexp import InputError
from stexp.data.section import Section
from stexp.protocol import Protocol


def normalise(
    counts: np.ndarray, total_counts: np.ndarray, protocol: Protocol, scaling: str | None = None
) -> np.ndarray:
    """Scale the counts of one section and take logarithms.

    Parameters
    ----------
    counts : (N, G)
        Raw counts of the panel, all spots of one section; NaN columns (not measured) stay NaN.
    total_counts : (N,)
        Counts per spot over the whole transcriptome.
    scaling
        ``"spot"`` or ``"gene"``; default ``protocol.truth``.

    Returns
    -------
    (N, G) float32
        log(1 + target_sum x counts / total), the total being that of the spot (transcriptome or panel)
        or of the gene over the section's spots; 0 where the total is 0.
    """
    scaling = scaling or protocol.truth
    counts = np.asarray(counts, dtype=np.float64)
    if scaling == "gene":
        total = counts.sum(axis=0, keepdims=True)
    elif protocol.library == "panel":
        total = np.nansum(counts, axis=1, keepdims=True)
    else:
        total = np.asarray(total_counts, dtype=np.float64)[:, None]
    scaled = counts * (protocol.target_sum / np.where(total == 0, 1, total))
    out = np.log1p(scaled)
    if protocol.log == "log10":
        out /= np.log(10)
    return out.astype(np.float32)


def read_panel(path: str | Path) -> list[str]:
    """Gene symbols of a panel file, one per line, in its order."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"panel file {path} does not exist; give another (data.panel_file=) or none (data.panel_file=null)")
    genes = path.read_text().split()
    if len(set(genes)) != len(genes):
        raise InputError(f"panel file {path} names a gene twice")
    return genes


def choose_panel(sections: list[Section], n_hvg: int, min_spots: float) -> list[str]:
    """Variable genes of the given sections, and of no other.

    The union over sections of the `n_hvg` most variable genes (scanpy, flavour ``seurat``, on
    ln(1 + 1e4 x share)), among the genes measured in every section and seen in at least the fraction
    `min_spots` of all their spots. Sorted by name, so that the order of sections does not matter.

    Notes
    -----
    The paper asks for 1,000 spots of the 13,620 of HER2+; a fraction says the same for any number.
    """
    import scanpy as sc  # seconds; only this function needs it

    common = set.intersection(*(set(section.genes) for section in sections))
    if not common:
        raise InputError("the sections that choose the panel have no gene in common: are their gene names of one kind?")
    genes = sorted(common)
    seen = np.zeros(len(genes))
    variable: set[str] = set()
    for section in sections:
        spots = section.spots[:, genes].copy()
        seen += spots.X.getnnz(axis=0)
        spots = spots[section.total_counts > 0].copy()
        sc.pp.normalize_total(spots, target_sum=1e4)
        sc.pp.log1p(spots)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bins of mean expression that hold one gene
            sc.pp.highly_variable_genes(spots, n_top_genes=min(n_hvg, len(genes)))
        variable |= set(spots.var_names[spots.var["highly_variable"]])
    enough = seen >= min_spots * sum(len(section) for section in sections)
    panel = [gene for gene, keep in zip(genes, enough, strict=True) if keep and gene in variable]
    if not panel:
        raise InputError(
            f"no gene is variable and seen in {min_spots:.1%} of the spots; lower protocol.min_spots or raise protocol.n_hvg"
        )
    return panel
