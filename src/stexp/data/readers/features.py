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
from stexp.data.readers.spot_columns import is_about_spots
from stexp.errors import InputError, listed

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
    r"(?:[-.\w]*?(?=_)|(?=[-:.]))|human|mouse|rat|homo_sapiens|mus_musculus)(?:_+|[-:.])([^_].*)",
    re.IGNORECASE,
)
"""The genome or species that references of two species set before every name: GRCh38_ACTB, mm10___Actb, mouse_Actb."""

SPECIES = (
    ("human", r"(?:GRCh|hg|CHM13|T2T|human|homo)"),
    ("mouse", r"(?:GRCm|mm\d|mouse|mus)"),
    ("rat", r"(?:GRCr|rn\d|Rnor|mRatBN|rat)"),
)

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

NUMBERS = re.compile(r"\d+(?:[.,]\d+)?(?:E[+-]?\d+)?", re.IGNORECASE)
CELLS = re.compile(r"#.*|TRUE|FALSE|WAHR|FALSCH|VRAI|FAUX|VERDADERO|FALSO|VERDADEIRO|PRAWDA|FAŁSZ|ИСТИНА|ЛОЖЬ")
"""Errors (#REF!, #N/A, ####) and truth values of spreadsheets."""

KINDS: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("summaries of a counting program", SUMMARIES.fullmatch),
    ("control features", CONTROLS.fullmatch),
    ("antibodies", ANTIBODIES.fullmatch),
    ("columns about spots", is_about_spots),
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
        raise InputError(f"{where}: none of {len(names)} features is a gene (first: {listed(names[:1])})")
    columns = np.flatnonzero(keep)
    is_ensembl, ids = is_ensembl[keep], None if ids is None else ids[keep]
    of_genome = None if genomes is None else np.asarray(genomes, object)[keep]
    names = _without_genomes(names[keep], is_ensembl, of_genome, where)
    names = _without_dates(names, ids, is_ensembl, where)
    values = values if len(columns) == values.shape[1] else values[:, columns]
    _refuse_measures(values, names, where)
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
            log.info("%s: %d features are not %s and left out: %s", where, int((~genes).sum()), GENES, listed(others))
        return genes
    if set(plain) & OTHER_TYPES:
        raise InputError(f"{where} have no feature of type {GENES}, only {listed(others)}")
    if set(plain) != {""}:
        log.info("%s: %s are no types of features that 10x writes; all are taken as genes", where, listed(others))
    return np.ones(len(plain), dtype=bool)


def _no_genes(names: np.ndarray, judged: np.ndarray, values: sp.csr_matrix, where: str) -> np.ndarray:
    """Which of the judged features are none by their name."""
    out = np.zeros(len(names), dtype=bool)
    for kind, is_of_kind in KINDS:
        match = _matches(names, is_of_kind) & judged & ~out
        if match.any():
            level = logging.INFO if kind in ("control features", "antibodies") else logging.WARNING
            log.log(
                level, "%s: %d %s are no genes and left out: %s", where, int(match.sum()), kind, listed(names[match])
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
        match = (own.fullmatch(name) if own else None) or GENOME.fullmatch(name)
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
    if 0 < 2 * shorter.sum() < len(names) and not is_ensembl[shorter].all():
        raise InputError(
            f"{where}: {int(shorter.sum())} of {len(names)} names have a genome or species before them "
            f"({listed(names[shorter])}), the others none; counts of one species would fit"
        )
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
    numbers = _matches(names, NUMBERS.fullmatch)
    if numbers.mean() >= 0.5:
        numbers[:] = False  # ids of Entrez
    lost = []
    mended = []
    for i in np.flatnonzero(numbers | _matches(names, CELLS.fullmatch) | _matches(names, date_of)):
        gene = gene_of(names[i], names)
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
            f"{where}: {len(lost)} names are dates or numbers (or errors) that a spreadsheet made of genes: "
            f"{listed(lost)}; which genes they were cannot be told (1-Mar: MARCHF1 or MTARC1), so a table with their "
            f"names would fit"
        )
    if mended:
        log.warning("%s: %d names are dates that a spreadsheet made of genes: %s", where, len(mended), listed(mended))
    return names


def _refuse_measures(values: sp.csr_matrix, names: np.ndarray, where: str) -> None:
    """Refuse columns that are no counts by their values: fractions amid counts, row numbers, shares of the total.

    A gene scatters about its share of the total of its spot at least as its counting does (Poisson). A column that
    scatters ten times less was computed from the others.
    """
    n_spots, n_genes = values.shape
    if n_genes < 4 or not np.isfinite(values.data).all():
        return
    fractional = np.unique(values.indices[values.data % 1 != 0])
    if 0 < len(fractional) <= n_genes // 4:
        raise InputError(f"{where}: {listed(names[fractional])} hold fractions amid counts; leave these columns out")
    of_spots, of_columns = (np.asarray(values.sum(axis=i, dtype=np.float64)).ravel() for i in (1, 0))
    total = of_columns.sum()
    large = np.flatnonzero((of_columns >= 10 * n_spots) | (2 * of_columns >= total))
    if n_spots < 5 or not len(large):
        return
    columns = values[:, large].tocsc()
    for i, gene in enumerate(large):
        column = columns[:, [i]].toarray().ravel().astype(np.float64)
        others = of_spots - column
        expected = of_columns[gene] / max(total - of_columns[gene], 1) * others
        scatter = ((column - expected) ** 2)[expected > 0] / expected[expected > 0]
        is_sum = (column == others).all()
        if is_sum or (n_spots >= 20 and np.var(column) > 1 and scatter.mean() < 0.1):
            raise InputError(
                f"{where}: {names[gene]} {'is' if is_sum else 'follows'} the sum of all other genes in every spot; "
                f"leave the column out"
            )
        if (np.diff(column) == 1).all():
            raise InputError(
                f"{where}: {names[gene]} numbers the spots ({column[0]:g}, {column[1]:g}, ...); leave it out"
            )


def _matches(names: Iterable[str], match: Callable) -> np.ndarray:
    return np.array([bool(match(name)) for name in names], dtype=bool)
