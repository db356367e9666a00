"""Which genes are predicted, and on what scale."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.data.cohorts import harmonised, unmeasured
from stexp.data.readers.excel_dates import date_of
from stexp.data.readers.paths import user_path
from stexp.data.readers.text import read_text
from stexp.data.section import Section
from stexp.data.splits import with_roles
from stexp.errors import InputError
from stexp.protocol import Protocol

log = logging.getLogger(__name__)


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
        ``"spot"``, ``"gene"`` or ``"residuals"``; default ``protocol.truth``.

    Returns
    -------
    (N, G) float32
        log(1 + target_sum x counts / total), the total being that of the spot (transcriptome or panel)
        or of the gene over the section's spots; 0 where the total is 0. Or :func:`pearson_residuals`.
    """
    scaling = scaling or protocol.truth
    counts = np.asarray(counts, dtype=np.float64)
    if scaling == "residuals":
        library = np.nansum(counts, axis=1) if protocol.library == "panel" else np.asarray(total_counts)
        return pearson_residuals(counts, library).astype(np.float32)
    if scaling == "gene":
        total = counts.sum(axis=0, keepdims=True)
    elif protocol.library == "panel":
        total = np.nansum(counts, axis=1, keepdims=True)
    else:
        total = np.asarray(total_counts, dtype=np.float64)[:, None]
    return scaled_counts(counts, total, protocol)


def scaled_counts(counts: np.ndarray, total: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Logarithms of counts scaled to one total, float32; `total` is broadcast to the counts."""
    scaled = counts * (protocol.target_sum / np.where(total == 0, 1, total))
    out = np.log1p(scaled)
    if protocol.log == "log10":
        out /= np.log(10)
    return out.astype(np.float32)


def pearson_residuals(counts: np.ndarray, total_counts: np.ndarray, theta: float = 100.0) -> np.ndarray:
    """How far counts are from what depth alone would give, in standard deviations (Lause et al. 2021).

    Where every spot of a section had the same share of each gene, gene g of spot i would have the mean
    mu = total of i x share of g over all spots, and the variance mu + mu^2 / theta of a negative binomial.

    Parameters
    ----------
    counts : (N, G)
        Raw counts, all spots of one section; NaN columns stay NaN.
    total_counts : (N,)
        Counts per spot over all genes that shares are of.
    theta
        Overdispersion, as proposed there.

    Returns
    -------
    (N, G) float64
        (x - mu) / sqrt(mu + mu^2 / theta), between -sqrt(N) and sqrt(N); 0 where mu is 0.

    Notes
    -----
    Shares are those of the section itself, also of a test section, and not of the training side: under a share that
    is not its own, every residual of a gene would grow with the root of the spot's depth, which is what residuals are
    to be rid of, and stain, chemistry and patient would decide how much. The price: how high a gene is in a section is
    no part of this truth. Equal to ``scanpy.experimental.pp.normalize_pearson_residuals`` of the whole matrix.
    """
    counts, total = np.asarray(counts, dtype=np.float64), np.asarray(total_counts, dtype=np.float64)
    return residuals(counts, total, counts.sum(axis=0) / max(total.sum(), 1), len(counts), theta)


def residuals(
    counts: np.ndarray, total: np.ndarray, share: np.ndarray, n_spots: np.ndarray | int, theta: float = 100.0
) -> np.ndarray:
    """`pearson_residuals` (N, G) of any spots, by what is known of their sections.

    Parameters
    ----------
    counts : (N, G)
    total : (N,)
    share : (G,) or (N, G)
        Of each gene in the counts of the section.
    n_spots : int or (N, 1)
        Spots of the section.
    """
    expected = total[:, None] * share
    deviation = np.sqrt(expected + expected**2 / theta)
    values = (counts - expected) / np.where(deviation == 0, 1, deviation)
    return values.clip(-np.sqrt(n_spots), np.sqrt(n_spots))


def expression(section: Section, genes: Sequence[str], protocol: Protocol, panel: Sequence[str]) -> np.ndarray:
    """Expression of some genes at every spot of a section, on the scale of the truth of a fold.

    Parameters
    ----------
    genes
        In the panel or not.
    panel
        Genes that the counts of a spot are counted over where the protocol counts them over a panel.

    Returns
    -------
    (N, G) float32
        NaN in columns of genes that are not measured.
    """
    total = section.total_counts
    if protocol.truth != "gene" and protocol.library == "panel":
        total = np.nansum(section.counts(panel).astype(np.float64), axis=1)
        protocol = replace(protocol, library="transcriptome")
    return normalise(section.counts(genes), total, protocol)


def read_panel(path: str | Path) -> list[str]:
    """Gene symbols of a panel file, in its order.

    One per line, or divided by blanks, commas, semicolons or tabs; quotes around them and a byte-order mark before the
    first do not belong to them.
    """
    path = user_path(path)
    if not path.is_file():
        raise InputError(
            f"panel file {path} does not exist; give another (data.panel_file=) or none (data.panel_file=null)"
        )
    words = re.split(r"[\s,;]+", read_text(path, "panel file").decode())
    genes = [word.strip("\"'") for word in words if word.strip("\"'")]
    if not genes:
        raise InputError(f"panel file {path} names no gene")
    strange = [gene for gene in genes if not gene.isprintable()]
    if strange:
        raise InputError(f"panel file {path} is no text ({strange[0][:40]!r}); one gene symbol a line would fit")
    dates = [gene for gene in genes if date_of(gene)]
    if dates:
        raise InputError(f"panel file {path} has dates that a spreadsheet made of genes: {', '.join(dates[:5])}")
    if len(set(genes)) != len(genes):
        raise InputError(f"panel file {path} names a gene twice")
    return genes


def listed_genes(genes: object) -> list[str]:
    """Names of ``genes=``, one or a list; InputError for anything else, for none, or one named twice."""
    if not isinstance(genes, str | list | tuple | np.ndarray | pd.Index | pd.Series):
        raise InputError(f"genes={genes}: give panel, all, or a list of names")
    names = [genes] if isinstance(genes, str) else [str(name) for name in genes]
    if not names or len(set(names)) < len(names):
        raise InputError("genes names a gene twice, or none; give panel, all, or a list of different genes")
    return names


def choose_panel(sections: list[Section], protocol: Protocol, measured_in: list[Section] | None = None) -> list[str]:
    """Variable genes of the given sections, and of no other.

    The genes measured in every section (and in those of `measured_in`, whose counts are not looked at), seen
    in at least the fraction ``protocol.min_spots`` of all their spots, and among the ``protocol.n_hvg`` most
    variable of one section or more. Of these, the ``protocol.panel_size`` that are variable in most sections,
    ties by their mean dispersion. Sorted by name.

    Notes
    -----
    The paper takes the union and asks for 1,000 spots of the 13,620 of HER2+; a fraction says the same for
    any number.
    """
    common = set.intersection(*(set(section.genes) for section in [*sections, *(measured_in or [])]))
    if not common:
        raise InputError(
            "the sections that choose the panel, and those it is for, have no gene in common: are their gene names of "
            "one kind?"
        )
    parts = [part for part in (variable_genes(section, protocol.n_hvg) for section in sections) if len(part)]
    dispersion = pd.concat(parts) if parts else pd.Series(dtype=float, index=pd.Index([], dtype=object))
    dispersion = dispersion[dispersion.index.isin(common)].groupby(level=0).agg(["size", "mean"])
    candidates = dispersion.sort_values(["size", "mean"], ascending=False, kind="stable").index
    seen = sum(_seen(section)[section.genes.get_indexer(candidates)] for section in sections)
    panel = candidates[seen >= protocol.min_spots * sum(len(section) for section in sections)][: protocol.panel_size]
    if len(panel) == 0:
        raise InputError(
            f"no gene is variable and seen in {protocol.min_spots:.1%} of the spots; lower protocol.min_spots "
            f"or raise protocol.n_hvg"
        )
    return sorted(panel)


def panel_of_fold(
    sections: list[Section], spots: pd.DataFrame, protocol: Protocol, panel: Sequence[str] | None, saw_test: bool
) -> tuple[list[str], list[str]]:
    """The panel of a fold, and the test sections that whoever chose it looked at.

    Parameters
    ----------
    spots
        ``section`` and ``role`` of every spot; those that validate belong to the training side here.
    panel
        A published list; None: chosen as the protocol says.
    saw_test
        Whether a published list was made with all sections in view.

    Notes
    -----
    Of another cohort that is tested, genes which it does not measure are left out, whoever chose the panel; its counts
    are not looked at.
    """
    names_of = {role: list(part["section"].unique()) for role, part in spots.groupby("role", sort=False)}
    tested = [section for section in sections if section.cohort and section.name in names_of.get("test", [])]
    if panel is None:
        saw_test = protocol.panel == "all"
        choosing = sections if saw_test else with_roles(sections, spots, "train", "validation")
        referenced = [section for section in sections if section.name in names_of.get("reference", [])]
        panel = choose_panel(choosing, protocol, measured_in=referenced)
        if tested and unmeasured(panel, tested):
            panel = choose_panel(choosing, protocol, measured_in=[*referenced, *tested])  # others take their place
    elif tested:
        panel = harmonised(panel, tested)
    if len(set(panel)) < len(panel):
        twice = pd.Index(panel)[pd.Index(panel).duplicated()][0]
        raise InputError(f"panel: {twice} is named twice; once would fit")
    return list(panel), names_of.get("test", []) if saw_test else []


def drop_unmeasured(sections: list[Section], panel: list[str], test: list[str], training: list[str]) -> list[Section]:
    """Refuse, leave out or warn of sections that do not measure all of the panel, by what they are for.

    Parameters
    ----------
    test, training
        Names of sections with such spots; the others are only retrieved from, and are left out.
    """
    left_out = []
    for section in sections:
        measured = section.genes
        missing = [gene for gene in panel if gene not in measured]
        if not missing:
            continue
        text = (
            f"section {section.name} does not measure {len(missing)} of the {len(panel)} panel genes "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
        if section.name in training:
            raise InputError(f"{text}; leave the section out (data.sections=) or the genes (data.panel_file=)")
        if section.name in test and len(missing) == len(panel):
            raise InputError(
                f"test section {section.name} measures none of the {len(missing)} panel genes: it has genes like "
                f"{section.genes[0]}, the panel like {panel[0]}; data.gene_table= maps ids to symbols"
            )
        if section.name in test:
            log.warning("%s; they are not scored there", text)
        else:
            left_out.append(section.name)
    if left_out:
        log.warning(
            "%d sections without an image do not measure the whole panel and are not retrieved from: %s",
            len(left_out),
            ", ".join(left_out),
        )
    return [section for section in sections if section.name not in left_out]


def _seen(section: Section) -> np.ndarray:
    """Spots in which each gene was counted; a sparse matrix may store zeros."""
    return section.made("seen", lambda: {"seen": np.asarray((section.spots.X > 0).sum(axis=0)).ravel()})["seen"]


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Torch keeps its number of CPU threads: numba, within scanpy, sets the OpenMP runtime of both to all cores."""
    torch = sys.modules.get("torch")  # scoring goes without it
    n = torch.get_num_threads() if torch else 0
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(n)


@lru_cache(maxsize=256)
def variable_genes(section: Section, n: int) -> pd.Series:
    """Normalised dispersion of the `n` most variable genes: scanpy, flavour ``seurat``, on ln(1 + 1e4 x share)."""
    kept = section.made(f"variable{n}", lambda: _most_variable(section, n))
    return pd.Series(kept["dispersion"], index=pd.Index(kept["gene"].astype(object)))


def _most_variable(section: Section, n: int) -> dict[str, np.ndarray]:
    import scanpy as sc  # seconds; only this function needs it

    spots = section.spots[section.total_counts > 0].copy()
    if spots.n_obs < 2 or spots.n_vars < 2 or not (spots.X.max(axis=0) - spots.X.min(axis=0)).nnz:
        return {"gene": np.array([], dtype=str), "dispersion": np.array([])}  # nothing varies
    with _threads_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bins that hold one gene
        sc.pp.normalize_total(spots, target_sum=1e4)
        sc.pp.log1p(spots)
        sc.pp.highly_variable_genes(spots)
    dispersion = spots.var["dispersions_norm"].dropna()  # genes alone in their bin of mean expression have none
    dispersion = dispersion[dispersion >= dispersion.nlargest(n).min()]
    return {"gene": dispersion.index.to_numpy(str), "dispersion": dispersion.to_numpy()}
