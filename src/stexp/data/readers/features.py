"""Which features of a matrix are genes, and how they are called, whatever file the matrix came from."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.readers.excel_dates import date_of, gene_of
from stexp.errors import InputError

Names = Sequence[str] | np.ndarray

log = logging.getLogger(__name__)

GENES = "Gene Expression"
OTHER_TYPES = {
    "antibody capture", "antigen capture", "crispr guide capture", "custom", "multiplexing capture", "peaks",
    "protein expression", "negative control probe", "negative control codeword", "unassigned codeword",
    "deprecated codeword", "genomic control", "blank codeword",
}  # fmt: skip
"""Types of features that 10x pipelines write beside `GENES`, in small letters."""

ENSEMBL_ID = re.compile(r"(?:\w+?_+)?ENS[A-Z]{0,6}G\d{11}(?:\.\d+)?(?:_PAR_Y)?")

GENOME = re.compile(
    r"((?:GRC[a-z]\d+|hg(?:1[789]|38)|mm(?:9|10|39)|rn[4-7]|danRer\d+|dm[36]|ce1[01]|CHM13|T2T|Rnor|mRatBN|Sscrofa|"
    r"BDGP\d+|WBcel\d+|TAIR\d+)"
    r"[-.\w]*?)_+([^_].*)",
    re.IGNORECASE,
)
"""The genome that references of two species set before every name: GRCh38_ACTB, mm10___Actb."""

SPECIES = (("human", r"(?:GRCh|hg|CHM13|T2T)"), ("mouse", r"(?:GRCm|mm)\d"), ("rat", r"(?:GRCr|rn\d|Rnor|mRatBN)"))

SUMMARIES = re.compile(
    r"__.*|\*|N_(?:unmapped|multimapping|noFeature|ambiguous)|(?:Un)?assigned(?:_\w+)?|"
    r"_?(?:no_feature|ambiguous|too_low_aQual|not_aligned|alignment_not_unique|unmapped)(?:\[.*\])?",
    re.IGNORECASE,
)
"""What HTSeq, STAR, featureCounts, UMI-tools and the ST pipeline count beside genes."""

CONTROLS = re.compile(
    r"(?:NegControl|NegPrb|Negative ?Control|BLANK|UnassignedCodeword|DeprecatedCodeword|Intergenic_?Region|antisense_|"
    r"SystemControl|FalseCode)[\w.-]*|ERCC-\d{5}"
)
"""Probes and codewords of imaging that show its errors, and spiked-in RNA."""

ANTIBODIES = re.compile(r".+_TotalSeq[A-C]?|(?:ADT|HTO|CITE)[_-].+|Hashtag[_ -]?\d+.*", re.IGNORECASE)

METADATA = re.compile(
    r"total_counts.*|n_genes(?:_by_counts)?|n_counts|n_umis?|numis?|ngenes?|log1p_.+|pct_counts_.+|nCount_.+|nFeature_.+|"
    r"percent[._](?:mt|mito|ribo).*|total_umis?|umi_counts?|library_size|size_factors?|total|totals|sum|"
    r"in_tissue|array_(?:row|col|x|y)|pixel_[xy]|pxl_(?:row|col)_in_fullres|image(?:row|col)|new_[xy]|selected|"
    r"orig\.ident|seurat_clusters|clusters?|leiden.*|louvain.*|batch|samples?|sample_id|section|patient|condition|"
    r"barcodes?|spots?|spot_id|cell_id|doublet_scores?|Unnamed: ?\d+|index",
    re.IGNORECASE,
)
"""Columns about spots that were left in a table of counts."""

KINDS: tuple[tuple[str, re.Pattern], ...] = (
    ("summaries of a counting program", SUMMARIES),
    ("control features", CONTROLS),
    ("antibodies", ANTIBODIES),
    ("columns about spots", METADATA),
)


def genes_of(
    values: sp.csr_matrix,
    spots: Names,
    names: Names,
    ids: Names | None = None,
    types: Names | None = None,
    genomes: Names | None = None,
    where: str = "counts",
) -> ad.AnnData:
    """Counts of the genes among the features of a matrix.

    Parameters
    ----------
    values : (n_spots, n_features)
    names, ids, types, genomes
        Of the features, "" where one is missing; None: the file has none.
    where
        The file, for messages.

    Returns
    -------
    AnnData, n_spots x n_genes
        Names are symbols, or ids where there is no symbol, without the genome that references of two species set
        before them; ``var["gene_ids"]`` where there are ids. A name may occur twice: `harmonise` and `Section` decide.

    Raises
    ------
    InputError
        No gene; names that spreadsheets made into dates or numbers and that two genes may have had; genes of two
        genomes without Ensembl ids; a gene without a name; a gene that is the sum of all others.

    Notes
    -----
    A feature is no gene where the file gives it another type, or where its name is that of a summary, a control, an
    antibody or a column about spots and no Ensembl id stands behind it. What is left out is named in the log.
    """
    names = np.array([str(name).strip() for name in names], dtype=object)
    ids = None if ids is None else np.array([str(gene).strip() for gene in ids], dtype=object)
    keep = np.ones(len(names), dtype=bool) if types is None else _of_gene_type(types, where)
    is_ensembl = _matches(names if ids is None else ids, ENSEMBL_ID.fullmatch) | _matches(names, ENSEMBL_ID.fullmatch)
    keep &= ~_no_genes(names, keep & ~is_ensembl, values, where)
    if not keep.any():
        raise InputError(f"{where}: none of {len(names)} features is a gene (first: {_some(names[:1])})")
    columns = np.flatnonzero(keep)
    is_ensembl, ids = is_ensembl[keep], None if ids is None else ids[keep]
    of_genome = None if genomes is None else np.asarray(genomes, object)[keep]
    names = _without_genomes(names[keep], is_ensembl, of_genome, where)
    names = _without_dates(names, ids, is_ensembl, where)
    values = values if len(columns) == values.shape[1] else values[:, columns]
    _refuse_sums(values, names, where)
    var = pd.DataFrame(index=pd.Index(names, dtype=object))
    if ids is not None:
        var["gene_ids"] = ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that occur twice: whoever joins decides about them
        return ad.AnnData(values, obs=pd.DataFrame(index=pd.Index(np.asarray(spots, dtype=object))), var=var)


def _of_gene_type(types: Names, where: str) -> np.ndarray:
    """Which features are of the type of genes; all, where the column holds something else than types of 10x."""
    plain = np.array([str(kind).strip().lower().replace("_", " ") for kind in types], dtype=object)
    genes = plain == GENES.lower()
    others = sorted({str(kind) for kind, gene in zip(types, genes, strict=True) if not gene})
    if genes.any():
        if others:
            log.info("%s: %d features are not %s and left out: %s", where, int((~genes).sum()), GENES, _some(others))
        return genes
    if set(plain) & OTHER_TYPES:
        raise InputError(f"{where} have no feature of type {GENES}, only {_some(others)}")
    if set(plain) != {""}:
        log.info("%s: %s are no types of features that 10x writes; all are taken as genes", where, _some(others))
    return np.ones(len(plain), dtype=bool)


def _no_genes(names: np.ndarray, judged: np.ndarray, values: sp.csr_matrix, where: str) -> np.ndarray:
    """Which of the judged features are none by their name."""
    out = np.zeros(len(names), dtype=bool)
    for kind, pattern in KINDS:
        match = _matches(names, pattern.fullmatch) & judged & ~out
        if match.any():
            level = logging.INFO if pattern in (CONTROLS, ANTIBODIES) else logging.WARNING
            log.log(
                level, "%s: %d %s are no genes and left out: %s", where, int(match.sum()), kind, _some(names[match])
            )
            out |= match
    coordinates = np.isin(names, ("x", "y")) & judged
    if coordinates.sum() == 2:  # one alone may be a gene of the fly
        log.warning("%s: the columns x and y are no genes and left out", where)
        out |= coordinates
    nameless = (names == "") & judged
    if nameless.any():
        content = values[:, np.flatnonzero(nameless)].data
        if np.nansum(np.abs(content)):
            raise InputError(f"{where}: {int(nameless.sum())} features have counts and no name")
        out |= nameless  # a separator at the end of each line
    return out


def _without_genomes(names: np.ndarray, is_ensembl: np.ndarray, genomes: np.ndarray | None, where: str) -> np.ndarray:
    """Names without the genome before them.

    Genes of two species are left to the Ensembl ids behind them, of which `harmonise` takes one species or refuses;
    names alone are refused here.
    """
    plain, species = names.copy(), np.full(len(names), "", dtype=object)
    stated = "|".join(sorted({re.escape(str(genome)) for genome in ([] if genomes is None else genomes) if genome}))
    own = re.compile(rf"({stated})_+([^_].*)") if stated else None
    for i, name in enumerate(names):
        match = (own.fullmatch(name) if own else None) or (GENOME.fullmatch(name) if "_" in name else None)
        if match:
            plain[i] = match[2]
        genome = match[1] if match else "" if genomes is None else str(genomes[i])
        species[i] = _species(genome)
    several = sorted(set(species) - {""})
    if len(several) > 1 and not is_ensembl[species != ""].all():
        counted = ", ".join(f"{int((species == one).sum())} {one}" for one in several)
        example = ", ".join(names[species == one][0] for one in several)
        raise InputError(
            f"{where}: genes of {len(several)} genomes ({counted}; such as {example}); counts of one of them would fit"
        )
    shorter = plain != names
    if shorter.any():
        log.info("%s: %d names lose the genome before them (%s)", where, int(shorter.sum()), names[shorter][0])
    return plain


def _species(genome: str) -> str:
    """What a genome is of; itself where it is another one that is known, "" where it is not."""
    if not GENOME.fullmatch(f"{genome}_x"):
        return ""
    for species, pattern in SPECIES:
        if re.match(pattern, genome, re.IGNORECASE):
            return species
    return genome


def _without_dates(names: np.ndarray, ids: np.ndarray | None, is_ensembl: np.ndarray, where: str) -> np.ndarray:
    """Names without what spreadsheets made of them: dates become genes again where only one can be meant."""
    names = names.copy()
    numbers = _matches(names, re.compile(r"\d+(?:\.\d+)?(?:E[+-]?\d+)?", re.IGNORECASE).fullmatch)
    if numbers.mean() >= 0.5:
        numbers[:] = False  # ids of Entrez
    lost = []
    mended = []
    for i in np.flatnonzero(numbers | _matches(names, date_of)):
        gene = None if numbers[i] else gene_of(names[i], names)
        if gene is not None and gene not in names:
            mended.append(f"{names[i]} -> {gene}")
            names[i] = gene
        elif ids is not None and is_ensembl[i]:
            mended.append(f"{names[i]} -> {ids[i]}")
            names[i] = ids[i]
        else:
            lost.append(names[i])
    if lost:
        raise InputError(
            f"{where}: {len(lost)} names are dates or numbers that a spreadsheet made of genes: {_some(lost)}; which "
            f"genes they were cannot be told (1-Mar: MARCHF1 or MTARC1), so a table with their names would fit"
        )
    if mended:
        log.warning("%s: %d names are dates that a spreadsheet made of genes: %s", where, len(mended), _some(mended))
    return names


def _refuse_sums(values: sp.csr_matrix, names: np.ndarray, where: str) -> None:
    """Refuse a column that holds the total of all others in every spot."""
    if values.shape[1] < 4:
        return
    of_spots = np.asarray(values.sum(axis=1, dtype=np.float64)).ravel()
    if (of_spots > 0).sum() < 5 or not np.isfinite(of_spots).all():
        return
    of_columns = np.asarray(values.sum(axis=0, dtype=np.float64)).ravel()
    for i in np.flatnonzero(2 * of_columns == of_columns.sum()):
        if (2 * values[:, [i]].toarray().ravel() == of_spots).all():
            raise InputError(f"{where}: {names[i]} is the sum of all other genes in every spot; leave the column out")


def _matches(names: Iterable[str], match: Callable) -> np.ndarray:
    return np.array([match(name) is not None for name in names], dtype=bool)


def _some(names: Iterable[str], n: int = 4) -> str:
    names = [str(name)[:60] for name in names]
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
